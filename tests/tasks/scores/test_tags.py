"""Scores of tagged words: whole spans of the right type, by type, and plain tags word by word."""

from __future__ import annotations

import pytest

from spdtool.tasks.scores.tags import score_span_types, score_spans, score_words

GOLD = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]


def test_a_span_counts_as_right_only_whole_and_with_its_type() -> None:
    predicted = [["B-PER", "I-PER", "O"], ["B-PER", "B-LOC"]]
    assert score_spans(GOLD, predicted) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    by_type = score_span_types(GOLD, predicted)
    assert list(by_type) == ["LOC", "PER"]
    assert (by_type["PER"].precision, by_type["PER"].recall, by_type["PER"].rows) == (0.5, 1.0, 1)
    assert (by_type["LOC"].f1, by_type["LOC"].rows) == (0.0, 1)


def test_plain_tags_are_scored_word_by_word() -> None:
    scores = score_words(("accuracy", "f1_macro"), [["N", "V"], ["N"]], [["N", "N"], ["N"]])
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1_macro": pytest.approx(0.4)}
