"""Schedules: exact prune events, the four replacing-rate schedules, the learning rate."""

from __future__ import annotations

import itertools

import pytest

from spdtool.errors import RecipeError, UnknownName
from spdtool.training import schedules
from spdtool.training.schedules import cubic, linear, passing, prune_events, replacing_rate, rewound, warmup_then_linear


def test_constant_linear_and_cubic_follow_their_formulas_and_stay_at_their_ends() -> None:
    assert [schedules.constant(0.3)(p) for p in (0, 0.5, 1)] == [0.3, 0.3, 0.3]
    assert [linear(0.2, 0.6)(p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert cubic(0.1, 0.9)(progress) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - progress) ** 3)
    assert cubic(0.1, 0.9)(7.0) == 0.9


@pytest.mark.parametrize("shape", ["cubic", "linear"])
@pytest.mark.parametrize(("steps", "events"), list(itertools.product((12, 13, 100, 367, 11_520), (1, 2, 11, 12))))
@pytest.mark.parametrize("first", [None, 0.7])
def test_there_are_exactly_as_many_events_as_asked_for_and_the_last_is_at_the_target(
    steps: int, events: int, first: float | None, shape: str
) -> None:
    first = first if events > 1 else None  # a jump and the end need two
    made = prune_events(steps, events, 0.9, first=first, shape=shape)
    assert len(made) == events
    at = [step for step, _ in made]
    assert at == sorted(set(at)), "two events fell on one step"
    assert at[-1] == steps
    assert made[-1][1] == 0.9  # exactly: no rounding of a formula
    sparsities = [sparsity for _, sparsity in made]
    assert sparsities == sorted(sparsities)
    if first is not None:
        assert made[0] == (0, 0.7)
    else:
        assert at[0] == round(steps / events)


def test_the_cubic_events_follow_the_published_formula() -> None:
    made = prune_events(120, 12, 0.9)
    for count, (step, sparsity) in enumerate(made, start=1):
        assert step == 10 * count
        assert sparsity == pytest.approx(0.9 + (0.0 - 0.9) * (1 - count / 12) ** 3)


def test_events_climb_from_a_checkpoint_that_is_sparse_already() -> None:
    assert prune_events(10, 2, 0.8, initial=0.5, shape="linear") == [(5, pytest.approx(0.65)), (10, 0.8)]


@pytest.mark.parametrize("first", [0.95, 0.9, 0.3, 0.1])
def test_a_first_jump_that_is_not_on_the_way_is_refused(first: float) -> None:
    with pytest.raises(RecipeError, match="not on the way"):
        prune_events(10, 2, 0.9, initial=0.3, first=first)


def test_sparsity_zero_has_events_that_prune_nothing() -> None:
    assert [sparsity for _, sparsity in prune_events(12, 3, 0.0)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("steps", "events"), [(11, 12), (0, 1), (5, 0)])
def test_events_that_do_not_fit_are_refused(steps: int, events: int) -> None:
    with pytest.raises(RecipeError, match=f"{events} prune events do not fit in {steps}"):
        prune_events(steps, events, 0.9)


