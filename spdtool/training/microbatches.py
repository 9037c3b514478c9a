"""Micro-batches: which rows of a global batch each rank takes, in how many steps, and how much each weighs.

A loss is a mean over rows, over real tokens, or over pairs of tokens. The mean of the
micro-batches' means is not the mean of the batch where lengths differ, so every term is multiplied
by the micro-batch's fraction of what that term is a mean over. The lengths of all rows are known
to every rank: nothing has to be exchanged for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from spdtool.data.tokens import Batch, Encoded
from spdtool.distillation.losses import NO_WEIGHT, WHOLE_BATCH, LossWeight


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a batch, padded, as arrays or ready tensors (`prefetch.py`), and their weight in its loss."""

    batch: Batch | dict[str, Tensor]
    weight: LossWeight


@dataclass(frozen=True)
class MicrobatchSplitter:
    """Splits global batches.

    Attributes:
        accumulate: number of micro-batches that a rank makes of its rows, to save memory.
        pad_to: pad to this many tokens; None: to the longest row of a micro-batch.
        pad_alike: pad all micro-batches to the longest row of the batch, because padding counts in
            the losses.
        pad_multiple: without `pad_to`, pad to a multiple of this many tokens, so that fewer lengths occur.
        longest: never pad beyond this many tokens for it; None: no limit.
        rank, ranks: which rank takes its rows, of how many.
    """

    accumulate: int = 1
    pad_to: int | None = None
    pad_alike: bool = False
    pad_multiple: int = 1
    longest: int | None = None
    rank: int = 0
    ranks: int = 1

    def split(self, rows: Encoded, batch: np.ndarray) -> Iterator[Microbatch]:
        """Yield this rank's micro-batches of `batch` (row numbers); the weights of all ranks sum to one.

        A rank without rows gets one row with a weight of zero: its backward pass then leaves zeros
        for the same parameters as on the other ranks.
        """
        rank_rows = deal_rows(batch, rows.lengths[batch], self.ranks)[self.rank]
        pad_to = self.pad_to
        if self.pad_alike and pad_to is None:
            pad_to = int(rows.lengths[batch].max())
        if pad_to is None and self.pad_multiple > 1:
            pad_to = self._round_up(int(rows.lengths[batch].max()))
        if not len(rank_rows):
            yield Microbatch(rows.collate(batch[:1], pad_to), NO_WEIGHT)
            return
        size = math.ceil(len(rank_rows) / self.accumulate)
        for start in range(0, len(rank_rows), size):
            numbers = rank_rows[start : start + size]
            weight = self._compute_weight(rows, numbers, batch)
            yield Microbatch(rows.collate(numbers, pad_to), weight)

    def _round_up(self, length: int) -> int:
        """Round a length up to the multiple, as far as the model can read it."""
        rounded = -(-length // self.pad_multiple) * self.pad_multiple
        return rounded if self.longest is None else max(length, min(rounded, self.longest))

    def _compute_weight(self, rows: Encoded, numbers: np.ndarray, batch: np.ndarray) -> LossWeight:
        lengths, batch_lengths = rows.lengths[numbers], rows.lengths[batch]
        if len(lengths) == len(batch_lengths):
            return WHOLE_BATCH  # exactly 1: a product with it changes no bit
        row_fraction = len(lengths) / len(batch_lengths)
        label_fraction = row_fraction
        if rows.labels_per_token:
            label_fraction = float(rows.label_counts[numbers].sum() / max(rows.label_counts[batch].sum(), 1))
        if self.pad_alike:  # every row has as many positions, and all of them count
            return LossWeight(row_fraction, row_fraction, row_fraction, label_fraction)
        # attention maps are compared over pairs of tokens in a row: its length squared
        pairs = float(np.square(lengths, dtype=np.float64).sum())
        batch_pairs = float(np.square(batch_lengths, dtype=np.float64).sum())
        return LossWeight(row_fraction, float(lengths.sum() / batch_lengths.sum()), pairs / batch_pairs, label_fraction)


def deal_rows(batch: np.ndarray, lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Deal the rows of `batch` out to the ranks: equally many for each, to within one, and of like lengths.

    Longest first, they are dealt out back and forth; rank 0 gets the first row, so it is never
    without one.
    """
    if ranks == 1:
        return [batch]
    # stable: every rank must come to the same order without asking the others
    order = batch[np.argsort(-lengths, kind="stable")]
    turn = np.arange(len(order)) % (2 * ranks)
    owner = np.where(turn < ranks, turn, 2 * ranks - 1 - turn)
    return [order[owner == rank] for rank in range(ranks)]
