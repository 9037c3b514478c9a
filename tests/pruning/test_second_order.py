"""Second-order criteria: the update lowers the error; chunks and ill-conditioned matrices change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spdtool.errors import RecipeError
from spdtool.pruning import second_order
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.second_order import obert, update_blocks, update_rows
from spdtool.pruning.statistics import Stats
from spdtool.recipe.training import Prune

OUT, IN = 6, 12


def correlated_rows(rows: int, size: int, seed: int = 0) -> Tensor:
    """Draw rows with correlated entries, so that survivors can compensate for dead weights."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=draw) @ torch.randn(size, size, generator=draw) / size**0.5


def layer_with(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def make_pruner(layer: nn.Linear, criterion: str, sparsity: float, **settings: Any) -> Pruner:
    masks = Masks({"w": layer.weight})
    return Pruner(masks, [(1, sparsity)], Prune(criterion=criterion, **settings), sparsity, {"w": layer})


def test_layerwise_lowers_the_true_error_of_the_output() -> None:
    weight, tokens = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), correlated_rows(50, IN)

    def error(sparsity: float, **settings: Any) -> float:
        layer = layer_with(weight)
        pruner = make_pruner(layer, "layerwise", sparsity, dampening=1e-4, **settings)
        with pruner.observe_inputs(), torch.no_grad():
            layer(tokens.view(5, 10, IN))
        pruner.prune(1)
        pruner.finalize()
        return float((layer(tokens).detach() - tokens @ weight.T).square().mean())

    for sparsity, largest_ratio in ((0.3, 0.7), (0.6, 0.7), (0.9, 0.9)):
        assert error(sparsity) < largest_ratio * error(sparsity, update=False), sparsity


