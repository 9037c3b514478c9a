"""Schedules: functions of progress in [0, 1] that give a number (a sparsity, a replacing rate, a learning-rate factor).

They hold no state, so a resumed run needs only its step to be on schedule again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from spdtool.errors import RecipeError, UnknownName
from spdtool.recipe.fields import Recipe

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """`value`, always."""
    return lambda _: value


def linear(start: float, end: float) -> Schedule:
    """A straight line from `start` to `end`."""
    return lambda progress: start + (end - start) * _clamp(progress)


def cubic(start: float, end: float) -> Schedule:
    """Fast first, then slower: `end + (start - end) * (1 - progress)^3` (Zhu & Gupta 2017, arXiv 1710.01878)."""
    return lambda progress: end + (start - end) * (1.0 - _clamp(progress)) ** 3


SHAPES: dict[str, Callable[[float, float], Schedule]] = {"cubic": cubic, "linear": linear}


def prune_events(
    steps: int,
    events: int,
    final: float,
    *,
    initial: float = 0.0,
    first: float | None = None,
    shape: str = "cubic",
    exchanges: int = 0,
    freeze: float = 1.0,
    total: int | None = None,
) -> list[tuple[int, float]]:
    """The exact prune events of a stage: `(step, sparsity)`, both rising up to `final`, which the exchanges repeat.

    Event i of N falls after optimiser step `round(i * steps / N)`, so their number never depends on the batch size
    and the target is always reached. With `first`, event 1 happens before the first step and jumps straight to that
    sparsity; the others climb from there (the oBERT recipe jumps to 0.7, arXiv 2203.07259).

    Args:
        steps: optimiser steps over which the events are spread; at least `events`.
        events: how many there are, at least 1.
        final: sparsity after the last event, in [0, 1).
        initial: sparsity before the first event.
        first: sparsity of the first event, taken at step 0.
        shape: `cubic` or `linear`.
        exchanges: further events at `final`, spread evenly from step `steps` up to `freeze * total`.
        freeze: fraction of the stage after which no event comes.
        total: optimiser steps of the stage; none: `steps`.

    Raises:
        RecipeError: fewer steps than events or exchanges, or a first jump that is not on the way.
    """
    if shape not in SHAPES:
        raise UnknownName("sparsity schedule", shape, SHAPES)
    if events < 1 or steps < events:
        raise RecipeError(
            f"{events} prune events do not fit in {steps} optimiser steps",
            "set prune.events lower, or prune.epochs higher",
        )
    climb, base, jump = events, initial, []
    if first is not None:
        if events < 2 or not initial < first < final:
            raise RecipeError(
                f"a first jump to {first:g} is not on the way from {initial:g} to {final:g} in {events} events",
                "set prune.first between them with at least two events, or leave it out: --set prune.first=none",
            )
        climb, base, jump = events - 1, first, [(0, first)]
    at = SHAPES[shape](base, final)
    ramp = jump + [(round(i * steps / climb), at(i / climb) if i < climb else final) for i in range(1, climb + 1)]
    return ramp + _exchange_events(steps, exchanges, final, round(freeze * (total or steps)))


def _exchange_events(start: int, exchanges: int, final: float, end: int) -> list[tuple[int, float]]:
    if exchanges and end - start < exchanges:
        raise RecipeError(
            f"{exchanges} exchanges do not fit between step {start}, where the ramp ends, and step {end}",
            "set prune.exchanges or prune.ramp lower, or prune.freeze higher",
        )
    return [(start + round(i * (end - start) / exchanges), final) for i in range(1, exchanges + 1)]


def event_schedule(recipe: Recipe, steps: int, *, initial: float = 0.0) -> list[tuple[int, float]]:
    """List the prune events of a stage as `(optimiser step, sparsity)`, with the exchanges at the target.

    Args:
        steps: of the stage.
        initial: sparsity before the first event.

    Raises:
        RecipeError: they do not fit into the stage, or miss a sparsity at which a student is to be saved.
    """
    section = recipe.prune
    events = prune_events(
        max(1, round(section.ramp * steps)),
        section.events,
        recipe.sparsity,
        initial=initial,
        first=_first_jump(recipe, initial),
        shape=section.schedule,
        exchanges=section.exchanges,
        freeze=section.freeze,
        total=steps,
    )
    return passing(events, section.save_at)


def _first_jump(recipe: Recipe, initial: float) -> float | None:
    """Return the sparsity of the first event, or None where the weights are as sparse already or it is the only one."""
    section = recipe.prune
    if section.first is None or section.events == 1:
        return None
    # It may not pass by a sparsity at which a student is to be saved.
    first = min(section.first, section.first_limit * recipe.sparsity, *section.save_at)
    return first if first > initial else None


def passing(events: Sequence[tuple[int, float]], through: Sequence[float]) -> list[tuple[int, float]]:
    """The same events, such that each sparsity of `through` is exactly that of one: of the last at or below it.

    Where several would fall on one event, the others get events of their own, spread evenly up to the next one.

    Args:
        events: `(step, sparsity)`, rising.
        through: sparsities between that of the first event and that of the last.

    Raises:
        RecipeError: a sparsity is not on the way, or there are too few steps for the events between two others.
    """
    sparsities = [sparsity for _, sparsity in events]
    wanted: dict[int, list[float]] = {}
    for sparsity in sorted(set(through)):
        index = bisect.bisect_right(sparsities, sparsity) - 1
        if index < 0 or sparsity >= sparsities[-1]:
            raise RecipeError(
                f"sparsity {sparsity:g} is not on the way of the prune events from {min(sparsities, default=0):g} "
                f"to {max(sparsities, default=0):g}",
                "set prune.save_at to sparsities between them, or have more events: prune.events",
            )
        wanted.setdefault(index, []).append(sparsity)
    passed: list[tuple[int, float]] = []
    for index, (step, sparsity) in enumerate(events):
        stops = wanted.get(index, [sparsity])
        room = events[index + 1][0] - step if len(stops) > 1 else 0
        if len(stops) > 1 and room < len(stops):
            raise RecipeError(
                f"{len(stops)} sparsities to be left at do not fit into {room} optimiser steps from step {step}",
                "leave fewer students with prune.save_at, or set prune.epochs higher",
            )
        passed += [(step + i * room // len(stops), stop) for i, stop in enumerate(stops)]
    return passed


def replacing_rate(
    name: str, *, start: float = 0.8, hold: float = 0.0, base: float | None = None, rise: float = 1.0
) -> Schedule:
    """The replacing rate p over a stage: the probability that a layer of a forward pass is the student's own.

    The published code's four schedules, in fractions of a stage instead of counts of steps
    (BERT-of-Theseus, arXiv 2002.02925; Sparse Progressive Distillation, arXiv 2110.08190):

    - `constant`: `start` throughout.
    - `constant-then-one`: `start` for `hold` of the stage, then 1.
    - `linear`: from `start` to 1 over `rise` of the stage, then 1.
    - `constant-then-linear`: `start` for `hold`, then to 1 over `rise`.
    - `constant-then-linear-with-gap`: `start` for `hold`, then a jump to `base` and from there to 1 over `rise`.

    Args:
        start, base: rates in [0, 1]; `base` defaults to `start`.
        hold, rise: fractions of the stage in [0, 1].
    """
    low = start if base is None else base

    def climb(progress: float, origin: float) -> float:
        return 1.0 if rise <= 0 else min(1.0, origin + (1.0 - origin) * (progress - hold) / rise)

    schedules: dict[str, Schedule] = {
        "constant": lambda _: start,
        "constant-then-one": lambda progress: start if progress < hold else 1.0,
        "linear": lambda progress: 1.0 if rise <= 0 else min(1.0, start + (1.0 - start) * progress / rise),
        "constant-then-linear": lambda progress: start if progress < hold else climb(progress, start),
        "constant-then-linear-with-gap": lambda progress: start if progress < hold else climb(progress, low),
    }
    if name not in schedules:
        raise UnknownName("replacing-rate schedule", name, schedules)
    return schedules[name]


def warmup_then_linear(warmup: float, final: float = 0.0) -> Schedule:
    """Learning-rate factor: 0 to 1 over `warmup` of the stage, then down a straight line to `final`.

    Args:
        warmup: fraction of the stage, in [0, 1).
        final: the factor at the end of the stage.
    """

    def at(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 1.0 + (final - 1.0) * _clamp((progress - warmup) / (1.0 - warmup))

    return at


def rewound(warmup: float, events_at: Sequence[float], low: float, final: float = 0.0) -> Schedule:
    """Learning-rate factor that jumps back to 1 at each prune event (the cycles of arXiv 2203.07259).

    After the warm-up a straight line from 1 to `low` up to the first event and from event to event; after the last
    one down to `final`.

    Args:
        warmup: fraction of the stage, in [0, 1); events in it do not disturb the rise.
        events_at: progress of the events, rising, in (0, 1).
        low: the factor just before an event.
        final: the factor at the end of the stage.
    """
    starts = [warmup, *(at for at in events_at if warmup < at < 1.0)]
    ends = [*starts[1:], 1.0]

    def at(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        cycle = bisect.bisect_right(starts, _clamp(progress)) - 1
        end = final if cycle == len(starts) - 1 else low
        return 1.0 + (end - 1.0) * _clamp((progress - starts[cycle]) / (ends[cycle] - starts[cycle]))

    return at


def _clamp(progress: float) -> float:
    return min(1.0, max(0.0, progress))
