"""Regression: each row has a number to predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.tokens import Encoded
from spdtool.data.unlabeled import read_unlabeled
from spdtool.errors import ModelError
from spdtool.plugins import task_kinds
from spdtool.recipe.training import Loss
from spdtool.tasks.decision import OneNumber
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


@task_kinds.register("regression")
class Regression(Task):
    """A number for each text or pair of texts."""

    columns = "texts, numbers that are not all whole"
    problem_type = "regression"
    decision = OneNumber

    @property
    def head_labels(self) -> tuple[str, ...]:
        """Name of the only output."""
        return ("score",)

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read texts, whose labels are zeros."""
        return read_unlabeled(file, columns, self.dataset, np.asarray(train.labels))

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return [0]: there is one output."""
        if len(names) != 1:
            raise ModelError(
                f"the model has {len(names)} labels; {self.name!r} is a regression task, which needs one",
                "give a teacher of one output; if the labels are classes: --set regression=false",
            )
        return [0]

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error."""
        from torch.nn import functional as F

        return F.mse_loss(logits.squeeze(-1), labels)

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the mean squared error to the teacher's value, mixed with that to the gold value.

        Args:
            student, teacher: logits [rows, 1].
            labels: gold values [rows].
            loss: `regression_hardness` (1: the teacher alone) is read.
        """
        from torch.nn import functional as F

        value, hardness = student.float().squeeze(-1), loss.regression_hardness
        soft = F.mse_loss(value, teacher.float().squeeze(-1))
        if hardness == 1.0:
            return soft
        return hardness * soft + (1.0 - hardness) * F.mse_loss(value, labels.float())

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return the values, float [rows]."""
        return logits[:, 0]

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score the mean of the labels."""
        labels = np.asarray(rows.labels)
        return self.score_labels(np.full((len(labels), 1), np.mean(labels)), labels)

    def chance_score(self, rows: Rows | Encoded) -> float:
        """Return twice the standard deviation of a correlation of numbers that have nothing to do with each other."""
        return 2 / float(np.sqrt(max(len(rows), 1)))

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return twice which values moved by more than the tolerance: any such move counts as one for the worse."""
        moved = np.abs(self.predictions(after) - self.predictions(before)) > tolerance
        return moved, moved

    def measure_change(self, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """Return the mean change of a value, and the rank correlation of the values before and after."""
        first, second = self.predictions(before), self.predictions(after)
        correlation = 1.0
        if not np.array_equal(first, second):  # constants have no ranks
            correlation = METRICS["spearman"](first, second)
        return {"mean_change": float(np.abs(second - first).mean()), "rank_correlation": correlation}

    def describe_labels(self, splits: Splits) -> str:
        """Describe the range of the training values."""
        values = np.asarray(splits["train"].labels)
        return f"regression, {values.min():g} to {values.max():g}"
