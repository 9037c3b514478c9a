"""What is measured of teacher and student once, at the end: the test score and how sure it is."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from spdtool.run.records.base import Record, Role, Scores

DEV_REPORTS = "the dev rows both picked the checkpoint and report its score"


class Interval(Record):
    """A value and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


class PairedTest(Record):
    """Whether two models differ on the same rows by more than chance.

    Attributes:
        method: McNemar's exact test of the rows that one model alone has right, or a paired
            bootstrap of the score.
        p_value: probability of such a difference, or a larger one, between models that are equally good.
        teacher_only, student_only: rows that one model alone has right; None for a bootstrap.
    """

    method: Literal["mcnemar", "bootstrap"]
    p_value: float
    teacher_only: int | None = None
    student_only: int | None = None

    def describe(self) -> str:
        """Say what was tested, and what came out."""
        if self.method == "bootstrap":
            return f"paired bootstrap: p = {self.p_value:.3g}"
        counts = f"{self.teacher_only} rows only the teacher has right, {self.student_only} only the student"
        return f"McNemar's exact test: p = {self.p_value:.3g} ({counts})"


class FinalScores(Record):
    """Scores of teacher and student on rows by which nothing was chosen.

    Attributes:
        rows: number of `units`. drawn: whether they were taken from the training rows, for want of a file.
        teacher, student: every metric, and `score`.
        teacher_score, student_score: the headline, with its interval; None where rows cannot be
            resampled one by one.
        difference: of the headline, student minus teacher, over the same resamples.
        resamples, confidence: of the intervals. units: what has an answer of its own and was
            resampled, in the plural.
    """

    rows: int
    drawn: bool
    teacher: Scores
    student: Scores
    teacher_score: Interval | None = None
    student_score: Interval | None = None
    difference: Interval | None = None
    test: PairedTest | None = None
    resamples: int
    confidence: float
    units: str = "rows"

    def lines(self) -> list[tuple[str, str]]:
        """Describe the scores as names and texts."""
        source = "taken from the training rows before anything else" if self.drawn else "from a file of their own"
        count = f"{self.rows:,}" if self.units == "rows" else f"{self.rows:,} {self.units}"
        lines = [
            ("test rows", f"{count}, {source}; scored once, at the end"),
            ("teacher, test", str(self.teacher_score or f"{self.teacher['score']:.4f}")),
            ("student, test", str(self.student_score or f"{self.student['score']:.4f}")),
        ]
        if self.difference is not None and self.test is not None:
            interval = f"{self.confidence:.0%} interval of {self.resamples:,} resamples of the {self.units}"
            lines += [("difference", f"{self.difference}; {interval}"), ("is it chance", self.test.describe())]
        return lines


class ReliabilityBin(NamedTuple):
    """Answers whose probability is in one interval: their number, mean probability, and share that is right."""

    answers: int
    confidence: float
    accuracy: float


class Calibration(Record):
    """How far probabilities are from frequencies.

    Attributes:
        answers: number of them: rows, or labels of rows.
        ece: expected calibration error: mean distance of probability and frequency over the bins.
        brier: mean squared error of the probabilities. nll: mean negative log-likelihood.
        bins: those that are not empty, by rising probability.
    """

    answers: int
    ece: float
    brier: float
    nll: float
    bins: list[ReliabilityBin]


class CalibrationPair(Record):
    """Calibration before and after the logits are divided by the temperature that was fitted on dev rows."""

    raw: Calibration
    calibrated: Calibration


class DifferingRow(Record):
    """A dev row on which student and teacher answer differently; probabilities of the answers are None without any."""

    text: str
    pair: str | None = None
    gold: str
    teacher: str
    student: str
    teacher_probability: float | None = None
    student_probability: float | None = None


class Quality(Record):
    """What the export stage measures of teacher and student.

    Attributes:
        final: None without test rows: the dev rows then both picked and report.
        temperatures: by which logits are divided, fitted on dev rows; empty for kinds without probabilities.
        calibration: by split, `dev` or `test`, and by role.
        confusion: of the student on dev rows: gold class, predicted class, and their number of rows.
        differing: the first dev rows on which the two differ. differing_rows: number of all.
        dev_rows: among them.
    """

    final: FinalScores | None = None
    temperatures: dict[Role, float] = Field(default_factory=dict)
    calibration: dict[str, dict[Role, CalibrationPair]] = Field(default_factory=dict)
    confusion: list[tuple[str, str, int]] = Field(default_factory=list)
    differing: list[DifferingRow] = Field(default_factory=list)
    differing_rows: int = 0
    dev_rows: int = 0

    def lines(self) -> list[tuple[str, str]]:
        """Describe the test score as names and texts, or say that there is none."""
        if self.final is None:
            return [("test rows", f"none: {DEV_REPORTS}")]
        return self.final.lines()
