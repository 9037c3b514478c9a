"""Answers to questions: the span of a context that a model points to, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spdtool.data.windows import WindowOutput
from spdtool.escaping import make_visible
from spdtool.tasks.decision import (
    LABEL,
    NUMBER,
    Answer,
    Decision,
    ExampleCall,
    Json,
    Object,
    Snippets,
    read_optional_number,
)
from spdtool.tasks.scores.answer_metrics import word_f1
from spdtool.tasks.scores.probabilities import softmax

LONGEST_ANSWER = 30  # tokens, as in the official script of SQuAD
UNREAD = -np.inf
THRESHOLDS = 200  # that are tried, at most


class Candidate(NamedTuple):
    """The best span of a context.

    Attributes:
        logit: of its begin and its end together. null: of "no answer", the least of all windows.
        probability: of begin times end among the tokens of its window.
        null_probability: the same of "no answer", in the window that has the least of it.
        start, end: characters of the context.
    """

    logit: float
    null: float
    probability: float
    null_probability: float
    start: int
    end: int


def find_candidate(windows: Sequence[WindowOutput]) -> Candidate:
    """Find the likeliest span of a context over all of its windows; the first token of a window means "no answer"."""
    best = Candidate(UNREAD, np.inf, 0.0, 0.0, 0, 0)
    null, null_chance = np.inf, 0.0
    for window, values in windows:
        begins, ends = values[:, 0].astype(np.float64), values[:, 1].astype(np.float64)
        tokens = window.tokens_of(source=1)
        readable = np.concatenate([[0], tokens])
        begin_chances, end_chances = softmax(begins[readable]), softmax(ends[readable])
        if begins[0] + ends[0] < null:
            null, null_chance = float(begins[0] + ends[0]), float(begin_chances[0] * end_chances[0])
        if not len(tokens):
            continue
        sums = begins[tokens][:, None] + ends[tokens][None, :]
        order = np.arange(len(tokens))
        distance = order[None, :] - order[:, None]
        sums[(distance < 0) | (distance >= LONGEST_ANSWER)] = UNREAD
        first, last = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[first, last] > best.logit:
            chance = float(begin_chances[1 + first] * end_chances[1 + last])
            start, end = int(window.spans[tokens[first], 0]), int(window.spans[tokens[last], 1])
            best = Candidate(float(sums[first, last]), null, chance, 0.0, start, end)
    return best._replace(null=null, null_probability=null_chance)


def choose_threshold(questions: Sequence[Sequence[WindowOutput]], gold: Sequence[Sequence[str]]) -> float:
    """Choose how much likelier "no answer" has to be than a span, by the F1 of words; 0 where nothing is better.

    Args:
        questions: for each the windows of its context, with outputs.
        gold: the right answers of each; none where there is none.
    """
    margins, gains = [], []
    for windows, right_answers in zip(questions, gold, strict=True):
        predicted = find_candidate(windows)
        margins.append(predicted.null - predicted.logit)
        text = windows[0].window.text[predicted.start : predicted.end]
        gains.append(word_f1(text, right_answers) - word_f1("", right_answers))
    steps = np.unique(np.quantile(margins, np.linspace(0, 1, THRESHOLDS)))
    # Between the margins of questions, so that rounding decides none of them.
    candidates = [0.0, steps[0] - 1.0, *((steps[:-1] + steps[1:]) / 2), steps[-1] + 1.0]
    scores = [float(np.array(gains)[np.array(margins) <= candidate].sum()) for candidate in candidates]
    return float(candidates[int(np.argmax(scores))])


class BestSpan(Decision):
    """A question is answered with a span of its context, or with nothing where that is likelier."""

    output_names = (LABEL,)
    windows = 1
    example = ExampleCall("answer", pair=("a question", "its context"))

    def __init__(self, names: Sequence[str], settings: Mapping[str, Json] | None = None) -> None:
        super().__init__(names, settings)
        self.threshold = read_optional_number(self.settings, "no_answer_threshold")

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Tell that every model of this head is answered so."""
        return True

    def decide(self, outputs: Any) -> list[Answer]:
        """Return `answer`, `score`, `start` and `end` for each question; an empty answer where there is none.

        The score of an empty answer is the probability that there is none.
        """
        answers: list[Answer] = []
        for windows in outputs:
            candidate = find_candidate(windows)
            is_null = self.threshold is not None and candidate.null - candidate.logit > self.threshold
            start, end = (0, 0) if is_null else (candidate.start, candidate.end)
            text = windows[0].window.text[start:end]
            score = candidate.null_probability if is_null else candidate.probability
            answers.append({"answer": text, "score": score, "start": start, "end": end})
        return answers

    def predictions(self, outputs: Any) -> list[Object]:
        """Return the answers as they are."""
        return self.decide(outputs)

    def tensor(self, name: str, outputs: Any) -> list[Json]:
        """Return each answer as JSON."""
        return [json.dumps(answer, ensure_ascii=False) for answer in self.decide(outputs)]

    def prediction_schema(self) -> Object:
        """Return the schema of an answer."""
        integer: Object = {"type": "integer", "minimum": 0}
        properties: Object = {"answer": {"type": "string"}, "score": NUMBER, "start": integer, "end": integer}
        return {"type": "object", "properties": properties, "required": [*properties]}

    def describe(self) -> str:
        """Say what is answered."""
        return "a span of the second text"

    def snippets(self) -> Snippets:
        """Return what a model card shows of an answer."""
        return Snippets(
            "a span of the second text, with its place",
            "start_logits[0].argmax(), end_logits[0].argmax()",
            "...[start_logits.data, end_logits.data].map((scores) => scores.indexOf(Math.max(...scores)))",
            "does not read windows",
        )

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return answer, score and place, separated by tabs."""
        characters = f"{prediction['start']}-{prediction['end']}"
        return f"{make_visible(prediction['answer'])}\t{prediction['score']:.4f}\t{characters}"

    @property
    def unanswered(self) -> str:
        """The line for a question that could not be read."""
        return "-\t-\t-"
