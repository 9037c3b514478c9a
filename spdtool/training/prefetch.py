"""Batches made ready a few steps ahead of the loop, by a thread of its own, so that a GPU does not wait for them.

The thread collates them and puts them into page-locked memory, from which a copy to the device waits for nothing. It
works on a pure function of the rows and the step: nothing that is random moves to it, and the batches are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch

from spdtool.training.microbatches import Piece

AHEAD = 3  # steps that wait ready: enough for one that takes long to collate, and little memory

Item = TypeVar("Item")
Ready = tuple[int, int, Iterable[Piece]]
"""A step, the rows of its global batch, and the pieces of it that this process takes."""


def ready(batches: Iterator[Ready], device: torch.device) -> AbstractContextManager[Iterator[Ready]]:
    """`batches` for the loop to run over inside the block: made ahead for a GPU, when they are asked for on a CPU.

    On a CPU a thread would only take the time of the products. Whatever making a batch raises is raised in the loop,
    at the step whose batch it is.
    """
    if device.type != "cuda":
        return nullcontext(batches)
    return ahead((pinned(batch) for batch in batches), torch.cuda.current_device())


@contextmanager
def ahead(items: Iterator[Item], device: int | None = None) -> Iterator[Iterator[Item]]:
    """The same items in the same order, made by a thread that ends with the block, however the block ends.

    Args:
        device: number of the GPU that the thread works for; None: it works for none.
    """

    def begin() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, "batches", begin) as thread:
        end = object()
        waiting = deque(thread.submit(next, items, end) for _ in range(AHEAD))

        def taken() -> Iterator[Item]:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]

        try:
            yield taken()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def pinned(batch: Ready) -> Ready:
    """`batch` with its pieces collated, as tensors in page-locked memory where there is a GPU."""
    step, size, pieces = batch
    return step, size, [_pinned(piece) for piece in pieces]


def _pinned(piece: Piece) -> Piece:
    columns = {name: torch.from_numpy(column) for name, column in piece.batch.items()}
    if torch.cuda.is_available():
        columns = {name: column.pin_memory() for name, column in columns.items()}
    return replace(piece, batch=columns)
