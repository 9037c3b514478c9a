"""Scores of tagged words: spans count as right only whole and with their type, as conlleval and seqeval have it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from spdtool.data.kinds.tags import OUTSIDE
from spdtool.run.records import ClassScores
from spdtool.tasks.scores.metrics import METRICS

Tags = list[list[str]]
"""For each text the tags of its words."""


class SpanScores(NamedTuple):
    """Scores over all spans of all texts."""

    precision: float
    recall: float
    f1: float


def score_spans(gold: Tags, predicted: Tags) -> SpanScores:
    """Compare the spans of all texts, of all types together."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    # Not strict: an I- after nothing begins a span, as conlleval reads it, so a model that errs there is not lost.
    scores: Any = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
    return SpanScores(float(scores[0]), float(scores[1]), float(scores[2]))


def score_span_types(gold: Tags, predicted: Tags) -> dict[str, ClassScores]:
    """Compare the spans of each type that the gold tags have, by its name in the order of the alphabet."""
    kinds = sorted({tag[2:] for tags in gold for tag in tags if tag != OUTSIDE})
    by_kind = {}
    for kind in kinds:
        gold_of_kind = _blank_other_kinds(gold, kind)
        scores = score_spans(gold_of_kind, _blank_other_kinds(predicted, kind))
        spans = sum(tag.startswith("B-") for tags in gold_of_kind for tag in tags)
        by_kind[kind] = ClassScores(precision=scores.precision, recall=scores.recall, f1=scores.f1, rows=spans)
    return by_kind


def score_words(metrics: tuple[str, ...], gold: Tags, predicted: Tags) -> dict[str, float]:
    """Return metrics of tags that are no spans, such as parts of speech, over the words of all texts."""
    gold_words = np.array([tag for tags in gold for tag in tags])
    predicted_words = np.array([tag for tags in predicted for tag in tags])
    return {name: METRICS[name](gold_words, predicted_words) for name in metrics}


def count_spans(gold: Tags, predicted: Tags) -> np.ndarray:
    """Count the spans of each text that are right, and those of both sides together, [texts, 2].

    Twice the first over the second, both summed over texts, is the F1 of `score_spans`.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    counts = []
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        gold_spans, predicted_spans = set(get_entities(gold_tags)), set(get_entities(predicted_tags))
        counts.append((len(gold_spans & predicted_spans), len(gold_spans) + len(predicted_spans)))
    return np.array(counts)


def _blank_other_kinds(tags_by_text: Tags, kind: str) -> Tags:
    """Return the tags with O in place of those of other types."""
    blanked = []
    for tags in tags_by_text:
        blanked.append([tag if tag[2:] == kind else OUTSIDE for tag in tags])
    return blanked
