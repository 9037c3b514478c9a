"""From rows to tokens: tokenizing once, padding on either side, and the cache key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from spdtool.data import tokens
from spdtool.data.dataset import Rows
from spdtool.data.tokens import CACHED_ROWS, Encoded, check_lengths, empty_split, encode_splits, tokenize
from spdtool.errors import DataError, ModelError

LONG = "the film was very very good and so it was quite fine then"


def rows_of(lengths: list[int], *, pad_left: bool = False) -> Encoded:
    """Make rows of these lengths whose token ids count upwards from 1."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Encoded({"input_ids": ids}, offsets, np.arange(len(lengths)), {"input_ids": 0}, pad_left)


def test_batches_equal_those_padded_by_the_tokenizer(toys: ModuleType) -> None:
    numbers = [4, 0, 7]
    for side in ("right", "left"):
        for pairs in (False, True):
            tokenizer, rows = toys.tokenizer(side), toys.rows(9, pairs=pairs)
            batch = tokenize(tokenizer, rows, 32).collate(numbers)
            selected = rows.select(numbers)
            expected = tokenizer(selected.first, selected.second, padding=True, return_tensors="np")
            for name in ("input_ids", "token_type_ids", "attention_mask"):
                assert batch[name].dtype == np.int64
                np.testing.assert_array_equal(batch[name], expected[name], err_msg=f"{name}, {side}, pairs={pairs}")
            assert batch["labels"].tolist() == selected.labels


def test_padding_to_a_given_length() -> None:
    for pad_left, expected in ((True, [[0, 0, 1, 2], [0, 3, 4, 5]]), (False, [[1, 2, 0, 0], [3, 4, 5, 0]])):
        batch = rows_of([2, 3], pad_left=pad_left).collate([0, 1], 4)
        assert batch["input_ids"].tolist() == expected
        assert batch["attention_mask"].tolist() == (np.array(expected) > 0).astype(int).tolist()


def test_long_rows_are_cut_a_pair_in_its_longer_text(tiny_tokenizer: Any) -> None:
    encoded = tokenize(tiny_tokenizer, Rows([LONG, "a"], ["very", LONG], [0, 1]), 10)
    assert encoded.lengths.tolist() == [10, 10]
    words = tiny_tokenizer.convert_ids_to_tokens(encoded.collate([0])["input_ids"][0])
    assert words == ["[CLS]", *LONG.split()[:6], "[SEP]", "very", "[SEP]"]


