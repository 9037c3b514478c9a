"""From rows to batches: tokenised once, padded on either side, every row once an epoch, the same for the same seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from spdtool.data import tokens as data
from spdtool.data.tokens import Encoded
from spdtool.errors import DataError, ModelError
from spdtool.tasks import Rows, Task

LONG = "the film was very very good and so it was quite fine then"


def rows_of(lengths: list[int], left: bool = False) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded(
        {"input_ids": np.arange(1, offsets[-1] + 1, dtype=np.int32)},
        offsets,
        np.arange(len(lengths)),
        {"input_ids": 0},
        left,
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_batches_are_what_the_tokenizer_itself_would_pad(toys: Any, side: str, pairs: bool) -> None:
    tokenizer = toys.tokenizer(side)
    rows = toys.rows(9, pairs=pairs)
    batch = data.tokenise(tokenizer, rows, 32).collate([4, 0, 7])
    chosen = [[column[i] for i in (4, 0, 7)] for column in (rows.first, rows.second) if column is not None]
    expected = tokenizer(*chosen, padding=True, return_tensors="np")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].dtype == np.int64
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
    assert list(batch["labels"]) == [rows.labels[i] for i in (4, 0, 7)]


@pytest.mark.parametrize("left", [False, True])
def test_padding_to_a_given_length(left: bool) -> None:
    batch = rows_of([2, 3], left).collate([0, 1], 4)
    expected = [[0, 0, 1, 2], [0, 3, 4, 5]] if left else [[1, 2, 0, 0], [3, 4, 5, 0]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == (np.array(expected) > 0).astype(int).tolist()


def test_long_rows_are_cut_a_pair_in_its_longer_half(tiny_tokenizer: Any) -> None:
    encoded = data.tokenise(tiny_tokenizer, Rows([LONG, "a"], ["very", LONG], [0, 1]), 10)
    assert encoded.lengths.tolist() == [10, 10]
    kept = tiny_tokenizer.convert_ids_to_tokens(encoded.collate([0])["input_ids"][0])
    assert kept == ["[CLS]", *LONG.split()[:6], "[SEP]", "very", "[SEP]"]


def test_a_tokenizer_with_a_shorter_limit_has_the_last_word(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.model_max_length = 6
    assert data.tokenise(tiny_tokenizer, Rows([LONG], None, [0]), 128).lengths.tolist() == [6]


def test_tokenising_in_blocks_changes_nothing(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokenizer = toys.rows(25, pairs=True), toys.tokenizer()
    whole = data.tokenise(tokenizer, rows, 16)
    monkeypatch.setattr(data, "TOKENISE_ROWS", 7)
    blocks = data.tokenise(tokenizer, rows, 16)
    np.testing.assert_array_equal(whole.offsets, blocks.offsets)
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(column, blocks.columns[name])


def test_labels_are_integers_for_classes_and_floats_for_regression(toys: Any) -> None:
    assert data.tokenise(toys.tokenizer(), toys.rows(4), 16).labels.dtype == np.int64
    assert data.tokenise(toys.tokenizer(), toys.rows(4, labels=1), 16).labels.dtype == np.float32


def test_a_tokenizer_that_cannot_pad_is_refused(toys: Any) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        data.encode(tokenizer, {"train": toys.rows(4)}, 16)


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(100, 8), (96, 8), (7, 8), (1, 8), (1000, 3)])
def test_every_row_comes_once_an_epoch_in_as_few_batches_as_possible(rows: int, size: int, bucketing: bool) -> None:
    encoded = rows_of(np.random.default_rng(0).integers(1, 30, rows).tolist())
    batches = data.training_batches(encoded, size, 0, 0, pool=50 if bucketing else None)
    assert len(batches) == -(-rows // size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert max(len(batch) for batch in batches) <= size


@pytest.mark.parametrize("bucketing", [True, False])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(bucketing: bool) -> None:
    encoded = rows_of(np.random.default_rng(0).integers(1, 30, 64).tolist())

    def order(seed: int, epoch: int) -> list[int]:
        np.random.seed(epoch + 7)  # a global generator that must not matter
        return np.concatenate(data.training_batches(encoded, 8, seed, epoch, pool=50 if bucketing else None)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_bucketing_saves_most_of_the_padding_and_does_not_sort_the_batches() -> None:
    encoded = rows_of(np.random.default_rng(0).integers(1, 60, 2000).tolist())

    def padding(bucketing: bool) -> float:
        batches = data.training_batches(encoded, 16, 0, 0, pool=50 if bucketing else None)
        masks = [encoded.collate(batch)["attention_mask"] for batch in batches]
        return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.size for mask in masks)

    assert padding(True) < 0.1 < 0.3 < padding(False)
    widths = [encoded.lengths[batch].max() for batch in data.training_batches(encoded, 16, 0, 0, pool=50)]
    rising = sum(a <= b for a, b in itertools.pairwise(widths)) / (len(widths) - 1)
    assert 0.35 < rising < 0.65


def test_evaluation_takes_every_row_the_longest_first() -> None:
    encoded = rows_of([3, 9, 1, 9, 5])
    batches = [batch.tolist() for batch in data.evaluation_batches(encoded, 2)]
    assert batches == [[1, 3], [4, 0], [2]]


def test_labels_follow_the_order_of_the_models_own_names(toy_task: Callable[..., Task]) -> None:
    task = toy_task(labels=("not_entailment", "entailment"))
    splits = {"train": Rows(["a", "b", "c"], None, [0, 1, 1])}
    turned = data.align_labels(splits, task, ["ENTAILMENT", "not entailment"])
    assert list(turned["train"].labels) == [1, 0, 0]
    assert splits["train"].labels == [0, 1, 1], "the rows that came in are left as they were"
    for names in (["not-entailment", "entailment"], ["LABEL_0", "LABEL_1"]):
        assert data.align_labels(splits, task, names)["train"].labels == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "names", "order"),
    [
        (("A", "a"), ["A", "a"], [0, 1]),
        (("A", "a"), ["a", "A"], [1, 0]),
        (("not spam", "not-spam"), ["not-spam", "not spam"], [1, 0]),
        (("Yes", "no", "yes"), ["yes", "no", "Yes"], [2, 1, 0]),
        (("not-spam", "spam"), ["Spam", "Not spam"], [1, 0]),
        (("neg", "pos"), ["LABEL_0", "LABEL_1"], [0, 1]),
        (("0", "1"), ["entailment", "not_entailment"], [0, 1]),
        (("0", "1"), ["1", "0"], [1, 0]),
        (("0", "1", "2"), ["b", "a", "c"], [0, 1, 2]),
    ],
)
def test_labels_map_one_to_one_exact_names_first(
    toy_task: Callable[..., Task], labels: tuple[str, ...], names: list[str], order: list[int]
) -> None:
    assert data.label_order(names, toy_task(labels=labels)) == order


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("A", "a"), ["a", "b"]),
        (("a", "b"), ["A", "a"]),
        (("A", "a"), ["a", "a"]),
        (("not spam", "not-spam"), ["not_spam", "NOT SPAM"]),
        (("1", "2", "10"), ["neg", "neutral", "pos"]),
        (("neg", "pos"), ["positive", "negative"]),
        (("neg", "pos"), ["LABEL_1", "LABEL_0"]),
    ],
)
def test_labels_that_cannot_be_told_apart_or_have_other_names_are_refused_with_both_lists(
    toy_task: Callable[..., Task], labels: tuple[str, ...], names: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        data.align_labels({"train": Rows(["a"], None, [0])}, toy_task(labels=labels), names)
    assert ", ".join(labels) in caught.value.message
    assert ", ".join(names) in caught.value.message
    assert "id2label" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("labels", "names"), [(("a", "b"), ["a", "b", "c"]), (("a", "b", "c"), ["x"]), ((), ["a", "b"])]
)
def test_a_model_with_another_number_of_labels_is_refused(
    toy_task: Callable[..., Task], labels: tuple[str, ...], names: list[str]
) -> None:
    task = toy_task(labels=labels)
    with pytest.raises(ModelError, match=f"the model has {len(names)} labels"):
        data.align_labels({"train": Rows(["a"], None, [0])}, task, names)


def test_rows_longer_than_the_models_positions_are_refused() -> None:
    data.check_lengths({"train": rows_of([5, 6]), "dev": rows_of([7])}, 7)
    data.check_lengths({"train": rows_of([5000])}, None)
    with pytest.raises(DataError, match="8 tokens; the model has 7 positions"):
        data.check_lengths({"train": rows_of([5]), "dev": rows_of([8])}, 7)


def test_an_empty_split_knows_inputs_and_padding(toys: ModuleType) -> None:
    empty, full = data.no_rows(toys.tokenizer("left")), data.tokenise(toys.tokenizer("left"), toys.rows(3), 32)
    assert len(empty) == 0
    assert (list(empty.columns), empty.pad, empty.left) == (list(full.columns), full.pad, full.left)


def test_tokens_are_made_once_and_belong_to_texts_tokenizer_and_length(
    toys: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows, tokenizer = toys.rows(data.CACHED_ROWS, pairs=True), toys.tokenizer()
    first = data.tokenise(tokenizer, rows, 12)
    tokenizer(["the film"], truncation=True, max_length=3, padding=True)  # a call leaves its mark on a tokenizer
    original = data._tokens
    monkeypatch.setattr(data, "_tokens", lambda *_: pytest.fail("tokenised again"))
    again = data.tokenise(toys.tokenizer(), rows, 12)
    assert again.digest == first.digest
    assert isinstance(again.columns["input_ids"], np.memmap)
    made: list[int] = []
    monkeypatch.setattr(data, "_tokens", lambda *what: (made.append(1), original(*what))[1])
    changed = Rows([*rows.first[:-1], "the meal"], rows.second, rows.labels)
    other = toys.tokenizer()
    other.truncation_side = "left"
    for tokeniser, texts, length in ((tokenizer, changed, 12), (tokenizer, rows, 11), (other, rows, 12)):
        before = len(made)
        data.tokenise(tokeniser, texts, length)
        assert len(made) == before + 1
    few = toys.rows(data.CACHED_ROWS - 1)
    for _ in range(2):
        data.tokenise(tokenizer, few, 12)
    assert len(made) == 5, "few rows are not kept"


def test_the_digest_is_that_of_the_content_whether_it_is_known_or_not(toys: Any) -> None:
    rows = data.tokenise(toys.tokenizer(), toys.rows(9), 32)
    assert rows.hashes
    assert replace(rows, hashes={}).digest == rows.digest
    assert rows.take(np.arange(9)).digest == rows.digest
    assert rows.take(np.arange(8)).digest != rows.digest
    assert replace(rows, labels=1 - rows.labels).digest != rows.digest


def test_what_stands_beside_the_rows_comes_with_every_batch() -> None:
    rows = replace(rows_of([2, 3, 1]), beside={"seen": np.array([[0.5], [1.5], [2.5]])})
    assert rows.collate([2, 0])["seen"].tolist() == [[2.5], [0.5]]
    assert rows.take(np.array([1])).collate([0])["seen"].tolist() == [[1.5]]


@pytest.mark.parametrize("left", [False, True])
def test_what_belongs_to_tokens_is_padded_as_they_are(left: bool) -> None:
    rows = replace(rows_of([2, 3, 1], left), per_token={"seen": np.arange(1, 7, dtype=np.float32)[:, None]})
    for each in (rows, rows.take(np.array([0, 1, 2]))):
        batch = each.collate([2, 0], 4)
        assert batch["seen"].shape == (2, 4, 1)
        assert batch["seen"][..., 0].tolist() == batch["input_ids"].tolist()


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("count", [96, 97, 230])
def test_data_too_large_to_be_shuffled_whole_still_gives_every_row_once(
    monkeypatch: pytest.MonkeyPatch, count: int, bucketing: bool
) -> None:
    for name, value in (("SHUFFLED_ROWS", 90), ("BLOCK_BATCHES", 3), ("GROUP_BLOCKS", 2)):
        monkeypatch.setattr(data, name, value)
    rows = rows_of([1 + row % 7 for row in range(count)])
    batches = data.training_batches(rows, 4, 5, 0, pool=50 if bucketing else None)
    assert len(batches) == len(list(batches)) == -(-count // 4)
    assert sorted(np.concatenate(list(batches))) == list(range(count))
    assert sorted(len(batch) for batch in batches)[1:] == [4] * (len(batches) - 1)
    again = data.training_batches(rows, 4, 5, 0, pool=50 if bucketing else None)
    order = [len(batches) - 1, 0, len(batches) // 2]  # a stage that resumes asks for a batch in the middle first
    assert all((again[i] == batches[i]).all() for i in order)
    other = data.training_batches(rows, 4, 5, 1, pool=50 if bucketing else None)
    assert [list(batch) for batch in other] != [list(batch) for batch in batches]
    assert [list(batch) for batch in islice(cycle(batches), 2)] == [list(batches[0]), list(batches[1])]
