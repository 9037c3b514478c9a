"""The course of a training: what `metrics.jsonl` of each phase says, as series over the steps of all of them.

Events are `step` (losses, rates, sparsity), `eval` (dev scores, and scores on training rows where they were taken) and
`prune`. A phase that was killed is read from its partial folder, as far as it has come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spdtool.recipe import PHASES
from spdtool.run.folder import LOG, Run
from spdtool.sweep.rows import teacher_folder

Line = list[tuple[int, float]]
"""`(step of the phase, value)`"""


@dataclass
class Phase:
    """One phase: where it starts on the common axis, and its series."""

    name: str
    start: int = 0
    finished: bool = True
    dev: Line = field(default_factory=list)
    train: Line = field(default_factory=list)
    losses: dict[str, Line] = field(default_factory=dict)
    sparsity: Line = field(default_factory=list)
    replacing_rate: Line = field(default_factory=list)
    learning_rate: Line = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    last: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """Add what one line of the log says."""
        step = event.get("step", 0)
        self.last = max(self.last, step)
        if event.get("event") == "step":
            for name, value in event.get("losses", {}).items():
                self.losses.setdefault(name, []).append((step, value))
            for name in ("sparsity", "replacing_rate", "learning_rate"):
                _add(getattr(self, name), step, event.get(name))
        elif event.get("event") == "eval":
            _add(self.dev, step, (event.get("metrics") or {}).get("score"))
            _add(self.train, step, (event.get("train") or {}).get("score"))
        elif event.get("event") == "prune":
            self.events.append(step)


@dataclass(frozen=True)
class Curves:
    """Phases one after the other."""

    phases: Sequence[Phase]

    @property
    def gaps(self) -> list[tuple[str, int, float, float]]:
        """`(phase, step, train, dev)` wherever both were scored."""
        return [
            (phase.name, step, value, dict(phase.dev)[step])
            for phase in self.phases
            for step, value in phase.train
            if step in dict(phase.dev)
        ]


def student_curves(run: Run) -> Curves:
    """The student's phases, as far as they have come."""
    return _course((name, *_folder(run, name)) for name in PHASES)


def teacher_curves(run: Run) -> Curves:
    """The teacher's training; that of a given teacher where its folder still holds it."""
    folder, finished = _folder(run, "teacher")
    if run.done("teacher"):
        folder = teacher_folder(run)
    return _course([("teacher", folder, finished)])


def _course(folders: Any) -> Curves:
    phases: list[Phase] = []
    start = 0
    for name, folder, finished in folders:
        phase = Phase(name, start, finished)
        for event in _events(folder / LOG):
            phase.take(event)
        if phase.last or phase.dev:
            phases.append(phase)
            start += phase.last
    return Curves(phases)


def _folder(run: Run, stage: str) -> tuple[Path, bool]:
    return (run.path / stage, True) if run.done(stage) else (run.partial_folder(stage), False)


def _events(file: Path) -> Iterator[dict[str, Any]]:
    """The events of a log; a line that a kill has cut short ends it."""
    if not file.is_file():
        return
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            return
        if isinstance(event, dict):
            yield event


def _add(line: Line, step: int, value: Any) -> None:
    if isinstance(value, int | float):
        line.append((step, value))
