"""Training curves: `metrics.jsonl` of each phase as series over the steps of all of them.

Events are `step` (losses, rates, sparsity), `eval` (dev scores, and scores on training rows where
they were taken) and `prune`. A phase that was killed is read from its partial folder, as far as it
has come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spdtool.recipe import PHASES
from spdtool.run.folder import LOG, Run
from spdtool.sweep.rows import teacher_folder

Series = list[tuple[int, float]]
"""`(step of the phase, value)`"""
Event = Mapping[str, object]
"""One line of metrics.jsonl."""
Quantity = Literal["dev", "train", "sparsity", "replacing_rate", "learning_rate"]


@dataclass
class PhaseCurves:
    """The series of one phase, and the step at which it starts on the common axis."""

    name: str
    start: int = 0
    finished: bool = True
    dev: Series = field(default_factory=list)
    train: Series = field(default_factory=list)
    losses: dict[str, Series] = field(default_factory=dict)
    sparsity: Series = field(default_factory=list)
    replacing_rate: Series = field(default_factory=list)
    learning_rate: Series = field(default_factory=list)
    prune_events: list[int] = field(default_factory=list)
    last_step: int = 0

    def add(self, event: Event) -> None:
        """Add one line of the log."""
        step = event.get("step", 0)
        if not isinstance(step, int):  # a line of another version, or of a stranger
            return
        self.last_step = max(self.last_step, step)
        kind = event.get("event")
        if kind == "step":
            for name, value in _mapping(event.get("losses")).items():
                _append(self.losses.setdefault(name, []), step, value)
            _append(self.sparsity, step, event.get("sparsity"))
            _append(self.replacing_rate, step, event.get("replacing_rate"))
            _append(self.learning_rate, step, event.get("learning_rate"))
        elif kind == "eval":
            _append(self.dev, step, _mapping(event.get("metrics")).get("score"))
            _append(self.train, step, _mapping(event.get("train")).get("score"))
        elif kind == "prune":
            self.prune_events.append(step)

    def series(self, quantity: Quantity) -> Series:
        """Return the series of a quantity."""
        series: Series = getattr(self, quantity)
        return series

    def shift(self, series: Series) -> tuple[list[int], list[float]]:
        """Return the steps on the common axis, and the values, of a series that is not empty."""
        steps, values = zip(*series, strict=True)
        return [self.start + step for step in steps], list(values)

    @property
    def grafted(self) -> bool:
        """Whether the teacher's layers stood in at any step: with a replacing rate of 1 they never do."""
        return any(rate < 1 for _, rate in self.replacing_rate)


@dataclass(frozen=True)
class Curves:
    """Phases one after the other."""

    phases: list[PhaseCurves]

    @property
    def grafted(self) -> bool:
        """Whether the teacher's layers stood in during any phase."""
        return any(phase.grafted for phase in self.phases)


def student_curves(run: Run) -> Curves:
    """Return the curves of the student's phases, as far as they have come."""
    return _join((name, *_log_folder(run, name)) for name in PHASES)


def teacher_curves(run: Run) -> Curves:
    """Return the curves of the teacher's training; of a given teacher where its folder still has the log."""
    folder, finished = _log_folder(run, "teacher")
    if finished:  # a given teacher's log is in the run that trained it
        folder = teacher_folder(run)
    return _join([("teacher", folder, finished)])


def _join(folders: Iterable[tuple[str, Path, bool]]) -> Curves:
    phases: list[PhaseCurves] = []
    start = 0
    for name, folder, finished in folders:
        phase = PhaseCurves(name, start, finished)
        for event in _read_events(folder / LOG):
            phase.add(event)
        if phase.last_step or phase.dev:  # a phase of no steps may still be scored
            phases.append(phase)
            start += phase.last_step
    return Curves(phases)


def _log_folder(run: Run, stage: str) -> tuple[Path, bool]:
    """Return the folder of a stage's log, and whether the stage is finished."""
    if run.done(stage):
        return run.path / stage, True
    return run.partial_folder(stage), False


def _read_events(file: Path) -> Iterator[Event]:
    """Yield the events of a log, up to a line that a kill has cut short."""
    if not file.is_file():
        return
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # what follows belongs to no step that was finished
            return
        if isinstance(event, dict):
            yield event


def _mapping(value: object) -> Event:
    return value if isinstance(value, dict) else {}


def _append(series: Series, step: int, value: object) -> None:
    """Append a value, unless the log has none."""
    if isinstance(value, int | float):
        series.append((step, value))
