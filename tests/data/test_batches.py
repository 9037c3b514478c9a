"""Batches: every row once an epoch, lengths alike, the same order for the same seed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from spdtool.data import batches
from spdtool.data.batches import evaluation_batches, training_batches
from spdtool.data.tokens import Encoded, mix_rows


def rows_of(lengths: list[int]) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.ones(offsets[-1], np.int32)
    return Encoded({"input_ids": ids}, offsets, np.arange(len(lengths)), {"input_ids": 0}, pad_left=False)


def random_rows(count: int, longest: int = 30) -> Encoded:
    return rows_of(np.random.default_rng(0).integers(1, longest, count).tolist())


def test_every_row_comes_once_an_epoch_in_as_few_batches_as_possible() -> None:
    for count, size in ((100, 8), (96, 8), (7, 8), (1, 8), (1000, 3)):
        for pool in (50, None):
            epoch = training_batches(random_rows(count), size, 0, 0, pool=pool)
            case = f"{count} rows in batches of {size}, pool={pool}"
            assert len(epoch) == -(-count // size), case
            assert sorted(np.concatenate(epoch).tolist()) == list(range(count)), case
            assert max(len(batch) for batch in epoch) <= size, case


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    rows = random_rows(64)

    def order(seed: int, epoch: int, pool: int | None) -> list[int]:
        np.random.seed(epoch + 7)  # a global generator that must not matter
        return np.concatenate(training_batches(rows, 8, seed, epoch, pool=pool)).tolist()

    for pool in (50, None):
        assert order(0, 0, pool) == order(0, 0, pool)
        orders = {tuple(order(seed, epoch, pool)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(orders) == 4, f"pool={pool}"


def test_a_pool_saves_most_of_the_padding_and_does_not_sort_the_batches() -> None:
    rows = random_rows(2000, longest=60)

    def padding(pool: int | None) -> float:
        masks = []
        for batch in training_batches(rows, 16, 0, 0, pool=pool):
            masks.append(rows.collate(batch)["attention_mask"])
        return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.size for mask in masks)

    assert padding(50) < 0.1 < 0.3 < padding(None)
    widths = [rows.lengths[batch].max() for batch in training_batches(rows, 16, 0, 0, pool=50)]
    rising = sum(a <= b for a, b in itertools.pairwise(widths)) / (len(widths) - 1)
    assert 0.35 < rising < 0.65


def test_evaluation_takes_every_row_the_longest_first() -> None:
    order = [batch.tolist() for batch in evaluation_batches(rows_of([3, 9, 1, 9, 5]), 2)]
    assert order == [[1, 3], [4, 0], [2]]


def test_data_too_large_to_be_shuffled_at_once_still_gives_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHUFFLED_ROWS", 90), ("BLOCK_BATCHES", 3), ("GROUP_BLOCKS", 2)):
        monkeypatch.setattr(batches, name, value)
    for count in (96, 97, 230):
        for pool in (50, None):
            rows = rows_of([1 + row % 7 for row in range(count)])
            case = f"{count} rows, pool={pool}"
            epoch = training_batches(rows, 4, 5, 0, pool=pool)
            assert len(epoch) == len(list(epoch)) == -(-count // 4), case
            assert sorted(np.concatenate(list(epoch))) == list(range(count)), case
            assert sorted(len(batch) for batch in epoch)[1:] == [4] * (len(epoch) - 1), case
            repeated = training_batches(rows, 4, 5, 0, pool=pool)
            # A stage that resumes asks for a batch in the middle first.
            for number in (len(epoch) - 1, 0, len(epoch) // 2):
                assert (repeated[number] == epoch[number]).all(), case
            other_epoch = training_batches(rows, 4, 5, 1, pool=pool)
            assert [list(batch) for batch in other_epoch] != [list(batch) for batch in epoch], case
            assert [list(batch) for batch in epoch[:2]] == [list(epoch[0]), list(epoch[1])], case
            with pytest.raises(IndexError):
                epoch[len(epoch)]


def test_groups_without_labels_stay_whole_inside_an_epoch() -> None:
    labeled = replace(rows_of([2] * 12), groups=np.repeat([0, 1, 2], 4))
    unlabeled = replace(rows_of([3] * 30), groups=np.repeat(np.arange(3, 13), 3))
    rows = mix_rows(labeled, unlabeled, per_epoch=10)
    assert rows.groups is not None
    seen: list[int] = []
    for epoch in range(3):
        batches = training_batches(rows, 6, 0, epoch, pool=None)
        assert len(batches) == -(-rows.epoch_rows // 6) == 4
        numbers = np.concatenate(list(batches))
        assert sorted(number for number in numbers if number < 12) == list(range(12))
        chosen = [number for number in numbers.tolist() if number >= 12]
        assert len(chosen) == 10
        # at most the first and the last group of an epoch are cut
        sizes = np.unique(rows.groups[chosen], return_counts=True)[1]
        assert (sizes < 3).sum() <= 2
        for group in set(rows.groups[numbers]):
            assert sum(group in rows.groups[batch] for batch in batches) == 1
        seen += chosen
    assert sorted(seen) == list(range(12, 42)), "each row once a round"
