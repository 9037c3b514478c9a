"""Schedules: exact prune events, and the learning rate."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import get_args

import pytest

from spdtool.errors import RecipeError
from spdtool.recipe.training import SparsityCurve
from spdtool.training.schedules import (
    CURVES,
    cubic,
    linear,
    pass_through,
    plan_exchanges,
    plan_prune_events,
    prune_events,
    rewound,
    warmup_then_linear,
)


def test_linear_and_cubic_follow_their_formulas_and_stay_at_their_ends() -> None:
    assert [linear(0.2, 0.6)(p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert cubic(0.1, 0.9)(progress) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - progress) ** 3)
    assert cubic(0.1, 0.9)(7.0) == 0.9


def test_there_are_exactly_as_many_events_as_requested_and_the_last_is_at_the_target() -> None:
    grid = itertools.product((12, 13, 100, 367, 11_520), (1, 2, 11, 12), (None, 0.7), ("cubic", "linear"))
    for steps, events, first, curve in grid:
        if events == 1 and first is not None:
            continue  # a jump and the end need two
        case = f"{events} events in {steps} steps, first {first}, {curve}"
        planned = prune_events(steps, events, 0.9, first=first, curve=curve)
        event_steps = [step for step, _ in planned]
        sparsities = [sparsity for _, sparsity in planned]
        assert len(planned) == events, case
        assert event_steps == sorted(set(event_steps)), f"two events fell on one step: {case}"
        assert planned[-1] == (steps, 0.9), f"not exactly the target: {case}"
        assert sparsities == sorted(sparsities), case
        assert planned[0] == (0, 0.7) if first is not None else event_steps[0] == round(steps / events), case


def test_the_cubic_events_follow_the_published_formula() -> None:
    planned = prune_events(120, 12, 0.9)
    for count, (step, sparsity) in enumerate(planned, start=1):
        assert step == 10 * count
        assert sparsity == pytest.approx(0.9 + (0.0 - 0.9) * (1 - count / 12) ** 3)


def test_events_climb_from_a_checkpoint_that_is_sparse_already() -> None:
    assert prune_events(10, 2, 0.8, initial=0.5, curve="linear") == [(5, pytest.approx(0.65)), (10, 0.8)]


def test_a_first_jump_that_is_not_on_the_way_is_refused() -> None:
    for first in (0.95, 0.9, 0.3, 0.1):
        with pytest.raises(RecipeError, match="not on the way"):
            prune_events(10, 2, 0.9, initial=0.3, first=first)


def test_sparsity_zero_has_events_that_prune_nothing() -> None:
    assert [sparsity for _, sparsity in prune_events(12, 3, 0.0)] == [0.0, 0.0, 0.0]


def test_events_that_do_not_fit_are_refused() -> None:
    for steps, events in ((11, 12), (0, 1), (5, 0)):
        with pytest.raises(RecipeError, match=f"{events} prune events do not fit in {steps}"):
            prune_events(steps, events, 0.9)


def test_the_recipe_offers_every_curve_of_the_sparsity() -> None:
    assert CURVES.keys() == set(get_args(SparsityCurve))


def test_exchanges_repeat_the_target_evenly_until_the_masks_freeze(toys: ModuleType) -> None:
    cases = [(70, 7, 3, 0.85, 100), (70, 1, 30, 1.0, 100), (700, 12, 7, 0.853, 999), (10, 2, 0, 0.5, 100)]
    for case in cases:
        steps, events, exchanges, freeze, total = case
        sections = [
            f"prune.events={events}",
            f"prune.exchanges={exchanges}",
            f"prune.freeze={freeze}",
            "prune.first=none",
        ]
        recipe = toys.recipe(*sections, f"prune.ramp={steps / total}", "prune.regrowth=true", sparsity=0.9)
        planned = plan_prune_events(recipe, total)
        assert planned[:events] == prune_events(steps, events, 0.9), case
        assert len(planned[events:]) == exchanges, case
        assert all(sparsity == 0.9 for _, sparsity in planned[events:]), case
        if exchanges:
            assert planned[-1][0] == round(freeze * total), case
            event_steps = [step for step, _ in planned[events - 1 :]]
            mean_gap = (event_steps[-1] - steps) / exchanges
            assert all(abs(b - a - mean_gap) <= 1 for a, b in itertools.pairwise(event_steps)), case


def test_exchanges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="5 exchanges do not fit between step 80, where the ramp ends, and step 84"):
        plan_exchanges(80, 5, 0.9, 84)
    with pytest.raises(RecipeError, match="1 exchanges do not fit"):
        plan_exchanges(80, 1, 0.9, 80)


def test_events_pass_through_sparsities_on_the_way() -> None:
    events = [(0, 0.5), (10, 0.7), (20, 0.8), (30, 0.9), (40, 0.9)]
    assert pass_through(events, ()) == events
    assert pass_through(events, (0.85, 0.6)) == [(0, 0.6), (10, 0.7), (20, 0.85), (30, 0.9), (40, 0.9)]
    assert pass_through(events, (0.7, 0.7)) == events
    assert pass_through(events, (0.72, 0.75, 0.78)) == [*events[:1], (10, 0.72), (13, 0.75), (16, 0.78), *events[2:]]


def test_sparsities_that_no_event_can_have_are_refused() -> None:
    cases = [
        ((0.4,), "0.4 is not on the way of the prune events from 0.5 to 0.9"),
        ((0.9,), "0.9 is not on the way"),
        ((0.95,), "0.95 is not on the way"),
        ((0.71, 0.72, 0.75), "3 sparsities to save a student at do not fit into 2 optimiser steps from step 10"),
    ]
    for sparsities, reason in cases:
        with pytest.raises(RecipeError, match=reason):
            pass_through([(0, 0.5), (10, 0.7), (12, 0.8), (30, 0.9)], sparsities)
    with pytest.raises(RecipeError, match="not on the way"):
        pass_through([], (0.5,))


def test_the_learning_rate_jumps_back_at_each_event() -> None:
    factor = rewound(0.1, (0.3, 0.5), 0.2, 0.05)
    assert [factor(p) for p in (0, 0.05, 0.1, 0.2)] == pytest.approx([0, 0.5, 1, 0.6])
    assert [factor(p) for p in (0.3 - 1e-9, 0.3, 0.4, 0.5)] == pytest.approx([0.2, 1, 0.6, 1])
    assert [factor(p) for p in (0.5 - 1e-9, 0.75, 1.0)] == pytest.approx([0.2, 0.525, 0.05])


def test_events_within_the_warm_up_do_not_disturb_it() -> None:
    factor = rewound(0.2, (0.1, 0.2, 0.6), 0.0)
    assert [factor(p) for p in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 1, 0.5, 0])
    without = rewound(0.2, (), 0.5, 0.1)
    plain = warmup_then_linear(0.2, 0.1)
    assert [without(p / 10) for p in range(11)] == pytest.approx([plain(p / 10) for p in range(11)])


def test_the_learning_rate_warms_up_and_then_falls_in_a_straight_line() -> None:
    factor = warmup_then_linear(0.2, 0.1)
    assert [factor(p) for p in (0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert [warmup_then_linear(0.0)(p) for p in (0, 0.25, 1.0)] == pytest.approx([1, 0.75, 0])