@pytest.mark.parametrize("block", [72, 12])
def test_obert_lowers_the_true_loss_of_a_quadratic(block: int) -> None:
    """The loss is (w - w0)' F (w - w0) / 2, with F the mean outer product of the gradients."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    gradients = correlated_rows(400, block).view(-1, block).repeat(1, OUT * IN // block)
    gradients *= (
        torch.randn(400, OUT * IN // block, generator=torch.Generator().manual_seed(2))
        .sign()
        .repeat_interleave(block, 1)
    )
    curvature = gradients.T @ gradients / len(gradients)

    def loss(**settings: Any) -> float:
        layer = layer_with(weight)
        pruner = make_pruner(layer, "obert", 0.5, fisher_block=block, dampening=1e-4, **settings)
        for gradient in gradients:
            layer.weight.grad = gradient.view(OUT, IN)
            pruner.observe_gradients()
        pruner.prune(1)
        pruner.finalize()
        change = (layer.weight.detach() - weight).flatten()
        return float(change @ curvature @ change) / 2

    updated, plain = loss(), loss(update=False)
    assert updated < 0.7 * plain


def test_chunks_do_not_change_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, alive = torch.randn(7, 10), torch.rand(7, 10) > 0.4
    gradients, tokens = torch.randn(30, 18, 4), torch.randn(40, 10)
    fishers = torch.einsum("tbi,tbj->bij", gradients, gradients) / 30 + 0.01 * torch.eye(4)
    stats = Stats(fisher_blocks=fishers, input_gram=tokens.T @ tokens / 40 + 0.01 * torch.eye(10))
    expected = [update_blocks(weight, alive, stats), update_rows(weight, alive, stats), obert(weight, stats)]
    for constant in ("AT_ONCE", "ROWS_AT_ONCE"):
        monkeypatch.setattr(second_order, constant, 1)
    chunked = [update_blocks(weight, alive, stats), update_rows(weight, alive, stats), obert(weight, stats)]
    for expected_weights, chunked_weights in zip(expected, chunked, strict=True):
        torch.testing.assert_close(expected_weights, chunked_weights, rtol=1e-5, atol=1e-6)


def test_sets_of_very_different_sizes_are_solved_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(80, 20)
    matrix, wanted = inputs.T @ inputs / 80 + 0.01 * torch.eye(20), torch.randn(9, 20)
    sets = torch.rand(9, 20) < torch.linspace(0, 1, 9).unsqueeze(1)[torch.randperm(9)]
    sets[4], sets[7] = False, True
    for numbers in (1, 150, 2**22):  # one row at a time, a few, all
        monkeypatch.setattr(second_order, "ROWS_AT_ONCE", numbers)
        solution = second_order.solve_rows(matrix, wanted, sets)
        for row, (members, answer) in enumerate(zip(sets, solution, strict=True)):
            expected = torch.linalg.solve(matrix[members][:, members].double(), wanted[row, members].double()).float()
            torch.testing.assert_close(answer[members], expected, rtol=1e-4, atol=1e-5, msg=f"{numbers} {row}")
            assert not answer[~members].any(), (numbers, row)


def test_a_row_is_padded_to_its_like_and_not_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    factorize = second_order.factorize

    def watch(matrices: Tensor) -> Tensor:
        sizes.extend([matrices.shape[-1]] * len(matrices))
        return factorize(matrices)

    monkeypatch.setattr(second_order, "factorize", watch)
    monkeypatch.setattr(second_order, "ROWS_AT_ONCE", 100)
    sets = torch.zeros(41, 50, dtype=torch.bool)
    sets[3] = True
    sets[[row for row in range(41) if row != 3], :5] = True
    second_order.solve_rows(torch.eye(50), torch.randn(41, 50), sets)
    assert sizes == [50] + [5] * 40


def test_solving_for_live_and_for_dead_sets_gives_the_same_weights() -> None:
    """A row that is all dead or all alive decides for which of the two sets the code solves."""
    torch.manual_seed(0)
    weight, alive = torch.randn(5, 8), torch.rand(5, 8) > 0.5
    tokens = torch.randn(40, 8)
    stats = Stats(input_gram=tokens.T @ tokens / 40 + 0.01 * torch.eye(8))
    alive[3] = False  # the longest dead set is the whole row, so the code solves for the live sets
    by_live = update_rows(weight, alive, stats)
    alive[3] = True  # now it solves for the dead sets
    by_dead = update_rows(weight, alive, stats)
    torch.testing.assert_close(by_live[[0, 1, 2, 4]], by_dead[[0, 1, 2, 4]], rtol=1e-4, atol=1e-5)
    assert by_live[3].tolist() == [0.0] * 8
    torch.testing.assert_close(by_dead[3], weight[3])


def test_a_matrix_that_float32_cannot_factor_is_factored_in_float64() -> None:
    torch.manual_seed(0)
    first, beside = torch.rand(100) + 1, torch.rand(100)
    least = (beside.double() ** 2 / first.double()).float()  # below it, [[first, beside], [beside, x]] is not definite
    last = torch.nextafter(least, torch.tensor(2.0))
    blocks = torch.stack([first, beside, beside, last], dim=1).view(-1, 2, 2)
    ill_conditioned = torch.block_diag(*blocks)
    # Whatever the order of its sums, float32 fails on some of a hundred blocks.
    assert bool(torch.linalg.cholesky_ex(ill_conditioned).info.any())
    factor = second_order.factorize(ill_conditioned[None])[0]
    torch.testing.assert_close(factor @ factor.T, ill_conditioned, rtol=1e-4, atol=1e-5)


def test_a_nan_curvature_is_refused() -> None:
    stats = Stats(fisher_blocks=torch.full((1, 4, 4), torch.nan))
    with pytest.raises(RecipeError, match="cannot be inverted") as error:
        obert(torch.ones(2, 2), stats)
    assert "prune.dampening" in str(error.value.hint)


def test_a_layer_without_inputs_is_ranked_by_magnitude_and_not_updated() -> None:
    observed, unobserved = layer_with(torch.randn(2, 4)), layer_with(torch.tensor([[1.0, -4.0, 3.0, 2.0]]))
    masks = Masks({"a": observed.weight, "b": unobserved.weight})
    pruner = Pruner(masks, [(1, 0.5)], Prune(criterion="layerwise"), 0.5, {"a": observed, "b": unobserved})
    with pruner.observe_inputs(), torch.no_grad():
        observed(torch.randn(9, 4))
    pruner.prune(1)
    assert unobserved.weight.tolist() == [[0.0, -4.0, 3.0, 0.0]]
