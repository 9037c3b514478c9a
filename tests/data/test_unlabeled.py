"""Texts without labels: reading them, and their order in the epochs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spdtool.data.batches import training_batches
from spdtool.data.dataset import Dataset
from spdtool.data.tokens import LABELED, Encoded, Mixture, mix_rows
from spdtool.data.unlabeled import read_unlabeled
from spdtool.errors import DataError


def dataset(*text: str) -> Dataset:
    return Dataset("mine", "classification", text, ("a", "b"), ("accuracy",), lambda _data, _seed: {})


def encoded(lengths: list[int], first_token: int) -> Encoded:
    tokens = np.arange(first_token, first_token + sum(lengths))
    return Encoded(
        columns={"input_ids": tokens},
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.arange(len(lengths)) % 2,
        pad_values={"input_ids": 0},
        pad_left=False,
    )


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one\n\ntwo\n")
    rows.write_text('{"review": "one", "id": 1}\n{"review": "two", "id": 2}\n')
    for file, columns in ((lines, ()), (rows, ()), (rows, ("review",))):
        texts = read_unlabeled(file, columns, dataset("review"), np.zeros(3, np.int64))
        assert (list(texts.first), texts.second) == (["one", "two"], None)
        assert np.asarray(texts.labels).tolist() == [0, 0]
    pairs = tmp_path / "b.txt"
    pairs.write_text("one\tand\ntwo\tor\n")
    texts = read_unlabeled(pairs, (), dataset("x", "y"), np.zeros((3, 4), np.uint8))
    assert (list(texts.first), list(texts.second or ())) == (["one", "two"], ["and", "or"])
    assert np.asarray(texts.labels).shape == (2, 4)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\tand\ntwo\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "one", "title": "t"}) + "\n")
    (tmp_path / "b.jsonl").write_text('{"x": "one"}\n{"x": " "}\n')
    cases = [
        ("gone.txt", (), dataset("x"), "there is no file"),
        ("a.txt", (), dataset("x", "y"), "line 2: 1 texts where 2"),
        ("a.jsonl", (), dataset("x"), "has no column 'x', where the training rows have their text"),
        ("a.jsonl", ("bdy",), dataset("x"), "has no column 'bdy'"),
        ("a.jsonl", ("body", "title"), dataset("x"), "names 2 columns, and a training row has 1"),
        ("b.jsonl", (), dataset("x"), "line 2: no text"),
    ]
    for name, columns, described, problem in cases:
        with pytest.raises(DataError, match=problem):
            read_unlabeled(tmp_path / name, columns, described, np.zeros(1, np.int64))


def test_every_text_is_used_once_before_any_is_repeated() -> None:
    mixture = Mixture(labeled=5, unlabeled=7, per_epoch=3)
    epochs = [mixture.rows_of_epoch(0, epoch) for epoch in range(7)]
    for rows in epochs:
        assert rows[:5].tolist() == [0, 1, 2, 3, 4]
    unlabeled_rows = np.concatenate([rows[5:] for rows in epochs])
    for start in (0, 7, 14):
        assert sorted(unlabeled_rows[start : start + 7].tolist()) == [5, 6, 7, 8, 9, 10, 11], start
    assert np.array_equal(mixture.rows_of_epoch(0, 4), epochs[4])
    assert not np.array_equal(mixture.rows_of_epoch(1, 4), epochs[4])


def test_a_mixture_is_batched_with_a_mark_for_each_row_that_has_a_label() -> None:
    labeled, unlabeled = encoded([3, 2, 4, 5], 100), encoded([2, 6, 1], 500)
    rows = mix_rows(labeled, unlabeled, per_epoch=2)
    assert (len(rows), rows.epoch_rows) == (7, 6)
    batches = training_batches(rows, 3, seed=0, epoch=0, pool=None)
    assert len(batches) == 2
    numbers = np.concatenate(list(batches))
    assert len(set(numbers.tolist())) == 6
    assert set(range(4)) < set(numbers.tolist())
    for number in range(7):
        batch = rows.collate([number])
        assert batch[LABELED].tolist() == [number < 4]
        source, row = (labeled, number) if number < 4 else (unlabeled, number - 4)
        assert batch["input_ids"].tolist() == source.collate([row])["input_ids"].tolist()
    assert rows.select(np.array([0, 5])).mixture is None
