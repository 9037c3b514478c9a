"""A global batch in pieces: which rows each process takes, in how many parts, and what share of the batch each is.

A loss is a mean over rows, over real tokens, or over pairs of tokens. The mean of the pieces' means is not the mean of
the batch where lengths differ, so every term is weighted by the piece's share of what that term is a mean over. The
lengths of all rows are known everywhere: nothing has to be exchanged for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from spdtool.data.tokens import Batch, Encoded


@dataclass(frozen=True)
class Share:
    """What part of its batch a piece holds: of rows, of real tokens, and of pairs of real tokens in a row."""

    rows: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0


WHOLE = Share()
NOTHING = Share(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Piece:
    """Some rows of a batch, padded, as arrays or ready tensors (`prefetch.py`), and their share of it."""

    batch: Batch | dict[str, Tensor]
    share: Share


@dataclass(frozen=True)
class Cut:
    """How batches are cut.

    Attributes:
        parts: pieces that a process makes of its rows, one after the other, to save memory.
        length: pad to this many tokens; None: to the longest row of a piece.
        alike: pad all pieces to the longest row of the batch, because padding counts in the losses.
        rank, processes: which process takes its rows, of how many.
    """

    parts: int = 1
    length: int | None = None
    alike: bool = False
    rank: int = 0
    processes: int = 1

    def pieces(self, rows: Encoded, batch: np.ndarray) -> Iterator[Piece]:
        """The pieces that this process takes of `batch` (row numbers); their shares over all processes sum to one.

        A process for which no row is left gets one row with a share of nothing: its backward pass then leaves zeros for
        the same parameters as everywhere else.
        """
        mine = deal(batch, rows.lengths[batch], self.processes)[self.rank]
        length = int(rows.lengths[batch].max()) if self.alike and self.length is None else self.length
        if not len(mine):
            yield Piece(rows.collate(batch[:1], length), NOTHING)
            return
        size = math.ceil(len(mine) / self.parts)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            yield Piece(rows.collate(part, length), self._share(rows.lengths[part], rows.lengths[batch]))

    def _share(self, part: np.ndarray, whole: np.ndarray) -> Share:
        if len(part) == len(whole):
            return WHOLE
        count = len(part) / len(whole)
        if self.alike:
            return Share(count, count, count)
        squares = [float(np.square(lengths, dtype=np.float64).sum()) for lengths in (part, whole)]
        return Share(count, float(part.sum() / whole.sum()), squares[0] / squares[1])


def deal(batch: np.ndarray, lengths: np.ndarray, processes: int) -> list[np.ndarray]:
    """The rows of `batch` for each process: as many for each, to within one, and of like lengths.

    Longest first, they are dealt out to and fro; the first process gets the first row, so it is never without one.
    """
    if processes == 1:
        return [batch]
    order = batch[np.argsort(-lengths, kind="stable")]
    turn = np.arange(len(order)) % (2 * processes)
    owner = np.where(turn < processes, turn, 2 * processes - 1 - turn)
    return [order[owner == process] for process in range(processes)]
