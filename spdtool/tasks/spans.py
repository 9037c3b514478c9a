"""Extractive question answering: the begin and the end of the answer in a context, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.tokens import Encoded
from spdtool.data.windows import TextWindow, WindowOutput, group_by_text, sample_windows, tokenize_windows
from spdtool.errors import ModelError
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Loss, Recipe
from spdtool.tasks.answers import BestSpan, exact_match, find_candidate, word_f1
from spdtool.tasks.classification import Classification
from spdtool.tasks.decision import Answer, Json
from spdtool.tasks.head import Head
from spdtool.tasks.task import Task

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
THRESHOLDS = 200  # that are tried, at most


@dataclass(frozen=True)
class AnswerDetails:
    """The windows of the contexts of a split, and the right answers of each row by its number."""

    windows: Sequence[TextWindow]
    answers: Sequence[Sequence[str]]

    def select(self, rows: np.ndarray) -> AnswerDetails:
        """Return these windows alone."""
        return replace(self, windows=[self.windows[int(row)] for row in rows])


@task_kinds.register("spans")
class Spans(Task):
    """A span of the second text that answers the first one."""

    head = SPAN_FINDER
    decision = BestSpan
    stride = 0
    threshold: float | None = None

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return [0, 1]: begin and end, whatever a model calls them."""
        if len(names) != 2:
            raise ModelError(
                f"the model has {len(names)} outputs for each token; {self.name!r} needs two: begin and end"
            )
        return [0, 1]

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize in windows of the context; a window without the whole answer points to its first token."""
        self.stride = recipe.window_stride
        if self.threshold is None and any(not answers for answers in splits.get("train", Rows([], None, [])).labels):
            self.threshold = 0.0
        encoded = {}
        for split, rows in splits.items():
            assert rows.second is not None
            cut = tokenize_windows(tokenizer, rows, recipe.max_length, self.stride)
            places = [locate_answer(window, rows.labels[window.example]) for window in cut.windows]
            answers = []
            for context, spans in zip(rows.second, rows.labels, strict=True):
                answers.append([context[start:end] for start, end in spans])
            encoded[split] = replace(
                cut.encoded,
                labels=np.array(places, np.int64).reshape(-1, 2),
                labels_are_positions=True,
                details=AnswerDetails(cut.windows, answers),
            )
        return encoded

    def sample_scored_rows(self, rows: Encoded, count: int, seed: int) -> Encoded:
        """Draw whole contexts."""
        return sample_windows(rows, _details_of(rows).windows, count, seed)

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

    def outputs_by_row(self, outputs: np.ndarray, rows: Encoded) -> list[list[WindowOutput]]:
        """Return the windows of each row with their outputs."""
        values = np.split(outputs, rows.offsets[1:-1])
        windows = _details_of(rows).windows
        return group_by_text([WindowOutput(*pair) for pair in zip(windows, values, strict=True)])

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the answer to every question."""
        return self.decision(names, {"no_answer_threshold": self.threshold}).decide(self.outputs_by_row(outputs, rows))

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return exact match and F1 of words, averaged over questions."""
        predicted = [answer["answer"] for answer in self.answers(outputs, rows, self.head_labels)]
        gold = self._gold_answers(rows)
        values = {
            "exact_match": np.mean([exact_match(*pair) for pair in zip(predicted, gold, strict=True)]),
            "f1": np.mean([word_f1(*pair) for pair in zip(predicted, gold, strict=True)]),
        }
        return self.summarize({name: float(values[name]) for name in self.dataset.metrics})

    def _gold_answers(self, rows: Encoded) -> list[Sequence[str]]:
        details = _details_of(rows)
        return [details.answers[windows[0].example] for windows in group_by_text(details.windows)]

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score no answer to any question."""
        gold = self._gold_answers(rows) if isinstance(rows, Encoded) else rows.labels
        share = float(np.mean([not answers for answers in gold]))
        return self.summarize(dict.fromkeys(self.dataset.metrics, share))

    def compare_predictions(
        self,
        before: np.ndarray,
        after: np.ndarray,
        rows: Encoded,
        tolerance: float,  # noqa: ARG002
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which questions have another answer, and which of these had a right one."""
        was, now = ([each["answer"] for each in self.answers(side, rows, self.head_labels)] for side in (before, after))
        changed = np.array([old != new for old, new in zip(was, now, strict=True)])
        right = np.array([exact_match(*pair) == 1.0 for pair in zip(was, self._gold_answers(rows), strict=True)])
        return changed, changed & right

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return the overlap of windows, and where questions may have no answer the best threshold on these rows."""
        threshold = None if self.threshold is None else self._choose_threshold(outputs, rows)
        return {"stride": self.stride, "no_answer_threshold": threshold}

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Answer with this threshold from now on."""
        threshold = settings["no_answer_threshold"]
        self.threshold = float(threshold) if isinstance(threshold, int | float) else None

    def _choose_threshold(self, outputs: np.ndarray, rows: Encoded) -> float:
        """Choose how much likelier "no answer" has to be, by the F1 on these rows; 0 where nothing is better."""
        gold = self._gold_answers(rows)
        margins, gains = [], []
        for windows, answers in zip(self.outputs_by_row(outputs, rows), gold, strict=True):
            predicted = find_candidate(windows)
            margins.append(predicted.null - predicted.logit)
            text = windows[0].window.text[predicted.start : predicted.end]
            gains.append(word_f1(text, answers) - word_f1("", answers))
        steps = np.unique(np.quantile(margins, np.linspace(0, 1, THRESHOLDS)))
        # Between the margins of questions, so that rounding decides none of them.
        candidates = [0.0, steps[0] - 1.0, *((steps[:-1] + steps[1:]) / 2), steps[-1] + 1.0]
        scores = [float(np.array(gains)[np.array(margins) <= each].sum()) for each in candidates]
        return float(candidates[int(np.argmax(scores))])

    def describe_labels(self, splits: Splits) -> str:
        """Count the questions, and those without an answer."""
        lines = []
        for split, rows in splits.items():
            without = sum(not answers for answers in rows.labels)
            lines.append(f"{split}: {len(rows):,} questions" + (f", {without:,} without an answer" if without else ""))
        return "; ".join(lines)


def locate_answer(window: TextWindow, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the first and last token of the first answer in a window; twice 0 where the window lacks part of it."""
    tokens = np.flatnonzero((window.sources == 1) & (window.spans[:, 1] > window.spans[:, 0]))
    if not spans or not len(tokens):
        return 0, 0
    start, end = spans[0]
    first = int(np.searchsorted(window.spans[tokens, 1], start, side="right"))
    last = int(np.searchsorted(window.spans[tokens, 0], end, side="left")) - 1
    is_cut = window.spans[tokens[0], 0] > start or window.spans[tokens[-1], 1] < end
    if is_cut or first > last:
        return 0, 0
    return int(tokens[first]), int(tokens[last])


def _details_of(rows: Encoded) -> AnswerDetails:
    assert isinstance(rows.details, AnswerDetails)
    return rows.details
