"""Dynamic batching: rows of many requests are computed together, in worker threads.

A free worker tokenizes what has arrived and adds it to the queue that all workers share. It then
computes the row that has waited longest, together with the queued rows nearest to it in length, at
most `max_batch` of them. So there is hardly any padding, no row waits for ever, and a request is
answered as soon as its own rows are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from spdtool.errors import DataError, SpdError, first_line
from spdtool.export.classifier import Classifier, RowLogits
from spdtool.export.token_rows import TokenRow

# Every batch costs about as much as this many tokens before its first row. Measured: 8 and 32 were
# slower than 16 (six layers of 384, one thread).
OVERHEAD_TOKENS = 16
# Requests are tokenized together up to so many characters, of which each takes up to 50 bytes until it is cut.
CHARACTERS_AT_ONCE = 2**18


class QueueFull(SpdError):
    """Too many rows are queued; the client may send the request again later."""


class ServerClosing(SpdError):
    """The server is about to end and accepts no further rows."""


class EngineError(SpdError):
    """The tokenizer or the model failed on a request; it says nothing about other requests."""


class EngineDied(SpdError):
    """A worker thread has ended before it was told to: the process has to be started anew."""


@dataclass(eq=False)  # hashed by identity: two requests may have the same texts
class PendingRequest:
    """A request that is being worked on.

    Attributes:
        rows: its tokenized rows; a text may be several windows.
        logits: of each row, filled in as batches are computed.
        rows_to_do: rows without logits yet; it never reaches 0 for a request that failed.
    """

    texts: list[str]
    pairs: list[str] | None
    arrived: float
    future: Future[Any] = field(default_factory=Future)
    rows: list[TokenRow] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    rows_to_do: int = 0  # set when the request is tokenized

    def count_characters(self) -> int:
        """Count the characters of all of its texts."""
        return sum(map(len, self.texts)) + sum(map(len, self.pairs or ()))


@dataclass(frozen=True)
class QueuedRow:
    """One tokenized row: the request it belongs to, and its index in that request."""

    tokens: TokenRow
    request: PendingRequest
    index: int


class Batcher:
    """A queue of requests, and the worker threads that answer them.

    Args:
        classify: computes the rows; `encode` and `compute` are called by several threads at once.
        workers: batches that are computed at the same time.
        max_batch: most rows of a batch.
        max_wait: seconds that a row waits for others while the batch is not full.
        max_rows: most rows in the queue; further requests are refused.
        observe: called with the number of rows of every computed batch.
        check: called after every computed batch; what it raises is the answer to the batch's requests.
        on_death: called once, in the thread that ends although nobody closed the batcher.
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
        check: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._classify, self._observe, self._check, self._on_death = classify, observe, check, on_death
        self._max_batch, self._max_wait, self._max_rows = max_batch, max_wait, max_rows
        self._arrived: list[PendingRequest] = []  # not tokenized yet
        self._queue: list[QueuedRow] = []  # in order of arrival
        self._unanswered: set[PendingRequest] = set()  # wherever they are, so that a dying worker can answer them
        self._rows, self._closed = 0, False
        self._death: EngineDied | None = None
        self._changed = threading.Condition()  # its lock guards everything above, and every pending request
        self._workers = [threading.Thread(target=self._run_worker, name="engine", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def rows(self) -> int:
        """Number of rows that are queued or being computed."""
        return self._rows

    @property
    def untokenized(self) -> int:
        """Number of requests that no worker has looked at yet."""
        return len(self._arrived)

    @property
    def running_workers(self) -> int:
        """Number of worker threads that are alive."""
        return sum(worker.is_alive() for worker in self._workers)

    @property
    def death(self) -> EngineDied | None:
        """Why a worker ended although nobody closed the batcher; None while all is well."""
        return self._death

    def submit(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Future[Any]:
        """Queue a request.

        Returns:
            A future of the outputs, one entry for each text, as `Classifier.group` returns them. It raises
            DataError for a text that cannot be classified.

        Raises:
            QueueFull: the queue has no room for that many rows.
            ServerClosing: `close` was called.
            EngineDied: a worker has ended.
        """
        second_texts = None if pairs is None else list(pairs)
        request = PendingRequest(list(texts), second_texts, arrived=time.monotonic())
        with self._changed:
            if self._death is not None:
                raise self._death
            if self._closed:  # a worker may have ended already: nobody would answer
                raise ServerClosing("the server is shutting down", "send the request to another one")
            if self._rows + len(texts) > self._max_rows:
                raise QueueFull(
                    f"{self._rows} rows wait already; {self._max_rows} may", "send the request again in a moment"
                )
            self._rows += len(texts)
            self._arrived.append(request)
            self._unanswered.add(request)
            self._changed.notify()  # one is enough: a worker takes all that has arrived
        return request.future

    def close(self, seconds: float | None = None) -> None:
        """Answer everything that is queued, then end the threads.

        Args:
            seconds: how long to wait for the threads, of which one may hang in native code; None: for ever.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if seconds is None else time.monotonic() + seconds
        for worker in self._workers:
            worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run_worker(self) -> None:
        """Run one worker thread; if it ends by an error, answer everybody and say so."""
        try:
            self._work()
        # Every exception: the one that a panic of the tokenizer raises is no Exception.
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """Answer every request with the death of a worker, and accept no further ones."""
        with self._changed:
            already_dead = self._death is not None
            self._death = self._death or EngineDied(
                f"a worker thread has ended: {describe_error(error)}", "start the server again"
            )
            self._closed = True
            unanswered = list(self._unanswered)
            self._arrived, self._queue = [], []
            self._changed.notify_all()
        for request in unanswered:
            self._answer(request, self._death)
        if not already_dead:
            self._on_death()

    def _answer(self, request: PendingRequest, answer: Any) -> None:
        """Answer a request, unless it has been answered already."""
        with self._changed:
            if request not in self._unanswered:
                return
            self._unanswered.discard(request)
        # A request that no worker has looked at is pending still: its client may have given up.
        if not request.future.running() and not request.future.set_running_or_notify_cancel():
            return
        if isinstance(answer, BaseException):
            request.future.set_exception(answer)
        else:
            request.future.set_result(answer)

    def _work(self) -> None:
        """Serve the queue until it is closed and empty."""
        while self._wait_for_rows():
            self._tokenize(self._take_arrived())
            batch = self._pick_batch()
            if batch:
                self._compute(batch)

    def _wait_for_rows(self) -> bool:
        """Wait until a batch is due; return False once the queue is closed and empty."""
        with self._changed:
            while not self._closed:
                seconds = self._seconds_until_due()
                if seconds == 0:
                    break
                self._changed.wait(seconds)
            return bool(self._arrived or self._queue)

    def _seconds_until_due(self) -> float | None:
        """Seconds that the oldest row may still wait for others: 0 if a batch is full, None without any row."""
        if not self._arrived and not self._queue:
            return None
        waiting = len(self._queue) + sum(len(request.texts) for request in self._arrived)
        if waiting >= self._max_batch:  # company could not make this batch any larger
            return 0.0
        oldest = self._queue[0].request if self._queue else self._arrived[0]
        return max(0.0, oldest.arrived + self._max_wait - time.monotonic())

    def _take_arrived(self) -> list[PendingRequest]:
        """Take the oldest requests that no worker has looked at, as many as are tokenized together."""
        with self._changed:
            count = characters = 0
            while count < len(self._arrived) and characters < CHARACTERS_AT_ONCE:
                characters += self._arrived[count].count_characters()
                count += 1
            arrived, self._arrived = self._arrived[:count], self._arrived[count:]
            if self._arrived:
                self._changed.notify()
        return arrived

    def _tokenize(self, requests: list[PendingRequest]) -> None:
        """Tokenize the requests and queue their rows: single texts in one call, pairs in another."""
        running = []
        for request in requests:
            if request.future.set_running_or_notify_cancel():
                running.append(request)
            else:  # the client has gone
                self._subtract_rows(len(request.texts))
                with self._changed:
                    self._unanswered.discard(request)
        singles = [request for request in running if request.pairs is None]
        paired = [request for request in running if request.pairs is not None]
        for group in (singles, paired):
            if not group:
                continue
            try:
                self._queue_rows(group)
            except BaseException:  # one bad text spoils the whole call; only its own request may fail
                for request in group:
                    self._queue_rows_alone(request)

    def _queue_rows(self, requests: list[PendingRequest]) -> None:
        """Tokenize requests of one kind in one call and add their rows to the queue."""
        texts: list[str] = []
        pairs: list[str] = []
        for request in requests:
            texts += request.texts
            pairs += request.pairs or []
        second_texts = None if requests[0].pairs is None else pairs
        encoded = self._classify.encode(texts, second_texts) if texts else []  # a request may be empty
        by_text: list[list[TokenRow]] = [[] for _ in texts]
        for index, row in enumerate(encoded):
            number = index if row.window is None else row.window.example
            if number >= len(texts):
                break
            by_text[number].append(row)
        if not all(by_text) or sum(map(len, by_text)) != len(encoded):
            raise EngineError(f"the tokenizer gave {len(encoded)} rows for {len(texts)} texts")
        rows_of_texts = iter(by_text)
        for request in requests:
            request.rows = list(chain.from_iterable(islice(rows_of_texts, len(request.texts))))
            request.rows_to_do = len(request.rows)
            request.logits = [np.empty(0)] * request.rows_to_do
        for request in requests:
            problem = self._queue_request(request)
            if problem is not None:
                self._answer(request, problem)
            elif request.rows_to_do == 0:
                self._complete(request)

    def _queue_request(self, request: PendingRequest) -> SpdError | None:
        """Add the rows of a tokenized request to the queue; return why there is no room for them, or None."""
        windows = len(request.rows) - len(request.texts)  # beyond the first one of each text
        with self._changed:
            waiting = self._rows - len(request.texts)
            if windows and self._rows + windows > self._max_rows:
                self._rows = waiting
            else:
                self._rows += windows
                self._queue += [QueuedRow(row, request, index) for index, row in enumerate(request.rows)]
                return None
        problem = f"the texts are {len(request.rows):,} windows of the longest input"
        if len(request.rows) > self._max_rows:
            return DataError(f"{problem}; {self._max_rows:,} rows may wait", "send shorter texts, or several requests")
        problem += f", and {waiting:,} rows wait already; {self._max_rows:,} may"
        return QueueFull(problem, "send the request again in a moment")

    def _complete(self, request: PendingRequest) -> None:
        """Answer a request whose rows are all computed."""
        logits: RowLogits = request.logits
        if self._classify.decision.windows is None:
            logits = np.empty((0, len(self._classify.names)), np.float32)
            if request.logits:
                logits = np.stack(request.logits)
        self._answer(request, self._classify.group(request.rows, logits))

    def _queue_rows_alone(self, request: PendingRequest) -> None:
        """Tokenize one request; if that fails, the request gets the error."""
        try:
            self._queue_rows([request])
        except BaseException as error:
            self._subtract_rows(len(request.texts))
            self._answer(request, as_answer(error))

    def _pick_batch(self) -> list[QueuedRow]:
        """Take a batch off the queue; an empty one if other workers were faster."""
        with self._changed:
            if not self._queue:
                return []
            batch = self._pop_nearest_rows()
            self._changed.notify()  # a sleeping worker may take what stays in the queue
        return batch

    def _pop_nearest_rows(self) -> list[QueuedRow]:
        """Pop the oldest row and its neighbours in length.

        A neighbour joins only where it lowers the batch's cost per real token, its padding counted.
        """
        lengths = [len(row.tokens.ids) for row in self._queue]
        # Python's sort is stable: of rows equally near in length the oldest comes first.
        by_distance = sorted(range(len(lengths)), key=lambda index: abs(lengths[index] - lengths[0]))
        # The oldest row is always in the batch, so that none waits for ever.
        chosen, longest, real_tokens = {0}, lengths[0], lengths[0]
        for index in by_distance[1:]:
            rows = len(chosen)
            if rows == self._max_batch:
                break
            new_longest = max(longest, lengths[index])
            new_real_tokens = real_tokens + lengths[index]
            cost = OVERHEAD_TOKENS + longest * rows
            new_cost = OVERHEAD_TOKENS + new_longest * (rows + 1)
            if new_cost * real_tokens <= cost * new_real_tokens:  # both per real token, without dividing
                chosen.add(index)
                longest, real_tokens = new_longest, new_real_tokens
        batch = [self._queue[index] for index in sorted(chosen)]
        self._queue = [row for index, row in enumerate(self._queue) if index not in chosen]
        return batch

    def _compute(self, batch: list[QueuedRow]) -> None:
        """Compute a batch and answer the requests that are complete with it."""
        try:
            logits = self._compute_logits(batch)
        except BaseException as error:
            rows_of_requests: dict[PendingRequest, list[QueuedRow]] = {}
            for queued in batch:
                rows_of_requests.setdefault(queued.request, []).append(queued)
            if len(rows_of_requests) == 1:
                self._fail(batch, as_answer(error))
            else:  # one bad row spoils the whole batch; only its own request may fail
                for rows in rows_of_requests.values():
                    self._compute(rows)
            return
        self._subtract_rows(len(batch))
        self._observe(len(batch))
        complete = []
        with self._changed:  # another worker may hold rows of the same request
            for row, row_logits in zip(batch, logits, strict=True):
                row.request.logits[row.index] = row_logits
                row.request.rows_to_do -= 1
                if row.request.rows_to_do == 0:
                    complete.append(row.request)
        for request in complete:
            self._complete(request)

    def _compute_logits(self, batch: list[QueuedRow]) -> RowLogits:
        """Compute the logits of every row.

        Raises:
            EngineError: the model gave another shape, or values that are no numbers.
        """
        logits = self._classify.compute([row.tokens for row in batch])
        expected = (len(batch), len(self._classify.names))
        if isinstance(logits, np.ndarray) and logits.shape != expected:
            raise EngineError(f"the model gave an output of the shape {[*logits.shape]}, not {[*expected]}")
        if not all(np.isfinite(values).all() for values in logits):
            raise EngineError("the model gave values that are no finite numbers")
        self._check()
        return logits

    def _fail(self, batch: list[QueuedRow], error: SpdError) -> None:
        """Answer every request of a batch with the error, and drop their other rows from the queue."""
        requests = {row.request for row in batch}
        with self._changed:
            # The request has its error already: its other rows would be computed for nobody.
            remaining = [row for row in self._queue if row.request not in requests]
            self._rows -= len(batch) + len(self._queue) - len(remaining)
            self._queue = remaining
        for request in requests:
            self._answer(request, error)

    def _subtract_rows(self, rows: int) -> None:
        with self._changed:
            self._rows -= rows


def as_answer(error: BaseException) -> SpdError:
    """Return the error that a client gets: one of ours as it is, any other as an EngineError."""
    if isinstance(error, SpdError):
        return error
    answer = EngineError(f"the model could not answer: {describe_error(error)}")
    answer.__cause__ = error
    return answer


def describe_error(error: BaseException) -> str:
    """Name the class of an error, and what it says first."""
    return f"{type(error).__name__}: {first_line(error)}"