def test_an_unknown_shape_offers_near_matches() -> None:
    with pytest.raises(UnknownName) as caught:
        prune_events(10, 2, 0.9, shape="cubik")
    assert caught.value.near == ["cubic"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [  # rates at progress 0, 0.25, 0.5, 0.75 and 1
        ("constant", {"start": 0.8}, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("constant-then-one", {"start": 0.8, "hold": 0.5}, [0.8, 0.8, 1, 1, 1]),
        ("constant-then-one", {"start": 0.8}, [1, 1, 1, 1, 1]),
        ("linear", {"start": 0.6}, [0.6, 0.7, 0.8, 0.9, 1]),
        ("linear", {"start": 0.6, "rise": 0.5}, [0.6, 0.8, 1, 1, 1]),
        ("linear", {"start": 0.6, "rise": 0.0}, [1, 1, 1, 1, 1]),
        ("constant-then-linear", {"start": 0.6, "hold": 0.5, "rise": 0.5}, [0.6, 0.6, 0.6, 0.8, 1]),
        ("constant-then-linear", {"start": 0.6, "hold": 0.5, "rise": 0.0}, [0.6, 0.6, 1, 1, 1]),
        (
            "constant-then-linear-with-gap",
            {"start": 0.8, "hold": 0.5, "base": 0.4, "rise": 0.5},
            [0.8, 0.8, 0.4, 0.7, 1],
        ),
        ("constant-then-linear-with-gap", {"start": 0.6, "hold": 0.5, "rise": 0.5}, [0.6, 0.6, 0.6, 0.8, 1]),
    ],
)
def test_replacing_rates(name: str, options: dict[str, float], expected: list[float]) -> None:
    rate = replacing_rate(name, **options)
    assert [rate(progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected)


def test_an_unknown_replacing_rate_offers_near_matches() -> None:
    with pytest.raises(UnknownName, match="replacing-rate schedule 'liner'") as caught:
        replacing_rate("liner")
    assert "linear" in caught.value.near


@pytest.mark.parametrize(
    ("steps", "events", "exchanges", "freeze", "total"),
    [(70, 7, 3, 0.85, 100), (70, 1, 30, 1.0, 100), (700, 12, 7, 0.853, 999), (10, 2, 0, 0.5, 100)],
)
def test_exchanges_repeat_the_target_evenly_until_the_masks_freeze(
    steps: int, events: int, exchanges: int, freeze: float, total: int
) -> None:
    made = prune_events(steps, events, 0.9, exchanges=exchanges, freeze=freeze, total=total)
    assert made[:events] == prune_events(steps, events, 0.9)
    further = made[events:]
    assert len(further) == exchanges
    assert all(sparsity == 0.9 for _, sparsity in further)
    if exchanges:
        assert further[-1][0] == round(freeze * total)
        at = [step for step, _ in made[events - 1 :]]
        assert all(abs(b - a - (at[-1] - steps) / exchanges) <= 1 for a, b in itertools.pairwise(at))


def test_exchanges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="5 exchanges do not fit between step 80, where the ramp ends, and step 84"):
        prune_events(80, 2, 0.9, exchanges=5, freeze=0.84, total=100)
    with pytest.raises(RecipeError, match="1 exchanges do not fit"):
        prune_events(80, 2, 0.9, exchanges=1)


def test_events_pass_through_sparsities_on_the_way() -> None:
    events = [(0, 0.5), (10, 0.7), (20, 0.8), (30, 0.9), (40, 0.9)]
    assert passing(events, ()) == events
    assert passing(events, (0.85, 0.6)) == [(0, 0.6), (10, 0.7), (20, 0.85), (30, 0.9), (40, 0.9)]
    assert passing(events, (0.7, 0.7)) == events
    assert passing(events, (0.72, 0.75, 0.78)) == [*events[:1], (10, 0.72), (13, 0.75), (16, 0.78), *events[2:]]


@pytest.mark.parametrize(
    ("through", "reason"),
    [
        ((0.4,), "0.4 is not on the way of the prune events from 0.5 to 0.9"),
        ((0.9,), "0.9 is not on the way"),
        ((0.95,), "0.95 is not on the way"),
        ((0.71, 0.72, 0.75), "3 sparsities to be left at do not fit into 2 optimiser steps from step 10"),
    ],
)
def test_sparsities_that_no_event_can_hold_are_refused(through: tuple[float, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        passing([(0, 0.5), (10, 0.7), (12, 0.8), (30, 0.9)], through)
    with pytest.raises(RecipeError, match="not on the way"):
        passing([], (0.5,))


def test_the_learning_rate_jumps_back_at_each_event() -> None:
    at = rewound(0.1, (0.3, 0.5), 0.2, 0.05)
    assert [at(p) for p in (0, 0.05, 0.1, 0.2)] == pytest.approx([0, 0.5, 1, 0.6])
    assert [at(p) for p in (0.3 - 1e-9, 0.3, 0.4, 0.5)] == pytest.approx([0.2, 1, 0.6, 1])
    assert [at(p) for p in (0.5 - 1e-9, 0.75, 1.0)] == pytest.approx([0.2, 0.525, 0.05])


def test_events_within_the_warm_up_do_not_disturb_it() -> None:
    at = rewound(0.2, (0.1, 0.2, 0.6), 0.0)
    assert [at(p) for p in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 1, 0.5, 0])
    without = rewound(0.2, (), 0.5, 0.1)
    plain = warmup_then_linear(0.2, 0.1)
    assert [without(p / 10) for p in range(11)] == pytest.approx([plain(p / 10) for p in range(11)])


def test_the_learning_rate_warms_up_and_then_falls_in_a_straight_line() -> None:
    at = warmup_then_linear(0.2, 0.1)
    assert [at(p) for p in (0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert [warmup_then_linear(0.0)(p) for p in (0, 0.25, 1.0)] == pytest.approx([1, 0.75, 0])
