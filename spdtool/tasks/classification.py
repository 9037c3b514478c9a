"""Single-label classification: each row has exactly one of the classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.kinds.label_sets import find_joined_classes
from spdtool.data.overview import contradicting_rows, list_names
from spdtool.data.tokens import Encoded
from spdtool.data.unlabeled import read_unlabeled
from spdtool.errors import DataError
from spdtool.plugins import task_kinds
from spdtool.recipe.training import Loss
from spdtool.run.records import ClassScores
from spdtool.tasks.decision import Answer, Json
from spdtool.tasks.named_labels import NamedLabels, compose_accents, soften
from spdtool.tasks.scores.calibration import Confidences, class_confidences, class_probabilities, fit_temperature
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.task import ProblemType

if TYPE_CHECKING:
    from torch import Tensor

SPELT_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?\s*%|[+-]?\d+(,\d+)+(\.\d+)?", re.ASCII)  # 50 %, 0,5 or 1,000.5
LEAST_ROWS = 20  # of a training set in which a class of one row is worth a word
MISSING = {"", "?", "na", "n/a", "nan", "none", "null", "nil", "-"}  # what tables hold where a value is missing


@task_kinds.register("classification")
class Classification(NamedLabels):
    """One of several classes for each text or pair of texts.

    Attributes:
        temperature: by which logits are divided before they become probabilities.
    """

    columns = "texts, labels"
    problem_type: ProblemType | None = "single_label_classification"
    temperature = 1.0

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read texts, whose labels are zeros."""
        return read_unlabeled(file, columns, self.dataset, np.asarray(train.labels))

    def check_training_rows(self, rows: Rows) -> None:
        """Raise DataError if all rows have one class."""
        first = rows.labels[0]
        if all(label == first for label in rows.labels):  # stops at the second class
            only_class = self.dataset.labels[int(first)]
            raise DataError(
                f"every training row of {self.name!r} has the label {only_class!r}", "two classes are the least"
            )

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Return the rows with class indices in the order of a model's label names, by which scores then go too."""
        order = self.label_order(names)
        if len(order) == 2:  # the positive class is the data set's second, wherever the model has it
            self.positive = order[1]
        if order == list(range(len(order))):
            return splits  # untouched: labels in shards stay on the disk
        index = np.array(order)
        return {name: replace(rows, labels=index[np.asarray(rows.labels, np.int64)]) for name, rows in splits.items()}

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, averaged over rows."""
        from torch.nn import functional as F

        return F.cross_entropy(logits, labels)

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the divergence of the softened distributions, times T squared, mixed with the gold labels.

        Hinton et al. 2015, arXiv 1503.02531. With `per_label` it is the form of the published code: cross-entropy
        averaged over labels as well, without the square of the temperature.

        Args:
            student, teacher: logits [rows, labels].
            labels: class indices [rows].
            loss: `temperature`, `hardness` (1: the teacher alone) and `per_label` are read.
        """
        from torch.nn import functional as F

        softened, target = soften(student, teacher, loss.temperature)
        if loss.per_label:
            soft = -(target * softened).mean()
        else:
            # T squared keeps the gradient's size: it shrinks by 1 / T^2 when both sides are softened.
            soft = F.kl_div(softened, target, reduction="batchmean") * loss.temperature**2
        if loss.hardness == 1.0:
            return soft
        return loss.hardness * soft + (1.0 - loss.hardness) * F.cross_entropy(student.float(), labels)

    def measure(self, metric: str, gold: np.ndarray, predicted: np.ndarray) -> float:
        """Return one metric of class indices; `f1` is of the class that is positive in the data set."""
        if metric == "f1":
            is_positive = (gold == self.positive).astype(int)
            return METRICS[metric](is_positive, (predicted == self.positive).astype(int))
        return super().measure(metric, gold, predicted)

    def score_classes(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> dict[str, ClassScores]:
        """Score each class by itself: precision, recall and their harmonic mean."""
        predicted, labels = self.predictions(outputs), rows.labels
        scores = {}
        for index, name in enumerate(names):
            right = int(((predicted == index) & (labels == index)).sum())
            claimed, gold = int((predicted == index).sum()), int((labels == index).sum())
            scores[name] = ClassScores(
                precision=right / max(claimed, 1),
                recall=right / max(gold, 1),
                f1=2 * right / max(claimed + gold, 1),
                rows=gold,
            )
        return scores

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score the majority class of the rows."""
        labels = np.asarray(rows.labels)
        logits = np.zeros((len(labels), len(self.dataset.labels)))
        logits[:, np.bincount(labels).argmax()] = 1
        return self.score_labels(logits, labels)

    def right_rows(self, outputs: np.ndarray, rows: Encoded) -> np.ndarray | None:
        """Tell which rows have the right class."""
        right: np.ndarray = self.predictions(outputs) == rows.labels
        return right

    def confusion(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[tuple[str, str, int]]:
        """Count rows by gold and predicted class, the right ones too."""
        counts = np.zeros((len(names), len(names)), np.int64)
        np.add.at(counts, (rows.labels, self.predictions(outputs)), 1)
        cells = []
        for gold, predicted in zip(*np.nonzero(counts), strict=True):
            cells.append((names[gold], names[predicted], int(counts[gold, predicted])))
        return cells

    def confidences(self, outputs: np.ndarray, rows: Encoded, temperature: float) -> Confidences | None:
        """Return the probability of each row's class."""
        return class_confidences(outputs, rows.labels, temperature)

    def gold_answers(self, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the name of each row's class."""
        return [names[index] for index in rows.labels.tolist()]

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return the temperature under which these rows are the likeliest."""

        def nll(temperature: float) -> float:
            confidences = self.confidences(outputs, rows, temperature)
            assert confidences is not None
            return confidences.nll

        return {"temperature": fit_temperature(nll)}

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Give probabilities at this temperature from now on."""
        self.temperature = float(str(settings.get("temperature", 1.0)))

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which classes changed, and which of these were right before."""
        classes_before = self.predictions(before)
        changed = classes_before != self.predictions(after)
        return changed, changed & (classes_before == rows.labels)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the softmax of the logits, at the temperature of the settings."""
        return class_probabilities(outputs, self.temperature)

    def describe_labels(self, splits: Splits) -> str:
        """Count the rows of each class, and score the majority class of the dev rows."""
        lists = {}
        for split, counts in self.count_classes(splits).items():
            lists[split] = list_names([f"{name} {count:,}" for name, count in counts.items()])
        baseline = self.baseline(splits["dev"])["score"]
        classes = f"{len(self.dataset.labels)} classes: {lists['train']}; dev: {lists['dev']}"
        return f"{classes}; always the commonest: dev score {baseline:.4f}"

    def count_classes(self, splits: Splits) -> dict[str, dict[str, int]]:
        """Count the rows of each class by split."""
        labels, by_split = self.dataset.labels, {}
        for split, rows in splits.items():
            counts = np.bincount(np.asarray(rows.labels, np.int64), minlength=len(labels)).tolist()
            by_split[split] = dict(zip(labels, counts, strict=True))
        return by_split

    def data_warnings(self, splits: Splits) -> list[str]:
        """Name dev texts that were trained on, contradictory rows, classes of few rows, and odd names of classes."""
        lines = super().data_warnings(splits) + contradicting_rows(splits["train"])
        counts_by_split = self.count_classes(splits)
        single = [repr(name) for name, count in counts_by_split["train"].items() if count == 1]
        if single and len(splits["train"]) >= LEAST_ROWS:
            lines.append(f"{len(single):,} of the labels have one training row each: {list_names(single)}")
        for split, counts in counts_by_split.items():
            absent = [repr(name) for name, count in counts.items() if not count]
            if absent and split in ("train", "dev", "test"):
                lines.append(f"no row of {split} has the label {list_names(absent)}")
        return lines + self._label_name_warnings()

    def _label_name_warnings(self) -> list[str]:
        lines = []
        spellings = defaultdict(list)
        for name in self.dataset.labels:
            spellings[compose_accents(name.strip().casefold())].append(repr(name))
        for names in spellings.values():
            if len(names) > 1:
                alike = list_names(names)
                lines.append(f"the labels {alike} differ by case, spaces or Unicode form only, and are kept apart")
        numbers = [repr(name) for name in self.dataset.labels if SPELT_NUMBER.fullmatch(name.strip())]
        if 2 * len(numbers) > len(self.dataset.labels):
            lines.append(f"the labels {list_names(numbers)} look like numbers and are taken for classes: write 0.5")
        joined = find_joined_classes(self.dataset.labels)
        if joined is not None:
            lines.append(f"the class {joined!r} looks like several labels: if it is, --set multilabel=true")
        missing = [repr(name) for name in self.dataset.labels if name.strip().casefold() in MISSING]
        if missing:
            lines.append(f"the label {list_names(missing)} is taken for a class: does it stand for a missing value?")
        return lines
