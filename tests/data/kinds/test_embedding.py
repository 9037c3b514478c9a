"""Texts without labels, and rated pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spdtool.data.kinds.embedding import NO_PAIR, RatedPairs, draw_texts, make_rows, read_pairs, read_text_file
from spdtool.errors import DataError


def test_texts_come_from_lines_or_from_columns(tmp_path: Path) -> None:
    files = {
        "a.txt": "one\n\ntwo\r\n",
        "b.csv": "id,text\n1,one\n2,two\n",
        "c.tsv": "sentence1\tsentence2\tlabel\none\ttwo\t1\n",
        "d.jsonl": '{"anything": "one"}\n{"anything": "two"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
        assert read_text_file(tmp_path / name, ()) == ["one", "two"], name
    assert read_text_file(tmp_path / "c.tsv", ("sentence2",)) == ["two"]
    (tmp_path / "e.csv").write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(DataError, match="leaves open which columns are texts"):
        read_text_file(tmp_path / "e.csv", ())


def test_pairs_without_a_rating_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one.tsv").write_text('4.5\ta "quoted\tb\n\tc\td\n0\te\tf\n', "utf-8")
    (tmp_path / "two.csv").write_text("score,sentence1,sentence2\n1,g,h\n", "utf-8")
    pairs = RatedPairs()
    read_pairs(tmp_path, pairs)
    assert pairs == RatedPairs(['a "quoted', "e", "g"], ["b", "f", "h"], [4.5, 0.0, 1.0], unrated=1)


def test_a_bad_rating_is_refused_by_its_line(tmp_path: Path) -> None:
    for content, message in (
        ("1\ta\tb\nhigh\tc\td\n", "line 2: the rating 'high' is no number"),
        ("1\ta\tb\n2\tc\t\n", "line 2: a text of the pair is empty"),
        ("text\tlabel\na\tb\n", "has no rated pairs"),
    ):
        (tmp_path / "pairs.tsv").write_text(content, "utf-8")
        with pytest.raises(DataError, match=message):
            read_pairs(tmp_path / "pairs.tsv", RatedPairs())


def test_the_texts_of_a_pair_follow_each_other(tmp_path: Path) -> None:
    rows = make_rows(["x"], RatedPairs(["a", "c"], ["b", "d"], [1.0, 2.0]))
    assert rows.first == ["a", "b", "c", "d", "x"]
    assert np.asarray(rows.labels).tolist() == [[0, 1], [0, 1], [1, 2], [1, 2], [NO_PAIR, 0]]


def test_drawn_texts_are_not_trained_on_and_depend_on_the_text_alone() -> None:
    texts = [f"text {number}" for number in range(100)]
    train, dev = draw_texts(texts, 20, 0.5, 0)
    assert (len(train), len(dev)) == (80, 20)
    assert not set(train) & set(dev)
    assert set(draw_texts(texts[:60], 60, 0.2, 0)[1]) <= set(draw_texts(texts, 100, 0.9, 0)[1])
    assert draw_texts(texts, 20, 0.5, 1)[1] != dev
    with pytest.raises(DataError, match="too few"):
        draw_texts(["one"], 1, 0.5, 0)
