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
        events: optimiser steps at which it prunes. event_seconds: of one prune event.
        other_seconds: of evaluations, exports, timings.
    """

    steps: int = 0
    step_seconds: float = 0.0
    events: tuple[int, ...] = ()
    event_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole stage."""
        return self.steps * self.step_seconds + len(self.events) * self.event_seconds + self.other_seconds

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimiser step with its share of all else but the prune events."""
        return self.step_seconds + (self.other_seconds / self.steps if self.steps else 0.0)


@dataclass
class Forecast:
    """Seconds that remain of the stages of `costs`, in their order, as events of the running one come in.

    Attributes:
        costs: of the stages to do; empty where nothing was estimated: then only the running stage is forecast.
    """

    costs: Mapping[str, StageCost] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begin("", 0, ())

    @property
    def covers_all(self) -> bool:
        """Whether later stages are counted too."""
        return bool(self.costs)

    def begin(self, stage: str, steps: int = 0, events: Sequence[int] = ()) -> None:
        """Start a stage.

        Args:
            events: optimiser steps at which it prunes.
        """
        self._begin(stage, steps, events)

    def observe(self, event: Mapping[str, object]) -> None:
        """Take an event of the running stage: `step`, `eval`, `pruning` (work of a prune event), `prune`, `resume`."""
        now, kind, step = self.clock(), event.get("event"), event.get("step")
        passed, self._last = now - self._last, now
        advanced = 0
        if isinstance(step, int):
            advanced, self._step = max(0, step - self._step), max(step, self._step)
        if kind == "resume":  # what was done before took no time now
            return
        if self._is_pruning:
            self._pruning += passed
        else:  # evaluations and snapshots are spread evenly over the steps, and count with them
            self._intervals.append((passed, advanced))
        self._is_pruning = kind == "pruning"
        self._pruned += kind == "prune"

    def seconds_left(self) -> float | None:
        """Return the seconds that remain, or None before anything is known of the running stage."""
        current = self._current_left()
        if current is None:
            return None
        names = list(self.costs)
        later = names[names.index(self._stage) + 1 :] if self._stage in names else []
        return current + sum(self._estimate_later(name) for name in later)

    def _begin(self, stage: str, steps: int, events: Sequence[int]) -> None:
        self._stage, self._steps, self._events = stage, steps, tuple(events)
        self._step, self._pruned, self._pruning = 0, 0, 0.0
        self._is_pruning = False
        self._intervals: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._started = self._last = self.clock()

    def _measure_step(self) -> float | None:
        """Return the seconds of an optimiser step now, with its share of the evaluations; None before the first."""
        steps = sum(advanced for _, advanced in self._intervals)
        return sum(passed for passed, _ in self._intervals) / steps if steps else None

    def _current_left(self) -> float | None:
        elapsed, cost = self.clock() - self._started, self.costs.get(self._stage)
        if not self._steps:  # export and bench do not tell how far they are
            return max(0.0, cost.seconds - elapsed) if cost else None
        step_seconds = self._measure_step()
        if step_seconds is None and cost is not None:
            step_seconds = cost.seconds_per_step
        if step_seconds is None:
            return None
        left = (self._steps - self._step) * step_seconds
        # A resumed stage does not repeat the events of an earlier session.
        events_left = min(len(self._events) - self._pruned, sum(step >= self._step for step in self._events))
        if self._pruned:
            left += events_left * self._pruning / self._pruned
        elif cost is not None:
            left += max(0.0, events_left * cost.event_seconds - self._pruning)
        return left

    def _estimate_later(self, stage: str) -> float:
        """Return the estimate of a later stage, corrected as the running one has shown."""
        cost, current, measured = self.costs[stage], self.costs.get(self._stage), self._measure_step()
        if not cost.steps or current is None or measured is None or not current.seconds_per_step:
            return cost.seconds
        correction = min(max(measured / current.seconds_per_step, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)
        return correction * cost.steps * cost.seconds_per_step + len(cost.events) * cost.event_seconds


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