def test_a_shorter_limit_of_the_tokenizer_wins(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.model_max_length = 6
    assert tokenize(tiny_tokenizer, Rows([LONG], None, [0]), 128).lengths.tolist() == [6]


def test_tokenizing_in_chunks_changes_nothing(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokenizer = toys.rows(25, pairs=True), toys.tokenizer()
    expected = tokenize(tokenizer, rows, 16)
    monkeypatch.setattr(tokens, "TOKENIZED_ROWS", 7)
    chunked = tokenize(tokenizer, rows, 16)
    np.testing.assert_array_equal(expected.offsets, chunked.offsets)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(column, chunked.columns[name])


def test_labels_are_integers_for_classes_and_floats_for_regression(toys: ModuleType) -> None:
    assert tokenize(toys.tokenizer(), toys.rows(4), 16).labels.dtype == np.int64
    assert tokenize(toys.tokenizer(), toys.rows(4, labels=1), 16).labels.dtype == np.float32


def test_a_tokenizer_that_cannot_pad_is_refused(toys: ModuleType) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        encode_splits(tokenizer, {"train": toys.rows(4)}, 16)
    with pytest.raises(ModelError, match="no padding token"):
        empty_split(tokenizer)


def test_rows_longer_than_the_models_positions_are_refused() -> None:
    check_lengths({"train": rows_of([5, 6]), "dev": rows_of([7])}, 7)
    check_lengths({"train": rows_of([5000])}, None)
    with pytest.raises(DataError, match="8 tokens; the model has 7 positions"):
        check_lengths({"train": rows_of([5]), "dev": rows_of([8])}, 7)


def test_an_empty_split_has_the_inputs_and_the_padding_of_its_tokenizer(toys: ModuleType) -> None:
    tokenizer = toys.tokenizer("left")
    empty, full = empty_split(tokenizer), tokenize(tokenizer, toys.rows(3), 32)
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert (empty.pad_values, empty.pad_left) == (full.pad_values, full.pad_left)


def test_tokens_are_computed_once_for_each_text_tokenizer_and_length(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows, tokenizer = toys.rows(CACHED_ROWS, pairs=True), toys.tokenizer()
    first = tokenize(tokenizer, rows, 12)
    tokenizer(["the film"], truncation=True, max_length=3, padding=True)  # a call leaves traces in a tokenizer

    calls: list[int] = []
    call = type(tokenizer).__call__

    def counting_call(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return call(self, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting_call)
    cached = tokenize(toys.tokenizer(), rows, 12)
    assert not calls, "tokenized again"
    assert cached.digest == first.digest
    assert isinstance(cached.columns["input_ids"], np.memmap)

    changed_rows = Rows([*rows.first[:-1], "the meal"], rows.second, rows.labels)
    cuts_left = toys.tokenizer()
    cuts_left.truncation_side = "left"
    for other_tokenizer, texts, length in ((tokenizer, changed_rows, 12), (tokenizer, rows, 11), (cuts_left, rows, 12)):
        calls.clear()
        tokenize(other_tokenizer, texts, length)
        assert len(calls) == 1

    calls.clear()
    for _ in range(2):
        tokenize(tokenizer, toys.rows(CACHED_ROWS - 1), 12)
    assert len(calls) == 2, "few rows are not cached"


def test_the_digest_does_not_depend_on_stored_hashes(toys: ModuleType) -> None:
    rows = tokenize(toys.tokenizer(), toys.rows(9), 32)
    assert rows.hashes
    assert replace(rows, hashes={}).digest == rows.digest
    assert rows.select(np.arange(9)).digest == rows.digest
    assert rows.select(np.arange(8)).digest != rows.digest
    assert replace(rows, labels=1 - rows.labels).digest != rows.digest


def test_arrays_with_one_entry_per_row_come_with_every_batch() -> None:
    rows = replace(rows_of([2, 3, 1]), per_row={"further": np.array([[0.5], [1.5], [2.5]])})
    assert rows.collate([2, 0])["further"].tolist() == [[2.5], [0.5]]
    assert rows.select(np.array([1])).collate([0])["further"].tolist() == [[1.5]]


def test_arrays_with_one_entry_per_token_are_padded_as_the_tokens_are() -> None:
    per_token = {"further": np.arange(1, 7, dtype=np.float32)[:, None]}
    for pad_left in (False, True):
        rows = replace(rows_of([2, 3, 1], pad_left=pad_left), per_token=per_token)
        for same_rows in (rows, rows.select(np.array([0, 1, 2]))):
            batch = same_rows.collate([2, 0], 4)
            assert batch["further"].shape == (2, 4, 1)
            assert batch["further"][..., 0].tolist() == batch["input_ids"].tolist()


def test_no_row_can_be_selected() -> None:
    selected = rows_of([2, 3]).select(np.array([], np.int64))
    assert (len(selected), selected.columns["input_ids"].size, selected.offsets.tolist()) == (0, 0, [0])


def test_two_very_long_texts_are_cut_before_their_overflow_is_multiplied(toys: ModuleType) -> None:
    first, second = "good bad film " * 300, "bad cold " * 500
    for side in ("right", "left"):
        tokenizer = toys.tokenizer()
        tokenizer.truncation_side = side
        rows = Rows([first, first, "a film"], [second, "a book", second], [0, 0, 0])
        encoded = tokens.tokenize(tokenizer, rows, 16)
        for row, pair in enumerate(zip(rows.first, rows.second or (), strict=True)):
            expected = tokenizer(*pair, truncation=True, max_length=16)["input_ids"]
            ids = encoded.columns["input_ids"][encoded.offsets[row] : encoded.offsets[row + 1]]
            assert ids.tolist() == expected, (side, row)

    def locate(text: str) -> list[tuple[int, int]]:
        ends = [number for number, letter in enumerate(text + " ") if letter == " "]
        return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))

    words = " ".join(map(str, range(100)))
    cut = tokens.shorten_pairs([words, "a"], [words, words], 4, locate, from_left=False)
    assert cut == ([" ".join(map(str, range(16))), "a"], [" ".join(map(str, range(16))), words])
    assert tokens.shorten_pairs([words], [words], 4, locate, from_left=True)[0] == [" ".join(map(str, range(84, 100)))]
