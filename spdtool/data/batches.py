"""Which rows make up each batch: of like length for training, longest first for evaluation.

Everything is a pure function of (rows, seed, epoch), so that a position in the data is a pair of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from spdtool.data.tokens import Encoded

SHUFFLED_ROWS = 1_000_000  # from here on, not all rows are put into one random order
BLOCK_BATCHES = 128  # batches in a block of neighbouring rows, which is read from the disk as a whole
GROUP_BLOCKS = 64  # blocks whose rows are mixed: their row numbers are all that is in memory


def training_batches(
    rows: Encoded, batch_size: int, seed: int, epoch: int, *, pool: int | None
) -> Sequence[np.ndarray]:
    """Return the row numbers of every batch of one epoch: each row once, batches of like length, in random order.

    The number of batches is always `ceil(rows / batch_size)`, of the rows of an epoch. From `SHUFFLED_ROWS` rows on, it
    is blocks of rows that are put into random order, and rows within groups of blocks: an order of all rows would not
    fit beside them.

    Args:
        pool: batches of a pool inside which rows are sorted by length, so that lengths are near-equal and still random;
            None: rows of any length share a batch.
    """
    if rows.groups is not None:
        numbers = np.arange(len(rows))
        if rows.mixture is not None:
            numbers = rows.mixture.rows_of_epoch(seed, epoch, rows.groups)
        return group_batches(rows, numbers, batch_size, np.random.default_rng([seed, epoch]), pool)
    if rows.mixture is not None:
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(rows.mixture.rows_of_epoch(seed, epoch))
        return _cut_into_batches(rows.lengths, order, batch_size, generator, pool)
    if len(rows) >= SHUFFLED_ROWS:
        return BlockedBatches(rows, batch_size, (seed, epoch), pool)
    generator = np.random.default_rng([seed, epoch])
    return _cut_into_batches(rows.lengths, generator.permutation(len(rows)), batch_size, generator, pool)


def group_batches(
    rows: Encoded, numbers: np.ndarray, batch_size: int, generator: np.random.Generator, pool: int | None
) -> list[np.ndarray]:
    """Return `ceil(numbers / batch_size)` batches of whole groups, about as large as each other, in random order.

    A group of more than `batch_size` rows is cut, else a batch would not fit into the memory. So a batch may have up to
    twice as many rows.

    Args:
        numbers: of the rows of the epoch.
    """
    assert rows.groups is not None
    order = numbers[np.argsort(rows.groups[numbers], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(rows.groups[order])) + 1)
    chunks = []
    for number in generator.permutation(len(groups)):
        chunks += _slices(groups[number], batch_size)
    count = -(-len(numbers) // batch_size)
    if pool is not None:
        # Chunks whose longest rows are alike meet in a batch; in random pools, so that batches differ by epoch.
        longest = np.array([rows.lengths[chunk].max() for chunk in chunks])
        pooled = _slices(np.arange(len(chunks)), max(1, pool * len(chunks) // count))
        sorted_chunks = np.concatenate([each[np.argsort(longest[each], kind="stable")] for each in pooled])
        chunks = [chunks[number] for number in sorted_chunks]
    # Cut where the sum of rows comes nearest to equal shares; no batch is empty, because no chunk is above the size.
    ends = np.cumsum([len(chunk) for chunk in chunks])
    batches, first = [], 0
    for number in range(1, count + 1):
        last = int(np.searchsorted(ends, number * len(numbers) / count - 1e-9)) + 1
        last = min(max(last, first + 1), len(chunks) - (count - number))
        batches.append(np.concatenate(chunks[first:last]))
        first = last
    return [batches[number] for number in generator.permutation(count)]


def evaluation_batches(rows: Encoded, batch_size: int) -> Iterator[np.ndarray]:
    """Yield row numbers, longest rows first: a batch too large for the memory shows at once, and little is padded."""
    yield from _slices(np.argsort(-rows.lengths, kind="stable"), batch_size)


class BlockedBatches(Sequence[np.ndarray]):
    """The batches of an epoch of very many rows; holds those of one group of blocks, and computes others on demand."""

    def __init__(self, rows: Encoded, batch_size: int, seed: tuple[int, int], pool: int | None) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._block_size = batch_size * BLOCK_BATCHES
        self._seed = seed
        self._pool = pool
        full_blocks, remainder = divmod(len(rows), self._block_size)
        self._blocks = np.random.default_rng([*seed, 0]).permutation(full_blocks)
        if remainder:
            self._blocks = np.append(self._blocks, full_blocks)  # the short block last: every batch before it is full
        self._group = -1
        self._batches: list[np.ndarray] = []

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        group, position = divmod(index, BLOCK_BATCHES * GROUP_BLOCKS)
        if group != self._group:
            self._group, self._batches = group, self._group_batches(group)
        return self._batches[position]

    def _group_batches(self, group: int) -> list[np.ndarray]:
        numbers = []
        for block in self._blocks[group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]:
            start = block * self._block_size
            numbers.append(np.arange(start, min(start + self._block_size, len(self._rows))))
        # A generator for each group, so that any batch can be had without those before it.
        generator = np.random.default_rng([*self._seed, 1 + group])
        order = generator.permutation(np.concatenate(numbers))
        return _cut_into_batches(self._rows.lengths, order, self._batch_size, generator, self._pool)


def _cut_into_batches(
    lengths: np.ndarray, order: np.ndarray, batch_size: int, generator: np.random.Generator, pool: int | None
) -> list[np.ndarray]:
    """Cut `order` into batches; with a pool, of like length, and in random order again."""
    if pool is None:
        return _slices(order, batch_size)
    batches: list[np.ndarray] = []
    for rows in _slices(order, pool * batch_size):
        # Stable: another sort may order equal lengths differently on another machine.
        batches += _slices(rows[np.argsort(lengths[rows], kind="stable")], batch_size)
    # Shuffled again: short rows first and long rows last would be a curriculum in every pool.
    return [batches[number] for number in generator.permutation(len(batches))]


def _slices(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
