"""Multi-label classification: each row has any number of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data import dataset as datasets
from spdtool.data.dataset import Rows, Splits
from spdtool.data.overview import list_names
from spdtool.data.tokens import Encoded
from spdtool.errors import DataError
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.run.records import ClassScores
from spdtool.tasks.classification import Classification
from spdtool.tasks.decision import Answer, Json, SeveralLabels
from spdtool.tasks.scores.calibration import Confidences, best_thresholds, label_confidences, label_probabilities
from spdtool.tasks.scores.metrics import f1_of_label_sets, f1_of_labels, mean_average_precision

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


MOST_COMMON = 20  # labels that a fixed answer may have


@task_kinds.register("multilabel")
class Multilabel(Classification):
    """Any number of labels for each text or pair of texts.

    The labels of a split are 0 or 1, [rows, labels].

    Attributes:
        thresholds: logits above which a row has a label, in the order of the model's labels; None: rows are scored by
            the best ones for these rows, which is what the export will choose on the dev rows.
    """

    columns = "texts, lists of labels; or numbers of a labels.txt"
    problem_type = "multi_label_classification"
    decision = SeveralLabels
    thresholds: np.ndarray | None = None

    def check_training_rows(self, rows: Rows) -> None:
        """Raise DataError if all rows have the same labels."""
        labels = np.asarray(rows.labels)
        if (labels == labels[0]).all():
            raise DataError(
                f"every training row of {self.name!r} has the same labels", "two different rows are the least"
            )

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split; a batch has float32 labels, as binary cross-entropy needs them."""
        encoded = super().encode(tokenizer, splits, recipe)
        return {name: replace(rows, labels=rows.labels.astype(np.float32)) for name, rows in encoded.items()}

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Return the rows with a column of labels for each of a model's label names, in that order."""
        columns = np.argsort(self.label_order(names))
        return {name: replace(rows, labels=self._label_columns(rows)[:, columns]) for name, rows in splits.items()}

    def _label_columns(self, rows: Rows) -> np.ndarray:
        """Return the labels of the rows with a column for every label, also for those that only a model has."""
        labels = np.asarray(rows.labels)
        return np.pad(labels, ((0, 0), (0, len(self.dataset.labels) - labels.shape[1])))

    # Losses

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy, averaged over rows and labels."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits, labels.float())

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the divergence of each label's softened probability, summed over labels, times T squared.

        It is mixed with the gold labels. With `per_label` it is averaged over labels, without the square.

        Args:
            student, teacher: logits [rows, labels].
            labels: 0 or 1 [rows, labels].
            loss: `temperature`, `hardness` (1: the teacher alone) and `per_label` are read.
        """
        import torch
        from torch.nn import functional as F

        scaled_student, scaled_teacher = student.float() / loss.temperature, teacher.float() / loss.temperature
        target = torch.sigmoid(scaled_teacher)
        entropy = F.binary_cross_entropy_with_logits(scaled_teacher, target, reduction="none")
        divergence = F.binary_cross_entropy_with_logits(scaled_student, target, reduction="none") - entropy
        gold = F.binary_cross_entropy_with_logits(student.float(), labels.float(), reduction="none")
        if loss.per_label:
            soft, gold_mean = divergence.mean(), gold.mean()
        else:
            soft, gold_mean = divergence.sum(-1).mean() * loss.temperature**2, gold.sum(-1).mean()
        if loss.hardness == 1.0:
            return soft
        return loss.hardness * soft + (1.0 - loss.hardness) * gold_mean

    # Predictions and scores

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return which labels each row has, bool [rows, labels]."""
        return np.asarray(logits > (0.0 if self.thresholds is None else self.thresholds))

    def _answer(self, logits: np.ndarray, is_gold: np.ndarray) -> np.ndarray:
        """Return which labels each row has, by the thresholds or, without any, by the best ones for these rows."""
        if self.thresholds is not None:
            return self.predictions(logits)
        return np.asarray(logits > np.array(best_thresholds(logits, is_gold)))

    def score_labels(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score logits [rows, labels]: micro and macro F1 of the answers, mean average precision of the ranking."""
        is_gold = labels > 0.5
        return self._score_answers(self._answer(logits, is_gold), logits, is_gold)

    def _score_answers(self, predicted: np.ndarray, logits: np.ndarray, is_gold: np.ndarray) -> dict[str, float]:
        values = {
            "f1_micro": f1_of_label_sets(is_gold, predicted),
            "f1_macro": float(f1_of_labels(is_gold, predicted).mean()),
            "map": mean_average_precision(is_gold, logits),
        }
        return self.summarize({name: values[name] for name in self.dataset.metrics})

    def right_rows(self, logits: np.ndarray, rows: Encoded) -> np.ndarray | None:
        """Return None: a row may have some of its labels right."""
        return None

    def score_classes(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> dict[str, ClassScores]:
        """Score each label by itself: precision, recall and their harmonic mean."""
        is_gold = rows.labels > 0.5
        predicted = self._answer(outputs, is_gold)
        right, claimed, gold = (predicted & is_gold).sum(0), predicted.sum(0), is_gold.sum(0)
        scores = {}
        for index, name in enumerate(names):
            scores[name] = ClassScores(
                precision=float(right[index] / max(claimed[index], 1)),
                recall=float(right[index] / max(gold[index], 1)),
                f1=float(2 * right[index] / max(claimed[index] + gold[index], 1)),
                rows=int(gold[index]),
            )
        return scores

    def confusion(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[tuple[str, str, int]]:
        """Return nothing: a row of several labels is in no single cell."""
        return []

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score the same labels for every row: as many of the commonest as have the highest score."""
        is_gold = np.asarray(rows.labels) > 0.5
        commonest_first = np.argsort(-is_gold.sum(axis=0), kind="stable")
        scores = []
        for count in (*range(1, min(len(commonest_first), MOST_COMMON) + 1), len(commonest_first)):
            answer = np.zeros(is_gold.shape, bool)
            answer[:, commonest_first[:count]] = True
            scores.append(self._score_answers(answer, answer.astype(float), is_gold))
        return max(scores, key=lambda score: score["score"])

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows got other labels, and which of these have fewer right decisions than before."""
        flags_before, flags_after, is_gold = self.predictions(before), self.predictions(after), rows.labels > 0.5
        right_before, right_after = (flags_before == is_gold).sum(axis=1), (flags_after == is_gold).sum(axis=1)
        return (flags_before != flags_after).any(axis=1), right_after < right_before

    # What an exported folder has to answer

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the list of labels of each row."""
        return _name_labels(self.predictions(outputs), names)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the probability of each label."""
        return label_probabilities(outputs, self.temperature)

    def confidences(self, outputs: np.ndarray, rows: Encoded, temperature: float) -> Confidences | None:
        """Return the probability of every label of every row."""
        return label_confidences(outputs, rows.labels, temperature)

    def gold_answers(self, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the list of gold labels of each row."""
        return _name_labels(rows.labels > 0.5, names)

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return the temperature, and for each label the logit above which its F1 on these rows is the highest."""
        thresholds: list[Json] = [*best_thresholds(outputs, rows.labels)]
        return super().settings(outputs, rows) | {"thresholds": thresholds}

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Answer by these thresholds from now on."""
        super().adopt_settings(settings)
        thresholds = settings.get("thresholds")
        self.thresholds = np.array(thresholds, np.float64) if isinstance(thresholds, list) else None

    # What the plan prints

    def describe_labels(self, splits: datasets.Splits) -> str:
        """Count the rows of each label, and score the best answer that is the same for every row."""
        lists = {}
        for split, counts in self.count_classes(splits).items():
            lists[split] = list_names([f"{name} {count:,}" for name, count in counts.items()])
        mean = float(np.asarray(splits["train"].labels).sum(axis=1).mean())
        baseline = self.baseline(splits["dev"])["score"]
        labels = f"{len(self.dataset.labels)} labels, {mean:.2f} a row: {lists['train']}; dev: {lists['dev']}"
        return f"{labels}; the same labels for every row: dev score {baseline:.4f}"

    def count_classes(self, splits: datasets.Splits) -> dict[str, dict[str, int]]:
        """Count the rows of each label by split."""
        by_split = {}
        for split, rows in splits.items():
            counts = self._label_columns(rows).sum(axis=0, dtype=np.int64).tolist()
            by_split[split] = dict(zip(self.dataset.labels, counts, strict=True))
        return by_split

    def data_warnings(self, splits: datasets.Splits) -> list[str]:
        """Also say how many rows have none of the labels, and whether any has several."""
        lines = super().data_warnings(splits)
        counts = np.asarray(splits["train"].labels).sum(axis=1)
        empty = int((counts == 0).sum())
        if empty:
            lines.append(f"{empty:,} of {len(splits['train']):,} training rows have none of the labels")
        if counts.max() < 2:
            lines.append("no training row has more than one label; those of a cell are parted by , | ; or spaces")
        return lines


def _name_labels(flags: np.ndarray, names: Sequence[str]) -> list[Answer]:
    """Return the names of the labels that each row has, from bool [rows, labels]."""
    answers: list[Answer] = []
    for row in flags:
        answers.append([names[index] for index in np.flatnonzero(row).tolist()])
    return answers
