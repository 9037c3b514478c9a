"""Answers to questions: the span of a context that a model points to, and how it is compared with the right ones.

Comparison is that of the official script of SQuAD: case, punctuation, articles and spaces do not count.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spdtool.data.windows import WindowOutput
from spdtool.escaping import make_visible
from spdtool.tasks.decision import LABEL, NUMBER, Answer, Decision, Json, Object, Snippets, normalize_logits

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST_ANSWER = 30  # tokens
UNREAD = -np.inf


class Candidate(NamedTuple):
    """The best span of a context.

    Attributes:
        logit: of its begin and its end together. null: of "no answer", the least of all windows.
        probability: of begin times end among the tokens of its window.
        start, end: characters of the context.
    """

    logit: float
    null: float
    probability: float
    start: int
    end: int


def find_candidate(windows: Sequence[WindowOutput]) -> Candidate:
    """Find the likeliest span of a context over all of its windows; the first token of a window means "no answer"."""
    best = Candidate(UNREAD, np.inf, 0.0, 0, 0)
    null = np.inf
    for window, values in windows:
        begins, ends = values[:, 0].astype(np.float64), values[:, 1].astype(np.float64)
        null = min(null, float(begins[0] + ends[0]))
        tokens = np.flatnonzero((window.sources == 1) & (window.spans[:, 1] > window.spans[:, 0]))
        if not len(tokens):
            continue
        sums = begins[tokens][:, None] + ends[tokens][None, :]
        order = np.arange(len(tokens))
        distance = order[None, :] - order[:, None]
        sums[(distance < 0) | (distance >= LONGEST_ANSWER)] = UNREAD
        first, last = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[first, last] > best.logit:
            readable = np.concatenate([[0], tokens])
            chances = normalize_logits(begins[readable])[1 + first] * normalize_logits(ends[readable])[1 + last]
            start, end = int(window.spans[tokens[first], 0]), int(window.spans[tokens[last], 1])
            best = Candidate(float(sums[first, last]), null, float(chances), start, end)
    return best._replace(null=null)


class BestSpan(Decision):
    """A question is answered with a span of its context, or with nothing where that is likelier."""

    output_names = (LABEL,)
    windows = 1

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Tell that every model of this head is answered so."""
        return True

    def decide(self, outputs: Any) -> list[Answer]:
        """Return `answer`, `score`, `start` and `end` for each question; an empty answer where there is none."""
        threshold = self.settings.get("no_answer_threshold")
        answers: list[Answer] = []
        for windows in outputs:
            candidate = find_candidate(windows)
            is_null = isinstance(threshold, int | float) and candidate.null - candidate.logit > threshold
            start, end = (0, 0) if is_null else (candidate.start, candidate.end)
            text = windows[0].window.text[start:end]
            answers.append({"answer": text, "score": candidate.probability, "start": start, "end": end})
        return answers

    def predictions(self, outputs: Any) -> list[Object]:
        """Return the answers as they are."""
        return self.decide(outputs)

    def tensor(self, name: str, outputs: Any) -> list[Json]:  # noqa: ARG002
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
            "tokenizer.decode(inputs.input_ids.slice(0, [start_logits.argmax(), end_logits.argmax() + 1]))",
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


def normalize_answer(text: str) -> str:
    """Return an answer without case, punctuation, articles and further spaces, as SQuAD compares it."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(predicted: str, gold: Sequence[str]) -> float:
    """Return 1 where the answer is one of the right ones, else 0; no right ones: where it is empty."""
    return float(any(normalize_answer(predicted) == normalize_answer(answer) for answer in gold or ("",)))


def word_f1(predicted: str, gold: Sequence[str]) -> float:
    """Return the F1 of words with the nearest of the right answers."""
    return max(_word_f1(predicted, answer) for answer in gold or ("",))


def _word_f1(predicted: str, gold: str) -> float:
    words, gold_words = normalize_answer(predicted).split(), normalize_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))
