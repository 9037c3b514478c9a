"""Extractive question answering: the begin and the end of the answer in a context, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.tokens import Encoded
from spdtool.data.unlabeled import read_unlabeled
from spdtool.data.windows import group_by_text, locate_span, tokenize_windows
from spdtool.errors import ModelError
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.tasks.answers import BestSpan, choose_threshold
from spdtool.tasks.classification import Classification
from spdtool.tasks.decision import Json
from spdtool.tasks.head import Head
from spdtool.tasks.scores.answer_metrics import exact_match, word_f1
from spdtool.tasks.scores.significance import Resampler
from spdtool.tasks.windowed import WindowDetails, WindowedTask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SPAN_FINDER = Head(
    "AutoModelForQuestionAnswering",
    "ForQuestionAnswering",
    "a model that finds answers in a text",
    outputs=("start_logits", "end_logits"),
    reads="every token",
    per_token=True,
    padding_value=-1e4,  # no begin and no end
    pipeline="question-answering",
)
NO_ANSWER = (0, 0)  # the first token, [CLS]: it stands for "no answer", as in BERT's code for SQuAD 2


@dataclass(frozen=True)
class AnswerDetails(WindowDetails):
    """The windows of the contexts of a split, and the right answers of each row by its number."""

    answers: Sequence[Sequence[str]]


@task_kinds.register("spans")
class Spans(WindowedTask):
    """A span of the second text that answers the first one.

    Attributes:
        threshold: how much likelier "no answer" has to be than a span; None: every question has an answer.
    """

    columns = "question, context, answers; or a .json file of SQuAD"
    head = SPAN_FINDER
    decision = BestSpan
    threshold: float | None = None

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read questions and contexts without answers."""
        rows = read_unlabeled(file, columns, self.dataset, np.empty(0, np.int64))
        return replace(rows, labels=[[] for _ in range(len(rows))])

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return [0, 1]: begin and end, whatever a model calls them."""
        if len(names) != 2:
            raise ModelError(
                f"the model has {len(names)} outputs for each token; {self.name!r} needs two: begin and end"
            )
        return [0, 1]

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split, and note whether training questions may have no answer."""
        if self.threshold is None and "train" in splits and not all(splits["train"].labels):
            self.threshold = 0.0
        return super().encode(tokenizer, splits, recipe)

    def encode_split(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> Encoded:
        """Tokenize in windows of the context; one without the whole first answer points to its first token."""
        assert rows.second is not None
        split = tokenize_windows(tokenizer, rows, max_length, self.stride)
        positions = []
        for window in split.windows:
            spans = rows.labels[window.example]
            located = locate_span(window, *spans[0]) if spans else None
            positions.append(located or NO_ANSWER)
        answers = []
        for context, spans in zip(rows.second, rows.labels, strict=True):
            answers.append([context[start:end] for start, end in spans])
        return replace(
            split.encoded,
            labels=np.array(positions, np.int64).reshape(-1, 2),
            labels_are_positions=True,
            details=AnswerDetails(split.windows, answers),
        )

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of begin and end, averaged over windows."""
        from torch.nn import functional as F

        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the loss of `Classification` of begin and end, among the tokens of a window that are no padding."""
        padding = student <= SPAN_FINDER.padding_value
        rows = [student, teacher.masked_fill(padding, SPAN_FINDER.padding_value)]
        rows = [logits.transpose(1, 2).flatten(0, 1) for logits in rows]
        return Classification.logit_loss(rows[0], rows[1], labels.flatten(), loss)

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return exact match and F1 of words, averaged over questions."""
        return self.summarize({name: float(each.mean()) for name, each in self._score_questions(outputs, rows).items()})

    def resampler(self, outputs: np.ndarray, rows: Encoded) -> Resampler | None:
        """Return how a bootstrap draws questions, each with all of its windows."""
        return self.resample_means(self._score_questions(outputs, rows), "questions")

    def _score_questions(self, outputs: np.ndarray, rows: Encoded) -> dict[str, np.ndarray]:
        """Return each metric of every question, [questions]."""
        pairs = list(zip(self._answer_texts(outputs, rows), self._gold_answers(rows), strict=True))
        values = {
            "exact_match": np.array([exact_match(*pair) for pair in pairs]),
            "f1": np.array([word_f1(*pair) for pair in pairs]),
        }
        return {name: values[name] for name in self.dataset.metrics}

    def _answer_texts(self, outputs: np.ndarray, rows: Encoded) -> list[str]:
        """Return the text of the answer to each question, empty where there is none."""
        return [answer["answer"] for answer in self.answers(outputs, rows, self.head_labels)]

    def _gold_answers(self, rows: Encoded) -> list[Sequence[str]]:
        assert isinstance(rows.details, AnswerDetails)
        return [rows.details.answers[windows[0].example] for windows in group_by_text(rows.details.windows)]

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score no answer to any question."""
        gold = self._gold_answers(rows) if isinstance(rows, Encoded) else rows.labels
        share = float(np.mean([not answers for answers in gold]))
        return self.summarize(dict.fromkeys(self.dataset.metrics, share))

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which questions have another answer, and which of these had a right one."""
        texts_before, texts_after = self._answer_texts(before, rows), self._answer_texts(after, rows)
        changed, was_right = [], []
        for text, other, gold in zip(texts_before, texts_after, self._gold_answers(rows), strict=True):
            changed.append(text != other)
            was_right.append(exact_match(text, gold) == 1.0)
        return np.array(changed), np.array(changed) & np.array(was_right)

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return the overlap of windows, and where questions may have no answer the best threshold on these rows."""
        threshold = None
        if self.threshold is not None:
            threshold = choose_threshold(self.outputs_by_text(outputs, rows), self._gold_answers(rows))
        return super().settings(outputs, rows) | {"no_answer_threshold": threshold}

    def settings_of_answers(self) -> Mapping[str, Json]:
        """Return the threshold."""
        return {"no_answer_threshold": self.threshold}

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Answer with this threshold from now on."""
        threshold = settings["no_answer_threshold"]
        self.threshold = float(threshold) if isinstance(threshold, int | float) else None

    def describe_labels(self, splits: Splits) -> str:
        """Count the questions, and those without an answer."""
        lines = []
        for split, rows in splits.items():
            without = sum(not answers for answers in rows.labels)
            lines.append(f"{split}: {len(rows):,} questions" + (f", {without:,} without an answer" if without else ""))
        return "; ".join(lines)

    def data_warnings(self, splits: Splits) -> list[str]:
        """Name questions, and contexts, of dev and test that were trained on."""
        lines = super().data_warnings(splits)
        for split in ("dev", "test"):
            if split in splits:
                lines += shared_contexts(splits["train"], splits[split], split)
        return lines


def shared_contexts(train: Rows, rows: Rows, split: str) -> list[str]:
    """Say how many questions of a split are about a context that is in train too; nothing where none is."""
    assert train.second is not None
    assert rows.second is not None
    contexts = set(train.second)
    count = sum(context in contexts for context in rows.second)
    if not count:
        return []
    return [f"{count:,} of {len(rows):,} {split} questions have a context of train: their score is flattered"]
