"""The search for a shape, against brute force, with one budget and with two."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from spdtool.errors import RecipeError
from spdtool.pruning.search import (
    cost_of_shape,
    find_shape,
    find_shape_within,
    loss_of_shape,
    smallest_cost,
)
from spdtool.pruning.structure import LayerLosses, LayerShape
from spdtool.run.records import LayerCosts

HEADS, WIDTHS = 2, (0, 32, 64)


def random_losses(generator: random.Random, layers: int = 2) -> list[LayerLosses]:
    """Draw losses that fall with every remaining head and neuron, to 0 for the full layer."""
    losses = []
    for _ in range(layers):
        heads = sorted((generator.random() for _ in range(HEADS)), reverse=True)
        neurons = sorted((generator.random() for _ in WIDTHS[1:]), reverse=True)
        losses.append(LayerLosses(heads=[*heads, 0.0], neurons=dict(zip(WIDTHS, [*neurons, 0.0], strict=True))))
    return losses


def random_costs(generator: random.Random, unit: str = "ms") -> LayerCosts:
    """Draw integer costs that rise with every head and every neuron."""
    heads = sorted(generator.randint(1, 20) for _ in range(HEADS + 1))
    neurons = sorted(generator.randint(1, 30) for _ in WIDTHS)
    return LayerCosts(unit=unit, heads=heads, neurons=dict(zip(WIDTHS, neurons, strict=True)), outside=3)


def every_shape(layers: int = 2) -> list[tuple[LayerShape, ...]]:
    """List all shapes."""
    single = [LayerShape(heads, width) for heads in range(HEADS + 1) for width in WIDTHS]
    return list(itertools.product(single, repeat=layers))


def try_every_shape(losses: Sequence[LayerLosses], costs: Sequence[LayerCosts], budgets: Sequence[float]) -> float:
    """Least loss of all shapes within every budget."""
    within = []
    for shape in every_shape(len(losses)):
        if all(cost_of_shape(shape, cost) <= budget for cost, budget in zip(costs, budgets, strict=True)):
            within.append(loss_of_shape(shape, losses))
    return min(within)


def test_the_shape_found_has_the_least_loss_within_the_budget() -> None:
    generator = random.Random(0)
    for case in range(40):
        losses, costs = random_losses(generator), random_costs(generator)
        smallest, largest = smallest_cost(losses, costs), costs.of_dense(len(losses))
        budget = generator.randint(round(smallest), round(largest))
        shape = find_shape(losses, costs, budget)
        assert cost_of_shape(shape, costs) <= budget, case
        assert loss_of_shape(shape, losses) == pytest.approx(try_every_shape(losses, [costs], [budget])), case


def test_nothing_is_removed_where_the_budget_allows_all() -> None:
    losses, costs = random_losses(random.Random(1)), random_costs(random.Random(1))
    assert find_shape(losses, costs, costs.of_dense(2)) == (LayerShape(HEADS, WIDTHS[-1]),) * 2


def test_a_budget_below_the_smallest_shape_is_refused_with_its_cost() -> None:
    losses, costs = random_losses(random.Random(2)), random_costs(random.Random(2))
    smallest = smallest_cost(losses, costs)
    assert cost_of_shape(find_shape(losses, costs, smallest), costs) == smallest
    with pytest.raises(RecipeError, match=f"the smallest costs {smallest:g} ms"):
        find_shape(losses, costs, smallest - 1)


def test_a_shape_within_two_budgets_is_within_both() -> None:
    generator = random.Random(3)
    solved = 0
    for case in range(40):
        losses = random_losses(generator, layers=3)
        costs = [random_costs(generator), random_costs(generator, "bytes")]
        target = generator.choice(every_shape(3))
        budgets = [cost_of_shape(target, cost) for cost in costs]
        try:
            shape = find_shape_within(losses, costs, budgets)
        except RecipeError:
            continue
        solved += 1
        for cost, budget in zip(costs, budgets, strict=True):
            assert cost_of_shape(shape, cost) <= budget, case
        assert loss_of_shape(shape, losses) >= try_every_shape(losses, costs, budgets) - 1e-12, case
    assert solved >= 30


def test_a_width_between_two_of_the_table_is_interpolated() -> None:
    costs = LayerCosts(unit="ms", heads=[0, 1], neurons={0: 1.0, 64: 2.0, 128: 6.0}, outside=0.5)
    assert [costs.of_width(width) for width in (0, 32, 64, 96, 128)] == [1.0, 1.5, 2.0, 4.0, 6.0]
    assert costs.of_dense(3) == 0.5 + 3 * (1 + 6)


def test_a_deep_encoder_of_many_widths_is_searched() -> None:
    generator = random.Random(4)
    widths = range(0, 3072 + 32, 32)
    losses, layers = [], 12
    for _ in range(layers):
        scale = generator.random()
        heads = [scale * (12 - count) ** 2 for count in range(13)]
        neurons = {width: scale * ((3072 - width) / 256) ** 2 for width in widths}
        losses.append(LayerLosses(heads=heads, neurons=neurons))
    costs = LayerCosts(unit="ms", heads=[0.1 + count for count in range(13)], neurons={0: 0.1, 3072: 24.1}, outside=1.0)
    budget = costs.of_dense(layers) / 3
    shape = find_shape(losses, costs, budget)
    assert 0.995 * budget <= cost_of_shape(shape, costs) <= budget
