"""Contents of sweep.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, computed_field

from spdtool.run.records.base import Record


class StudentRow(Record):
    """A student in a comparison of runs: its sparsity, scores and cost. What was not measured is None.

    Attributes:
        run: folder of the run, or of an intermediate student.
        target_sparsity: of the run, for an intermediate student; None for a final one.
        teacher, student: dev scores. teacher_train, student_train: on training rows.
        chance: dev score that the teacher has to be above.
        nonzeros, weights: over all prunable matrices.
        seconds: of the student's phases.
        bytes, speed: of its best exported form. teacher_bytes: of the dense teacher. Only where
            there is a bench.
        error: why the run failed or was stopped.
        students: intermediate students of the run.
    """

    task: str
    recipe: str
    sparsity: float
    seed: int
    run: str
    status: Literal["done", "unfinished", "failed", "stopped"] = "unfinished"  # stopped: by median stopping
    error: str | None = None
    smoke: bool = False
    teacher: float | None = None
    student: float | None = None
    chance: float | None = None
    teacher_train: float | None = None
    student_train: float | None = None
    nonzeros: int | None = None
    weights: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    teacher_bytes: int | None = None
    speed: float | None = None
    target_sparsity: float | None = None
    students: list[StudentRow] = Field(default_factory=list)

    @property
    def label(self) -> str:
        """The recipe as tables name it."""
        if self.target_sparsity is None:
            return self.recipe
        return f"{self.recipe}, on the way to {self.target_sparsity:g}"

    @property
    def has_learned_teacher(self) -> bool:
        """Whether the teacher is better than chance, as far as its record says what that is."""
        # correlations may be negative; a record of an older version does not name chance
        return self.teacher is not None and self.teacher > max(self.chance or 0.0, 0.0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def retention(self) -> float | None:
        """Dev score of the student over that of the teacher; None where the teacher has learned nothing to keep."""
        if self.student is None or self.teacher is None or not self.has_learned_teacher:
            return None
        return self.student / self.teacher

    @computed_field  # type: ignore[prop-decorator]
    @property
    def teacher_gap(self) -> float | None:
        """Train score minus dev score of the teacher: how far it overfits."""
        return difference(self.teacher_train, self.teacher)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def student_gap(self) -> float | None:
        """Train score minus dev score of the student."""
        return difference(self.student_train, self.student)


class SweepRecord(Record):
    """Contents of sweep.json: one row for each trial."""

    spdtool: str
    rows: list[StudentRow]


def difference(minuend: float | None, subtrahend: float | None) -> float | None:
    """`minuend - subtrahend`, or None unless both are known."""
    if minuend is None or subtrahend is None:
        return None
    return minuend - subtrahend
