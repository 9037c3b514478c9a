"""Texts without labels, and rated pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from spdtool.data.kinds.embedding import (
    NO_PAIR,
    RatedPairs,
    draw_texts,
    embedding_dataset,
    make_rows,
    read_pairs,
    read_text_file,
)
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe


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


def test_pairs_that_give_no_order_and_cells_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    toys.sentence_encoder(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.txt").write_text("".join(f"text {number}\n" for number in range(20)), "utf-8")
    file = tmp_path / "pairs.jsonl"

    def describe(*pairs: tuple[object, object, object], **flags: Any) -> str:
        lines = [json.dumps(dict(zip(("score", "sentence1", "sentence2"), pair, strict=True))) for pair in pairs]
        file.write_text("\n".join(lines), "utf-8")
        flags = {"given_teacher": str(tmp_path / "teacher"), "data": str(tmp_path / "data"), "pairs": str(file)} | flags
        return embedding_dataset(Recipe(task="local", **flags)).about

    for pairs, message in (
        ([(1, "a", "b"), (1.0, "c", "d")], "has 2 pairs, all rated 1: there is no order"),
        ([(None, "a", "b")], "has 1 pairs, none of them rated"),
        ([(1, "a\ud800", "b"), (2, "a", "b")], "line 1: the column 'sentence1' holds half a surrogate pair"),
        ([(1, "a", ["b"]), (2, "a", "b")], "line 1: the column 'sentence2' holds a list, not text"),
    ):
        with pytest.raises(DataError, match=message):
            describe(*pairs)
    rated = [(1, "a", "b"), (90, "c", "d")]
    (tmp_path / "data/test.tsv").write_text("1\tx\ty\n", "utf-8")
    assert describe(*rated).endswith("scored on 2 pairs, rated 1 to 90 (left alone: test.tsv)")
    with pytest.raises(DataError, match="--label is about labels"):
        describe(*rated, label="score")


def test_lists_of_passages_are_texts_too(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"query": "a", "pos": ["b"], "neg": ["c", "d"], "prompt": "x"}\n', "utf-8")
    assert read_text_file(file, ()) == ["a", "b", "c", "d"]
    file.write_text('{"anchor": "a", "positive": "b", "negative_1": "c"}\n', "utf-8")
    assert read_text_file(file, ()) == ["a", "b", "c"]
    triples = tmp_path / "triples.train.small.tsv"
    triples.write_text("a\tb\tc\nd\te\tf\n", "utf-8")
    assert read_text_file(triples, ()) == ["a", "d", "b", "e", "c", "f"]
