"""Removal of heads and neurons, against directly solved least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from spdtool.models.predict import torch_forward
from spdtool.models.structures import FAMILIES, find_structures
from spdtool.pruning.structure import (
    center_gram,
    full_shape,
    observe_grams,
    possible_widths,
    removal_losses,
    remove_structures,
)
from spdtool.recipe.training import Prune
from tests import toys


def problem(outputs: int = 5, inputs: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a weight [outputs, inputs] and the second moment of its inputs [inputs, inputs], in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, inputs, generator=generator, dtype=torch.float64)
    rows @= torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), rows.T @ rows / len(rows)


def solve_directly(weight: Tensor, gram: Tensor, alive: Tensor) -> tuple[Tensor, float]:
    """Solve the normal equations for the columns `alive`; return the weights and half the squared error."""
    best = torch.zeros_like(weight)
    best[:, alive] = torch.linalg.solve(gram[alive][:, alive], (weight @ gram)[:, alive].T).T
    error = weight - best
    return best, float(torch.trace(error @ gram @ error.T)) / 2


def remove_slowly(weight: Tensor, gram: Tensor, size: int, count: int) -> tuple[list[int], list[float], Tensor]:
    """Greedy removal as plain code: try each structure, solve, remove the cheapest."""
    structures = weight.shape[1] // size
    order: list[int] = []
    losses = [0.0]
    best = weight
    for _ in range(count):
        trials = {}
        for structure in set(range(structures)) - set(order):
            removed = torch.zeros(structures, dtype=torch.bool)
            removed[[*order, structure]] = True
            trials[structure] = solve_directly(weight, gram, ~removed.repeat_interleave(size))
        cheapest = min(trials, key=lambda structure: trials[structure][1])
        order.append(cheapest)
        best, loss = trials[cheapest]
        losses.append(loss)
    return order, losses, best


def test_greedy_removal_equals_least_squares_solved_anew_for_every_choice() -> None:
    for size, count in ((1, 0), (1, 5), (1, 12), (3, 1), (3, 3), (3, 4)):
        weight, gram = problem()
        removal = remove_structures(weight, gram, size, count)
        order, losses, best = remove_slowly(weight, gram, size, count)
        message = f"{count} structures of {size} columns"
        assert removal.order == order, message
        torch.testing.assert_close(
            torch.tensor(removal.losses), torch.tensor(losses), rtol=1e-6, atol=1e-6, msg=message
        )
        torch.testing.assert_close(removal.weight, best, rtol=0, atol=1e-6, msg=message)
        dead = torch.zeros(12 // size, dtype=torch.bool)
        dead[order] = True
        assert torch.equal((removal.weight == 0).all(0), dead.repeat_interleave(size)), message


def test_a_bias_takes_over_the_mean_of_what_is_removed() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 12, generator=generator, dtype=torch.float64) + torch.linspace(-2, 3, 12)
    gram, mean = inputs.T @ inputs / 40, inputs.mean(0)
    removal = remove_structures(weight, center_gram(gram, mean), 1, 7)
    bias = (weight - removal.weight) @ mean
    alive = torch.ones(13, dtype=torch.bool)
    alive[removal.order] = False
    # least squares on the inputs and a column of ones
    extended = torch.cat([inputs, torch.ones(40, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(extended[:, alive], inputs @ weight.T).solution.T
    torch.testing.assert_close(removal.weight[:, alive[:12]], solution[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(bias, solution[:, -1], rtol=0, atol=1e-6)
    error = inputs @ weight.T - inputs @ removal.weight.T - bias
    assert abs(removal.losses[-1] - float(error.square().sum()) / 40 / 2) < 1e-6


def test_removal_in_groups_ends_at_the_least_squares_solution() -> None:
    weight, gram = problem()
    removal = remove_structures(weight, gram, 1, 7, group=3)
    alive = torch.ones(12, dtype=torch.bool)
    alive[removal.order] = False
    best, loss = solve_directly(weight, gram, alive)
    torch.testing.assert_close(removal.weight, best, rtol=0, atol=1e-6)
    assert len(removal.losses) == 8
    assert abs(removal.losses[-1] - loss) < 1e-6


def test_removal_in_two_events_equals_removal_in_one() -> None:
    weight, gram = problem()
    single_removal = remove_structures(weight, gram, 3, 3)
    first = remove_structures(weight, gram, 3, 1)
    alive = torch.ones(4, dtype=torch.bool)
    alive[first.order] = False
    second = remove_structures(first.weight, gram, 3, 2, alive)
    assert first.order + second.order == single_removal.order
    torch.testing.assert_close(second.weight, single_removal.weight, rtol=0, atol=1e-6)


def test_every_family_has_losses_for_each_number_of_heads_and_each_width() -> None:
    for family in FAMILIES:
        model = toys.classifier(family, layers=2)
        layers = find_structures(model)
        assert [(shape.heads, shape.neurons) for shape in full_shape(layers)] == [(2, 64)] * 2, family
        batches = [toys.batch(architecture=family, seed=seed) for seed in range(2)]
        for batch in batches:
            del batch["labels"]
        grams = observe_grams(layers, torch_forward(model, "cpu"), batches, Prune())
        for losses in removal_losses(layers, grams):
            assert len(losses.heads) == 3, family
            assert losses.heads == sorted(losses.heads, reverse=True), family
            assert list(losses.neurons) == [0, 32, 64], family
            assert losses.heads[2] == losses.neurons[64] == 0 < losses.neurons[32] < losses.neurons[0], family


def test_widths_are_multiples_of_32_and_all_neurons() -> None:
    assert possible_widths(64) == [0, 32, 64]
    assert possible_widths(100) == [0, 32, 64, 96, 100]
