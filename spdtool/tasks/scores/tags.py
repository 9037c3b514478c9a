"""Scores of tagged words: spans count as right only whole and with their type, as conlleval and seqeval have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spdtool.data.kinds.tags import OUTSIDE, split_tag
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
    right, gold_count, predicted_count = _count_sides(gold, predicted).sum(axis=0).tolist()
    precision, recall = right / max(predicted_count, 1), right / max(gold_count, 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return SpanScores(precision, recall, f1)


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
    counts = _count_sides(gold, predicted)
    return np.stack([counts[:, 0], counts[:, 1] + counts[:, 2]], axis=1)


def find_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the type, the first and the last word of each span of a text.

    An I- that goes on with no span begins one, as conlleval reads it, so a model that errs there is not lost.
    """
    spans, first, kind = set[tuple[str, int, int]](), None, ""
    for word, tag in enumerate([*tags, OUTSIDE]):  # the last one ends a span that reaches the end
        begins, tag_kind = split_tag(tag)
        goes_on = tag != OUTSIDE and not begins and tag_kind == kind
        if first is not None and not goes_on:
            spans.add((kind, first, word - 1))
            first = None
        if tag != OUTSIDE and first is None:
            first, kind = word, tag_kind
    return spans


def _count_sides(gold: Tags, predicted: Tags) -> np.ndarray:
    """Count the spans of each text that are right, that are gold and that are predicted, [texts, 3]."""
    counts = np.zeros((len(gold), 3), np.int64)
    for text, (gold_tags, predicted_tags) in enumerate(zip(gold, predicted, strict=True)):
        gold_spans, predicted_spans = find_spans(gold_tags), find_spans(predicted_tags)
        counts[text] = len(gold_spans & predicted_spans), len(gold_spans), len(predicted_spans)
    return counts


def _blank_other_kinds(tags_by_text: Tags, kind: str) -> Tags:
    """Return the tags with O in place of those of other types."""
    blanked = []
    for tags in tags_by_text:
        blanked.append([tag if tag[2:] == kind else OUTSIDE for tag in tags])
    return blanked
