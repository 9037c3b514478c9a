"""Statistics of gradients and inputs: sums, exclusions, and resuming from a saved state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spdtool.pruning.masks import Masks
from spdtool.pruning.observer import Observer
from spdtool.pruning.statistics import STATISTICS, Stats, split_into_blocks
from spdtool.recipe.training import Prune

NEEDS = tuple(STATISTICS)
FROM_GRADIENTS = tuple(need for need, kind in STATISTICS.items() if kind.reads == "gradient")
SECTION = Prune(fisher_block=4)


def make_observer(needs: tuple[str, ...] = NEEDS, seed: int = 0) -> tuple[Observer, dict[str, nn.Linear]]:
    torch.manual_seed(seed)
    layers = {"a": nn.Linear(5, 3), "b": nn.Linear(3, 4)}
    masks = Masks({name: layer.weight for name, layer in layers.items()})
    return Observer(masks, needs, SECTION, layers), layers


def set_gradients(layers: dict[str, nn.Linear], seed: int, *names: str) -> None:
    """Set random gradients on the named layers (default: all) and None on the others."""
    draw = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        gradient = torch.randn(layer.weight.shape, generator=draw)
        layer.weight.grad = gradient if not names or name in names else None


def test_every_statistic_has_its_field() -> None:
    assert set(NEEDS) == set(Stats.__dataclass_fields__)


def test_each_statistic_reads_gradients_or_inputs() -> None:
    for need in NEEDS:
        observer, _ = make_observer((need,))
        assert observer.reads("input") == (need in ("input_norm", "input_mean", "input_gram")), need
        assert observer.reads("gradient") != observer.reads("input"), need
        assert observer.learns == (need in ("movement", "movement_soft")), need
    empty_observer, _ = make_observer(())
    assert not empty_observer.reads("gradient")
    assert not empty_observer.reads("input")
    assert not empty_observer.is_empty()


def test_a_step_that_overflowed_does_not_count() -> None:
    (plain, layers), (overflowed, others) = make_observer(FROM_GRADIENTS), make_observer(FROM_GRADIENTS)
    for each in (layers, others):
        set_gradients(each, 1)
    plain.add_gradients()
    for gradient, overflow in ((float("inf"), 1.0), (float("nan"), 1.0), (None, 0.0)):
        set_gradients(others, 1)
        if gradient is not None:
            for layer in others.values():
                assert layer.weight.grad is not None
                layer.weight.grad[0, 0] = gradient
        overflowed.add_gradients(torch.tensor(overflow))
    for need in FROM_GRADIENTS:
        assert torch.equal(getattr(plain.stats("a"), need), getattr(overflowed.stats("a"), need)), need


def test_a_step_that_left_the_layer_out_counts_as_zero() -> None:
    observer, layers = make_observer(("gradient",))
    set_gradients(layers, 1)
    first = layers["b"].weight.grad
    observer.add_gradients()
    set_gradients(layers, 2, "a")
    observer.add_gradients()
    torch.testing.assert_close(observer.stats("b").gradient, first / 2)


def test_gradients_of_what_stays_dead_are_left_out_of_the_fisher_blocks() -> None:
    observer, layers = make_observer(("fisher_blocks",))
    observer.masks.dead["a"][0, 1] = True
    set_gradients(layers, 1)
    observer.add_gradients()
    block = observer.stats("a").fisher_blocks[0]
    assert block[1, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert block[[0, 2, 3], 1].tolist() == [0.0, 0.0, 0.0]
    assert float(block[0, 2]) != 0.0
    observer.masks.allow_regrowth()
    observer.reset()
    observer.add_gradients()
    assert float(observer.stats("a").fisher_blocks[0, 0, 1]) != 0.0


def test_movement_counts_the_dead_with_their_last_value_only_if_they_may_grow_again() -> None:
    for regrowth in (False, True):
        observer, layers = make_observer(("movement",))
        masks, weight = observer.masks, layers["a"].weight
        if regrowth:
            masks.allow_regrowth()
        value = float(weight[0, 0].detach())
        dead = torch.zeros_like(weight, dtype=torch.bool)
        dead[0, 0] = True
        masks.set({"a": dead, "b": masks.dead["b"]})
        set_gradients(layers, 1)
        gradient = float(weight.grad[0, 0])
        observer.add_gradients()
        expected = -value * gradient if regrowth else 0.0
        assert float(observer.stats("a").movement[0, 0]) == pytest.approx(expected)


def test_the_fisher_sum_is_allocated_once_and_updated_in_place() -> None:
    observer, layers = make_observer(("fisher_blocks",))
    set_gradients(layers, 1)
    observer.add_gradients()
    address = observer.statistics["a"]["fisher_blocks"].total.data_ptr()
    observer.add_gradients()
    assert observer.statistics["a"]["fisher_blocks"].total.data_ptr() == address


def test_weights_are_cut_into_blocks_and_padded() -> None:
    assert split_into_blocks(torch.arange(6).view(2, 3), 4).tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert split_into_blocks(torch.arange(6).view(2, 3), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def dampened(gram: Tensor) -> Tensor:
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))


def test_padding_is_left_out_where_the_inputs_are_laid_out_like_the_mask() -> None:
    observer, layers = make_observer(("input_norm", "input_gram"))
    x = torch.randn(2, 4, 5)
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with observer.observe_inputs(attention_mask), torch.no_grad():
        layers["a"](x)
        layers["b"](torch.randn(6, 3))  # another layout: all of it counts
    tokens = torch.cat([x[0, :3], x[1, :1]])
    stats = observer.stats("a")
    torch.testing.assert_close(stats.input_norm, tokens.square().mean(0).sqrt())
    torch.testing.assert_close(stats.input_gram, dampened(tokens.T @ tokens / 4), rtol=1e-5, atol=1e-6)
    assert int(observer.statistics["b"]["input_norm"].count) == 6


def test_inputs_are_observed_in_float32_and_only_inside_the_context() -> None:
    observer, layers = make_observer(("input_gram",))
    x = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16), observer.observe_inputs(None):
        layers["a"](x)
    layers["a"](x)
    torch.testing.assert_close(observer.stats("a").input_gram, dampened(x.T @ x / 9), rtol=1e-5, atol=1e-6)
    assert not layers["a"]._forward_pre_hooks


def test_hooks_are_removed_when_a_forward_pass_fails() -> None:
    observer, layers = make_observer(("input_norm",))
    with pytest.raises(RuntimeError), observer.observe_inputs(None):
        layers["a"](torch.randn(2, 7))
    assert not layers["a"]._forward_pre_hooks


def test_learned_statistics_are_not_reset_by_an_event() -> None:
    observer, layers = make_observer(("gradient", "movement"))
    assert observer.is_empty()
    assert observer.stats("a").movement is None
    set_gradients(layers, 1)
    observer.add_gradients()
    assert not observer.is_empty()
    learned = observer.stats("a").movement.clone()
    observer.reset()
    assert observer.is_empty()
    assert torch.equal(observer.stats("a").movement, learned)
    assert not bool(observer.stats("a").gradient.any())


def test_the_penalty_pulls_less_on_a_decided_score() -> None:
    """The penalty's slope is steepest at 0, so that undecided scores fall behind decided ones."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.0]]))
    observer = Observer(Masks({"w": weight}), ("movement_soft",), Prune(penalty=1.0))
    scores = observer.statistics["w"]["movement_soft"].sum()
    scores.copy_(torch.tensor([[0.0, 4.0]]))
    weight.grad = torch.zeros_like(weight)
    observer.add_gradients()
    undecided, settled = scores.flatten().tolist()
    assert 0 > undecided > settled - 4.0 - 1.0
    assert abs(undecided) > 5 * abs(settled - 4.0) > 0


def test_a_resumed_observer_gives_the_same_statistics_to_the_last_bit() -> None:
    def run(stop: int | None) -> list[Tensor]:
        observer, layers = make_observer()
        for step in range(4):
            set_gradients(layers, step)
            observer.add_gradients()
            with observer.observe_inputs(None), torch.no_grad():
                layers["a"](torch.randn(6, 5, generator=torch.Generator().manual_seed(step)))
            if step == stop:
                state = {key: value.clone() for key, value in observer.state_dict().items()}
                observer = Observer(observer.masks, NEEDS, SECTION, layers)
                observer.load_state_dict(state)
        return [getattr(observer.stats(name), need) for name in layers for need in NEEDS]

    expected = run(None)
    for stop in range(3):
        assert all(
            torch.equal(actual, expected_statistic)
            for actual, expected_statistic in zip(run(stop), expected, strict=True)
        ), stop
