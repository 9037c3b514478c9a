"""Time that remains of a run: the estimate of its plan, corrected by what the run has measured.

Prune events count by themselves: a second-order one may take as long as thousands of optimiser steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 20  # logged intervals whose mean is the speed now: sparse products get faster as the zeros rise
LARGEST_CORRECTION = 10.0  # of the estimates of later stages


@dataclass(frozen=True)
class StageCost:
    """Estimated seconds of a stage.

    Attributes:
        steps: optimiser steps. step_seconds: of one of them.
        events: the optimiser step and the seconds of each prune event.
        other_seconds: of evaluations, exports, timings.
    """

    steps: int = 0
    step_seconds: float = 0.0
    events: tuple[tuple[int, float], ...] = ()
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole stage."""
        return self.steps * self.step_seconds + self.event_seconds + self.other_seconds

    @property
    def event_seconds(self) -> float:
        """Seconds of all prune events."""
        return sum(seconds for _, seconds in self.events)

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimiser step with its share of all else but the prune events."""
        return self.step_seconds + (self.other_seconds / self.steps if self.steps else 0.0)


@dataclass
class StageProgress:
    """What was measured of the running stage.

    Attributes:
        started, last_event: by the clock.
        step: optimiser steps done.
        pruned: seconds of the prune events done now. pruning_seconds: of one that goes on.
        last_event_step: of the last prune event that is over, also in an earlier session.
        intervals: seconds and optimiser steps between the last events, without prune events.
    """

    stage: str
    steps: int
    events: tuple[int, ...]
    started: float
    last_event: float
    step: int = 0
    pruned: dict[int, float] = field(default_factory=dict)
    pruning_seconds: float = 0.0
    last_event_step: int = -1
    is_pruning: bool = False
    intervals: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def measure_step(self) -> float | None:
        """Return the seconds of an optimiser step now, with its share of the evaluations; None before the first."""
        steps = sum(advanced for _, advanced in self.intervals)
        return sum(passed for passed, _ in self.intervals) / steps if steps else None


class Forecast:
    """Seconds that remain of several stages, in their order, as the events of the running one come in.

    Args:
        costs: of the stages to do; empty where nothing was estimated: then only the running stage is forecast.
    """

    def __init__(
        self, costs: Mapping[str, StageCost] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.costs, self.clock = dict(costs or {}), clock
        self.begin("")

    @property
    def covers_all(self) -> bool:
        """Whether later stages are counted too."""
        return bool(self.costs)

    def begin(self, stage: str, steps: int = 0, events: Sequence[int] = ()) -> None:
        """Start a stage.

        Args:
            events: optimiser steps at which it prunes.
        """
        now = self.clock()
        self._running = StageProgress(stage, steps, tuple(events), started=now, last_event=now)

    def observe(self, event: Mapping[str, object]) -> None:
        """Take an event of the running stage: `step`, `eval`, `pruning` (work of a prune event), `prune`, `resume`."""
        running, now = self._running, self.clock()
        passed, running.last_event = now - running.last_event, now
        kind, step, advanced = event.get("event"), event.get("step"), 0
        if isinstance(step, int):
            advanced, running.step = max(0, step - running.step), max(step, running.step)
        if kind == "resume":  # what was done before took no time now
            running.last_event_step = running.step
            return
        if running.is_pruning:
            running.pruning_seconds += passed
        else:  # evaluations and snapshots are spread evenly over the steps, and count with them
            running.intervals.append((passed, advanced))
        running.is_pruning = kind == "pruning"
        if kind == "prune":
            running.pruned[running.step], running.pruning_seconds = running.pruning_seconds, 0.0
            running.last_event_step = running.step

    def seconds_left(self) -> float | None:
        """Return the seconds that remain, or None before anything is known of the running stage."""
        current, names = self._estimate_running(), list(self.costs)
        if current is None:
            return None
        stage = self._running.stage
        later = names[names.index(stage) + 1 :] if stage in names else []
        return current + sum(self._estimate_later(name) for name in later)

    def _estimate_running(self) -> float | None:
        running = self._running
        cost = self.costs.get(running.stage)
        if not running.steps:  # export and bench do not tell how far they are
            return max(0.0, cost.seconds - (self.clock() - running.started)) if cost else None
        step_seconds = running.measure_step()
        if step_seconds is None and cost is not None:
            step_seconds = cost.seconds_per_step
        if step_seconds is None:
            return None
        return (running.steps - running.step) * step_seconds + self._estimate_events(cost)

    def _estimate_events(self, cost: StageCost | None) -> float:
        """Return the seconds of the prune events to come; the first may take far longer than the last."""
        running = self._running
        to_come = [step for step in running.events if step > running.last_event_step]
        estimates = dict(cost.events) if cost is not None else {}
        measured = sum(running.pruned.values())
        estimated = sum(estimates.get(step, 0.0) for step in running.pruned)
        if estimates and (estimated or not running.pruned):
            correction = measured / estimated if estimated else 1.0
            left = correction * sum(estimates.get(step, 0.0) for step in to_come)
        else:
            left = measured / max(len(running.pruned), 1) * len(to_come)
        return max(0.0, left - running.pruning_seconds)

    def _estimate_later(self, stage: str) -> float:
        """Return the estimate of a later stage, corrected as the running one has shown."""
        cost, current, measured = self.costs[stage], self.costs.get(self._running.stage), self._running.measure_step()
        if not cost.steps or current is None or measured is None or not current.seconds_per_step:
            return cost.seconds
        correction = min(max(measured / current.seconds_per_step, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)
        return correction * cost.steps * cost.seconds_per_step + cost.event_seconds


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as `25 min`; no more exact than a forecast is."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under 1 min"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(minutes / 60 / 24)} days"
