"""Dynamic batching: rows that arrive one by one are computed together, in threads of their own: the workers.

A worker that is free tokenises what arrived and puts it into the one pool of all workers. Then it computes the row that
has waited longest and those of the pool that are nearest to it in length, at most `max_batch`: hardly anything is
padding, nobody is left behind, and an answer goes out as soon as its own rows are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from spdtool.errors import SpdError
from spdtool.serving.classifier import Classifier, Row

FIXED = 16  # tokens whose time a batch takes in any case; 8 and 32 were slower (six layers of 384, one thread)


class Full(SpdError):
    """Too many rows wait already; the request may be sent again later."""


class Closed(SpdError):
    """The server is about to end and takes no further rows."""


@dataclass
class Job:
    """One request on its way: its texts, what is computed so far, and who waits for it.

    Attributes:
        left: rows that are still to be computed; of a job that failed it never comes to 0.
        failed: a batch with rows of it could not be computed, and whoever waits was told.
    """

    texts: list[str]
    pairs: list[str] | None
    arrived: float
    future: Future[np.ndarray] = field(default_factory=Future)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    left: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Waiting:
    """One encoded row of a job, and its place in it."""

    row: Row
    job: Job
    place: int


class Batcher:
    """Keeps the requests that wait, and the threads that answer them.

    Args:
        classify: what computes; its `encode` and `compute` are called by several threads at once.
        workers: batches that are computed at once.
        max_batch: most rows that are computed at once.
        max_wait: seconds that a row waits for others, while there are fewer.
        max_rows: most rows that wait; more are refused.
        observe: called with the number of rows of each batch that was computed.
    """

    def __init__(
        self,
        classify: Classifier,
        *,
        workers: int = 1,
        max_batch: int = 16,
        max_wait: float = 0.002,
        max_rows: int = 4096,
        observe: Callable[[int], None] = lambda _rows: None,
    ) -> None:
        self._classify, self._observe = classify, observe
        self._max_batch, self._max_wait, self._max_rows = max_batch, max_wait, max_rows
        self._jobs: list[Job] = []
        self._pool: list[Waiting] = []  # in the order of arrival
        self._rows, self._closed = 0, False
        self._changed = threading.Condition()  # its lock guards all of the above, and every job
        self._workers = [threading.Thread(target=self._work, name="engine", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def rows(self) -> int:
        """Rows that wait or are being computed."""
        return self._rows

    def submit(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Future[np.ndarray]:
        """The logits to come, float32 [rows, labels]; or the DataError that says what is wrong with a text.

        Raises:
            Full: the queue has no room for as many rows.
            Closed: `close` was called.
        """
        job = Job(list(texts), None if pairs is None else list(pairs), time.monotonic())
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down", "send the request to another one")
            if self._rows + len(texts) > self._max_rows:
                raise Full(
                    f"{self._rows} rows wait already; {self._max_rows} may", "send the request again in a moment"
                )
            self._rows += len(texts)
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer everything that waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        while self._wait():
            self._admit(self._take())
            if batch := self._pick():
                self._compute(batch)

    def _wait(self) -> bool:
        """Wait for rows, and for their company as long as that is worth it; whether there are any, else: it is over."""
        with self._changed:
            while not self._closed and (left := self._patience()) != 0:
                self._changed.wait(left)
            return bool(self._jobs or self._pool)

    def _take(self) -> list[Job]:
        with self._changed:
            arrived, self._jobs = self._jobs, []
        return arrived

    def _patience(self) -> float | None:
        """Seconds that the oldest row may still wait for others: 0 with a full batch, None where there is no row."""
        if not self._jobs and not self._pool:
            return None
        waiting = len(self._pool) + sum(len(job.texts) for job in self._jobs)
        if waiting >= self._max_batch:
            return 0.0
        oldest = self._pool[0].job if self._pool else self._jobs[0]
        return max(0.0, oldest.arrived + self._max_wait - time.monotonic())

    def _admit(self, jobs: list[Job]) -> None:
        """Encode what arrived, all of a kind in one call."""
        taken = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        self._forget(sum(len(job.texts) for job in jobs) - sum(len(job.texts) for job in taken))
        for kind in (True, False):
            group = [job for job in taken if (job.pairs is None) == kind]
            if not group:
                continue
            try:
                self._encode(group)
            except Exception:  # one text of many spoils the call; its own request must be the only one to fail
                for job in group:
                    self._encode_alone(job)

    def _encode(self, jobs: list[Job]) -> None:
        texts = [text for job in jobs for text in job.texts]
        pairs = None if jobs[0].pairs is None else [pair for job in jobs for pair in job.pairs or ()]
        rows = iter(self._classify.encode(texts, pairs) if texts else ())
        encoded = []
        for job in jobs:
            job.left = len(job.texts)
            job.logits = np.empty((job.left, len(self._classify.names)), np.float32)
            encoded += [Waiting(next(rows), job, place) for place in range(job.left)]
            if not job.left:
                job.future.set_result(job.logits)
        with self._changed:
            self._pool += encoded

    def _encode_alone(self, job: Job) -> None:
        try:
            self._encode([job])
        except Exception as error:
            self._forget(len(job.texts))
            job.future.set_exception(error)

    def _pick(self) -> list[Waiting]:
        """The row that has waited longest, and its nearest neighbours in length; they leave the pool.

        A neighbour joins where it makes the batch cheaper by the token, its padding counted; else it is left for later.
        Nothing is picked where other workers were faster.
        """
        with self._changed:
            picked = self._nearest() if self._pool else []
            if self._pool:  # a worker that sleeps takes what this one leaves
                self._changed.notify()
        return picked

    def _nearest(self) -> list[Waiting]:
        lengths = [len(waiting.row.ids) for waiting in self._pool]
        nearest = sorted(range(len(lengths)), key=lambda place: abs(lengths[place] - lengths[0]))
        chosen, longest, real = {0}, lengths[0], lengths[0]
        for place in nearest[1:]:  # sorting is stable: of equals, the oldest
            if (rows := len(chosen)) == self._max_batch:
                break
            wider, more = max(longest, lengths[place]), real + lengths[place]
            if more * (FIXED + longest * rows) >= real * (FIXED + wider * (rows + 1)):
                chosen.add(place)
                longest, real = wider, more
        picked = [self._pool[place] for place in sorted(chosen)]
        self._pool = [waiting for place, waiting in enumerate(self._pool) if place not in chosen]
        return picked

    def _compute(self, batch: list[Waiting]) -> None:
        try:
            logits = self._classify.compute([waiting.row for waiting in batch])
        except Exception as error:
            self._fail({id(waiting.job): waiting.job for waiting in batch}, error, len(batch))
            return
        self._forget(len(batch))
        self._observe(len(batch))
        done = []
        with self._changed:  # another worker may have rows of the same job
            for waiting, row in zip(batch, logits, strict=True):
                waiting.job.logits[waiting.place] = row
                waiting.job.left -= 1
                if not waiting.job.left:
                    done.append(waiting.job)
        for job in done:
            job.future.set_result(job.logits)

    def _fail(self, jobs: dict[int, Job], error: Exception, rows: int) -> None:
        """Tell the requests of a batch that it could not be computed; their other rows need not be."""
        with self._changed:
            rest = [waiting for waiting in self._pool if id(waiting.job) not in jobs]
            self._rows -= rows + len(self._pool) - len(rest)
            self._pool = rest
            untold = [job for job in jobs.values() if not job.failed]
            for job in untold:
                job.failed = True
        for job in untold:
            job.future.set_exception(error)

    def _forget(self, rows: int) -> None:
        with self._changed:
            self._rows -= rows
