"""Schedules: functions of progress in [0, 1] that give a number (a sparsity, a learning-rate factor), and prune events.

They hold no state, so a resumed run needs only its step to be on schedule again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from spdtool.errors import RecipeError
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import SparsityCurve

Schedule = Callable[[float], float]
Events = list[tuple[int, float]]
"""Prune events: `(optimiser step, sparsity)`, both rising."""


def linear(start: float, end: float) -> Schedule:
    """Return a straight line from `start` to `end`."""
    return lambda progress: start + (end - start) * _clamp(progress)


def cubic(start: float, end: float) -> Schedule:
    """Return `end + (start - end) * (1 - progress)^3`: fast first, then slower.

    Zhu & Gupta 2017, arXiv 1710.01878; the sparsity of Sparse Progressive Distillation rises so.
    """
    return lambda progress: end + (start - end) * (1.0 - _clamp(progress)) ** 3


CURVES: dict[SparsityCurve, Callable[[float, float], Schedule]] = {"cubic": cubic, "linear": linear}


def plan_prune_events(recipe: Recipe, steps: int, *, initial: float = 0.0, final: float | None = None) -> Events:
    """Plan the prune events of the prune stage, with the exchanges at the target.

    Args:
        steps: optimiser steps of the stage.
        initial: sparsity before the first event.
        final: sparsity of the shape of a structured student; None: that of the recipe. Zeros inside
            of the shape come after it.

    Raises:
        RecipeError: they do not fit into the stage, or miss a sparsity at which a student is to be
            saved.
    """
    section = recipe.prune
    target = recipe.sparsity if final is None else add_zeros_inside(final, section.zeros)
    events = prune_events(
        max(1, round(section.ramp * steps)),  # the rest of the stage is recovery
        section.events,
        target,
        initial=initial,
        first=_choose_first_jump(recipe, initial),
        curve=section.schedule,
    )
    ramp_end, _ = events[-1]
    events += plan_exchanges(ramp_end, section.exchanges, target, round(section.freeze * steps))
    stops = {*section.save_at}
    if final is not None and initial < final < target and len(events) > 1:
        stops.add(final)  # the whole shape, before the first zero inside of it
    step, sparsity = events[0]
    # the first of few events may lie beyond a student of a family
    if section.is_structured and stops and initial < min(stops) < sparsity:
        events[0] = (step, min(stops))
    return pass_through(events, sorted(stops))


def add_zeros_inside(shape: float, zeros: float) -> float:
    """Return the share of all weights that are zero: a share `shape` of them, and of the others a share `zeros`."""
    return shape + (1 - shape) * zeros


def prune_events(
    steps: int,
    events: int,
    final: float,
    *,
    initial: float = 0.0,
    first: float | None = None,
    curve: SparsityCurve = "cubic",
) -> Events:
    """Compute the exact prune events of a stage, up to the first at `final`.

    Event i of N falls after optimiser step `round(i * steps / N)`, so their number never depends
    on the batch size and the target is always reached. With `first`, event 1 happens before the
    first step and jumps straight to that sparsity; the others climb from there (the oBERT recipe
    jumps to 0.7, arXiv 2203.07259).

    Args:
        steps: optimiser steps over which the events are spread; at least `events`.
        events: their number, at least 1.
        final: sparsity after the last event, in [0, 1).
        initial: sparsity before the first event.
        first: sparsity of the first event, at step 0.
        curve: of the sparsity from event to event.

    Raises:
        RecipeError: fewer steps than events, or a first jump that is not on the way.
    """
    if events < 1 or steps < events:
        raise RecipeError(
            f"{events} prune events do not fit in {steps} optimiser steps",
            "set prune.events lower, or prune.epochs higher",
        )
    climbing, base = events, initial
    planned: Events = []
    if first is not None:
        if events < 2 or not initial < first < final:
            raise RecipeError(
                f"a first jump to {first:g} is not on the way from {initial:g} to {final:g} in {events} events",
                "set prune.first between them with at least two events, or leave it out: --set prune.first=none",
            )
        climbing, base = events - 1, first
        planned.append((0, first))
    sparsity_at = CURVES[curve](base, final)
    for index in range(1, climbing):
        planned.append((round(index * steps / climbing), sparsity_at(index / climbing)))
    planned.append((steps, final))  # exactly: the formula would round
    return planned


def plan_exchanges(start: int, exchanges: int, final: float, end: int) -> Events:
    """Spread further events at the target evenly over the steps from `start` to `end`.

    At these events regrown and pruned weights change places; after `end` the masks are frozen.

    Raises:
        RecipeError: fewer steps than exchanges.
    """
    if exchanges and end - start < exchanges:
        raise RecipeError(
            f"{exchanges} exchanges do not fit between step {start}, where the ramp ends, and step {end}",
            "set prune.exchanges or prune.ramp lower, or prune.freeze higher",
        )
    return [(start + round(index * (end - start) / exchanges), final) for index in range(1, exchanges + 1)]


def _choose_first_jump(recipe: Recipe, initial: float) -> float | None:
    """Return the sparsity of the first event, or None if the weights are as sparse already or it is the only event."""
    section = recipe.prune
    # removed structures are not regained, and each event removes the cheapest: no jump
    if section.first is None or section.events == 1 or section.is_structured:
        return None
    # it may not pass by a sparsity at which a student is to be saved
    first = min(section.first, section.first_limit * recipe.sparsity, *section.save_at)
    return first if first > initial else None


def pass_through(events: Sequence[tuple[int, float]], sparsities: Sequence[float]) -> Events:
    """Change the events such that each of `sparsities` is exactly that of one: of the last event at or below it.

    If several would fall on one event, the others get events of their own, spread evenly up to the
    next one.

    Args:
        events: `(step, sparsity)`, rising.
        sparsities: between that of the first event and that of the last.

    Raises:
        RecipeError: a sparsity is not on the way, or there are too few steps for the events
            between two others.
    """
    stops = _assign_to_events(events, sparsities)
    passed: Events = []
    for index, (step, sparsity) in enumerate(events):
        if index not in stops:
            passed.append((step, sparsity))
            continue
        count = len(stops[index])
        gap = events[index + 1][0] - step
        if count > 1 and gap < count:
            raise RecipeError(
                f"{count} sparsities to save a student at do not fit into {gap} optimiser steps from step {step}",
                "save fewer students with prune.save_at or goal.family, or set prune.epochs higher",
            )
        for position, stop in enumerate(stops[index]):
            passed.append((step + position * gap // count, stop))
    return passed


def _assign_to_events(events: Sequence[tuple[int, float]], sparsities: Sequence[float]) -> dict[int, list[float]]:
    """Return the requested sparsities, rising, by the index of the last event at or below each."""
    planned = [sparsity for _, sparsity in events]
    stops: dict[int, list[float]] = {}  # several may fall on one event
    for sparsity in sorted(set(sparsities)):
        index = bisect.bisect_right(planned, sparsity) - 1
        if index < 0 or sparsity >= planned[-1]:
            raise RecipeError(
                f"sparsity {sparsity:g} is not on the way of the prune events from {min(planned, default=0):g} "
                f"to {max(planned, default=0):g}",
                "set prune.save_at to sparsities between them, or have more events: prune.events",
            )
        stops.setdefault(index, []).append(sparsity)
    return stops


def warmup_then_linear(warmup: float, final: float = 0.0) -> Schedule:
    """Return a learning-rate factor: 0 to 1 over `warmup` of the stage, then down a straight line to `final`.

    Args:
        warmup: fraction of the stage, in [0, 1).
        final: the factor at the end of the stage.
    """

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 1.0 + (final - 1.0) * _clamp((progress - warmup) / (1.0 - warmup))

    return factor


def rewound(warmup: float, events_at: Sequence[float], low: float, final: float = 0.0) -> Schedule:
    """Return a learning-rate factor that jumps back to 1 at each prune event (the cycles of arXiv 2203.07259).

    After the warm-up a straight line from 1 to `low` up to the first event and from event to
    event; after the last one down to `final`.

    Args:
        warmup: fraction of the stage, in [0, 1); events in it do not disturb the rise.
        events_at: progress of the events, rising, in (0, 1).
        low: the factor just before an event.
        final: the factor at the end of the stage.
    """
    starts = [warmup, *(event for event in events_at if warmup < event < 1.0)]
    ends = [*starts[1:], 1.0]

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        cycle = bisect.bisect_right(starts, _clamp(progress)) - 1
        end = final if cycle == len(starts) - 1 else low
        return 1.0 + (end - 1.0) * _clamp((progress - starts[cycle]) / (ends[cycle] - starts[cycle]))

    return factor


def _clamp(progress: float) -> float:
    return min(1.0, max(0.0, progress))
