"""Students on the way to a shape: each is the first that is as fast as asked for."""

from __future__ import annotations

import pytest
import toys

from spdtool.goals.family import place_family
from spdtool.models.structures import find_structures
from spdtool.pruning.search import cost_of_shape
from spdtool.pruning.structure import LayerShape, full_shape, interpolate_shape, shape_sparsity
from spdtool.recipe.reading import build_recipe
from spdtool.run.records import LayerCosts, Ratio, ShapeChoice, ShapeProfile

LAYERS = find_structures(toys.bert(2, intermediate_size=64))
DENSE = full_shape(LAYERS)
TARGET = (LayerShape(1, 32), LayerShape(0, 0))
COSTS = LayerCosts(unit="ms", heads=[0.1, 1.1, 2.1], neurons={0: 0.1, 32: 2.1, 64: 4.1}, outside=0.5)


def choice_of(trial: float | None = None) -> ShapeChoice:
    """Make the record of a choice by fake times, whose random encoder was `trial` times faster."""
    expected = COSTS.of_dense(2) / cost_of_shape(TARGET, COSTS)
    profile = ShapeProfile.model_validate(
        {
            **{"spdtool": "1", "runtime": "onnxruntime", "version": "1", "processor": "a", "threads": 1, "batch": 1},
            **{"length": 64, "family": "bert", "width": 32, "heads": 2, "neurons": 64, "rounds": 6, "costs": COSTS},
        }
    )
    return ShapeChoice(
        key="k",
        goal="3x",
        shape=[(layer.heads, layer.neurons) for layer in TARGET],
        dense=(2, 64),
        table="t",
        profile=profile,
        expected=expected,
        trial=None if trial is None else Ratio(median=trial, low=trial, high=trial),
        bytes=1,
    )


def test_a_member_is_the_first_on_the_way_that_is_fast_enough() -> None:
    choice = choice_of()
    assert choice.expected is not None
    members = place_family([2, 1.5, 2, 99], choice, DENSE, LAYERS)
    assert [member.speedup for member in members] == [1.5, 2]  # the chosen shape is not 99 times as fast
    target = shape_sparsity(LAYERS, TARGET)
    for member in members:
        assert 0 < member.sparsity < target
        # as the pruner reads the event: heads and neurons in proportion to its sparsity
        shape = interpolate_shape(DENSE, TARGET, member.sparsity / target)
        assert COSTS.of_dense(2) / cost_of_shape(shape, COSTS) >= member.speedup, member
        assert member.expected == pytest.approx(COSTS.of_dense(2) / cost_of_shape(shape, COSTS), rel=0.05)
        earlier = interpolate_shape(DENSE, TARGET, 0.97 * member.sparsity / target)
        assert COSTS.of_dense(2) / cost_of_shape(earlier, COSTS) < member.speedup, member


def test_a_table_that_promised_too_much_moves_the_members_on() -> None:
    choice = choice_of()
    assert choice.expected is not None
    slower = place_family([1.5, 2], choice_of(0.8 * choice.expected), DENSE, LAYERS)
    by_table = place_family([1.5, 2], choice, DENSE, LAYERS)
    for member, before in zip(slower, by_table, strict=True):
        assert member.sparsity > before.sparsity


def test_a_family_without_a_larger_speedup_is_refused() -> None:
    for goal, message in (
        ({"goal.family": "2"}, "goal.speedup, which has to be set"),
        ({"goal.family": "2,3", "goal.speedup": 3}, "below goal.speedup"),
        ({"goal.family": "0.5", "goal.speedup": 3}, "above 1"),
        ({"goal.family": "2", "goal.speedup": 3, "goal.kind": "sparse"}, "prune.save_at names sparsities"),
    ):
        with pytest.raises(Exception, match=message):
            build_recipe("default", {"task": "demo"}, [f"{name}={value}" for name, value in goal.items()])
    recipe = build_recipe("default", {"task": "demo"}, ["goal.family=2,3", "goal.speedup=4"])
    assert recipe.goal.family == (2, 3)
