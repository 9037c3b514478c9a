"""Batches prepared a few steps ahead of the loop, by a thread, so that a GPU does not wait for them.

The thread collates them and puts them into page-locked memory, from which a copy to the device
waits for nothing. It computes a pure function of the rows and the step: nothing random moves to
it, and the batches are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch

from spdtool.training.microbatches import Microbatch

STEPS_AHEAD = 3  # enough for one step that takes long to collate, and little memory

Item = TypeVar("Item")
StepBatch = tuple[int, int, Iterable[Microbatch]]
"""A step, the number of rows of its global batch, and this rank's micro-batches of it."""


def prefetch_batches(batches: Iterator[StepBatch], device: torch.device) -> AbstractContextManager[Iterator[StepBatch]]:
    """Return a context whose iterator yields `batches`: prepared ahead for a GPU, on demand on a CPU.

    On a CPU a thread would only take processor time from the matrix products. An exception while a
    batch is prepared is raised in the loop, at the step of that batch.
    """
    if device.type != "cuda":
        return nullcontext(batches)
    return iterate_ahead(map(pin_batch, batches), torch.cuda.current_device())


@contextmanager
def iterate_ahead(items: Iterator[Item], device: int | None = None) -> Iterator[Iterator[Item]]:
    """Yield an iterator of the same items in the same order, computed by a thread that ends with the block.

    Args:
        device: number of the GPU that the thread works for; None: none.
    """

    def select_device() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, "batches", select_device) as thread:
        end = object()
        queue = deque(thread.submit(next, items, end) for _ in range(STEPS_AHEAD))

        def take_items() -> Iterator[Item]:
            while (item := queue.popleft().result()) is not end:
                queue.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]

        try:
            yield take_items()
        finally:
            # a loop that breaks off must not wait for batches that nobody will read
            thread.shutdown(wait=False, cancel_futures=True)


def pin_batch(batch: StepBatch) -> StepBatch:
    """Collate the micro-batches of a step as tensors, in page-locked memory if there is a GPU."""
    step, size, microbatches = batch
    pinned = []
    for microbatch in microbatches:
        columns = {name: torch.from_numpy(column) for name, column in microbatch.batch.items()}
        if torch.cuda.is_available():
            columns = {name: column.pin_memory() for name, column in columns.items()}
        pinned.append(replace(microbatch, batch=columns))
    return step, size, pinned
