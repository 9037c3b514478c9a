"""What a training stage records: scores, evaluations, zeros."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from spdtool.run.records.base import Record, Scores


class ZeroCount(NamedTuple):  # a tuple: stage.json has one for each of hundreds of matrices
    """Zeros of one weight matrix, and how many weights it has in all."""

    zeros: int
    size: int


class Evaluation(Record):
    """Scores after an optimiser step; `train` are those on a sample of training rows, where it is scored."""

    step: int
    metrics: Scores
    train: Scores | None = None

    @property
    def score(self) -> float:
        """Headline dev score."""
        return self.metrics["score"]


class IntermediateStudent(Record):
    """A student saved at a sparsity below the target; `folder` is relative to the prune stage."""

    sparsity: float
    step: int
    folder: str
    dev: Scores
    train: Scores | None = None


class FitResult(Record):
    """What the training loop reports.

    Attributes:
        best: evaluation of the weights that were handed over.
        students: see `prune.save_at`.
    """

    steps: int
    epochs: float
    best: Evaluation | None
    evaluations: list[Evaluation]
    students: list[IntermediateStudent]
    examples_per_second: float


class ClassScores(Record):
    """Scores of one class on the dev set; `rows` of it are gold."""

    precision: float
    recall: float
    f1: float
    rows: int


class TrimmedVocabulary(Record):
    """A vocabulary of which only the tokens were kept that the data needs.

    Attributes:
        tokens: number of tokens; tokens_before: of the teacher's.
        dev_tokens: tokens of all dev rows in the whole vocabulary.
        dev_unknown: unknown tokens among the dev rows; dev_unknown_before: the same in the whole vocabulary.
        dev_rows_changed: dev rows that are cut into other pieces.
    """

    tokens: int
    tokens_before: int
    dev_tokens: int
    dev_unknown: int
    dev_unknown_before: int
    dev_rows_changed: int


class TrainingResult(Record):
    """Result of teacher, prune, distill or finetune.

    Attributes:
        classes: dev scores of each class, by its name; empty where there are none.
        dev: scores of the saved weights. train: the same on a sample of training rows, where it is scored.
        given: source of a teacher that was not trained here.
        chance: highest dev score that a teacher may have without having learned anything.
        fit: None where nothing was trained.
        sparsity: share of zeros over all prunable matrices; zeros: by name of the weight. Of students only.
        shape: heads and neurons that each layer keeps, where they are removed as a whole.
        vocabulary: what of it was kept, where it was trimmed.
    """

    dev: Scores
    train: Scores | None = None
    classes: dict[str, ClassScores] = Field(default_factory=dict)
    given: str | None = None
    chance: float | None = None
    fit: FitResult | None = None
    sparsity: float | None = None
    zeros: dict[str, ZeroCount] = Field(default_factory=dict)
    shape: list[tuple[int, int]] | None = None
    vocabulary: TrimmedVocabulary | None = None

    @property
    def score(self) -> float | None:
        """Headline dev score."""
        return self.dev.get("score")

    @property
    def train_score(self) -> float | None:
        """Headline score on training rows, where it was measured."""
        return None if self.train is None else self.train.get("score")

    @property
    def steps(self) -> int | None:
        """Optimiser steps, where something was trained."""
        return None if self.fit is None else self.fit.steps

    @property
    def students(self) -> list[IntermediateStudent]:
        """Students that were saved on the way to the target sparsity."""
        return [] if self.fit is None else self.fit.students
