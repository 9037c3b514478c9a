"""Scores of tagged words: whole spans of the right type, by type, and plain tags word by word."""

from __future__ import annotations

import sys

import pytest

from spdtool.tasks.scores.tags import count_spans, find_spans, score_span_types, score_spans, score_words

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


def test_spans_are_those_of_conlleval() -> None:
    cases: dict[str, set[tuple[str, int, int]]] = {
        "": set(),
        "O O": set(),
        "B-PER I-PER": {("PER", 0, 1)},
        "B-PER B-PER": {("PER", 0, 0), ("PER", 1, 1)},
        "I-PER I-PER O I-PER": {("PER", 0, 1), ("PER", 3, 3)},  # I- after nothing begins a span
        "B-PER I-LOC I-LOC": {("PER", 0, 0), ("LOC", 1, 2)},
        "O B-O I-O O": {("O", 1, 2)},  # a type may be called O
        "B-A-B I-A-B I-A": {("A-B", 0, 1), ("A", 2, 2)},
    }
    for tags, spans in cases.items():
        assert find_spans(tags.split()) == spans, tags


def test_scores_need_no_package_that_comes_as_a_source_archive_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pip of a fresh venv of Python 3.11 could not build seqeval, and with it nothing was installed.
    for name in ("seqeval", "seqeval.metrics", "seqeval.metrics.sequence_labeling"):
        monkeypatch.setitem(sys.modules, name, None)
    assert score_spans(GOLD, GOLD) == (1.0, 1.0, 1.0)
    assert score_spans(GOLD, [["O"] * 3, ["O"] * 2]) == (0.0, 0.0, 0.0)
    assert count_spans(GOLD, GOLD).tolist() == [[1, 2], [1, 2]]
