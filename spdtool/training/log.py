"""The log of a training stage: its events in `metrics.jsonl`, its scores, and the seconds spent in training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from spdtool import ranks
from spdtool.console import OnEvent
from spdtool.run.records import Evaluation, FitResult, IntermediateStudent


class Stopwatch:
    """Measures the seconds of training proper: with snapshots and without evaluations, over all resumptions."""

    def __init__(self) -> None:
        self.earlier_seconds, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds measured up to now."""
        return self.earlier_seconds + time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the seconds spent inside the block."""
        paused = time.monotonic()  # the wall clock may be set meanwhile
        yield
        self._started += time.monotonic() - paused


class LogState(BaseModel):
    """What a snapshot stores of a log.

    Attributes:
        examples: training rows that were seen.
        seconds: of training.
        bytes: size of `metrics.jsonl`, to which it is cut when the stage resumes.
    """

    evaluations: list[Evaluation] = []
    best: Evaluation | None = None
    students: list[IntermediateStudent] = []
    examples: int = 0
    seconds: float = 0.0
    bytes: int = 0


class TrainingLog:
    """Writes the events of a stage, and keeps what its result reports. Only rank 0 writes.

    Args:
        file: `metrics.jsonl`, one event a line.
        on_event: is called with each event, to display it.
    """

    def __init__(self, file: Path, on_event: OnEvent) -> None:
        self.file, self.on_event = file, on_event
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.students: list[IntermediateStudent] = []
        self.examples, self.stopwatch = 0, Stopwatch()

    def write(self, event: str, values: Mapping[str, object]) -> None:
        """Display an event and append it to the file."""
        if not ranks.is_main():
            return
        entry = {"event": event, **values}
        self.on_event(entry)
        # opened for each event: a kill then loses none of those before it
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def write_step(self, step: int, values: Mapping[str, object]) -> None:
        """Write the event of an optimiser step, with the speed up to it."""
        self.write("step", {"step": step, **values, "examples_per_second": self.examples_per_second})

    def write_evaluation(self, evaluation: Evaluation, *, may_be_best: bool) -> bool:
        """Write an evaluation; return whether it is the best one up to now. Of equal scores the earlier is the best."""
        is_best = may_be_best and (self.best is None or evaluation.score > self.best.score)
        if is_best:
            self.best = evaluation
        self.evaluations.append(evaluation)
        self.write("eval", {**evaluation.model_dump(mode="json", exclude_none=True), "best": is_best})
        return is_best

    def write_student(self, student: IntermediateStudent) -> None:
        """Write that a student below the target sparsity was saved."""
        self.students.append(student)
        self.write("student", student.model_dump(mode="json", exclude_none=True))

    @property
    def examples_per_second(self) -> float:
        """Training rows a second, over all resumptions."""
        return self.examples / self.stopwatch.seconds

    def summarise(self, steps: int, epochs: float, *, best: bool) -> FitResult:
        """Sum up the stage.

        Args:
            best: whether the best weights are handed over rather than the last.
        """
        chosen = self.evaluations[-1] if self.evaluations else None
        if best and self.best is not None:
            chosen = self.best
        return FitResult(
            steps=steps,
            epochs=epochs,
            best=chosen,
            evaluations=self.evaluations,
            students=self.students,
            examples_per_second=self.examples_per_second,
        )

    def state_dict(self) -> LogState:
        """Return what is needed to continue the log."""
        return LogState(
            evaluations=self.evaluations,
            best=self.best,
            students=self.students,
            examples=self.examples,
            seconds=self.stopwatch.seconds,
            bytes=self.file.stat().st_size if self.file.exists() else 0,
        )

    def load_state_dict(self, state: LogState) -> None:
        """Restore what `state_dict` returned."""
        self.evaluations, self.best, self.students = state.evaluations, state.best, state.students
        self.examples, self.stopwatch.earlier_seconds = state.examples, state.seconds

    def cut(self, size: int) -> None:
        """Cut the file to `size` bytes: what came after the snapshot will be written again."""
        if size == 0:
            self.file.unlink(missing_ok=True)
            return
        with self.file.open("ab") as stream:
            if stream.tell() > size:  # a shorter one, cut by somebody, would be filled up with zeros
                stream.truncate(size)
