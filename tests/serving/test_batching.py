"""Dynamic batching: each request gets its own results, batches have similar lengths, no request waits forever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spdtool
from spdtool.data.windows import TextWindow
from spdtool.errors import DataError, SpdError
from spdtool.export.token_rows import TokenRow
from spdtool.serving import batching
from spdtool.serving.batching import Batcher, EngineDied, EngineError, QueueFull, ServerClosing
from spdtool.tasks.decision import OneLabel


class Panic(BaseException):
    """Imitates pyo3's PanicException, which does not derive from Exception."""


class Engine:
    """Stub classifier: the text "7" has 7 tokens and the logits 7 and 14.

    Attributes:
        batches: lengths of the rows of each batch. encoded: texts of each call of the tokenizer.
        windows: how many windows each text has.
        gate: event that every computation waits for.
        meeting: barrier of concurrent computations, if set.
    """

    names = ("a", "b")
    decision = OneLabel(names)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.encoded: list[int] = []
        self.windows = 0
        self.gate = threading.Event()
        self.gate.set()
        self.meeting: threading.Barrier | None = None

    def encode(self, texts: list[str], pairs: list[str] | None = None) -> list[TokenRow]:
        if "bad" in texts:
            raise DataError("a text is bad")
        if "666" in texts:
            raise Panic("the tokenizer panicked")
        if "777" in texts:
            return []
        self.encoded.append(len(texts))
        numbers = [int(text) + (int(pairs[index]) if pairs else 0) for index, text in enumerate(texts)]
        rows = [TokenRow(np.full(count, count), np.zeros(count), np.ones(count)) for count in numbers]
        if self.windows == 0:
            return rows
        windows = []
        for number, row in enumerate(rows):
            window = TextWindow(number, texts[number], np.zeros((0, 2)), np.zeros(0))
            windows += [replace(row, window=window)] * self.windows
        return windows

    def group(self, _rows: list[TokenRow], logits: np.ndarray) -> np.ndarray:
        return logits

    def compute(self, rows: list[TokenRow]) -> np.ndarray:
        assert self.gate.wait(10)
        lengths = [len(row.ids) for row in rows]
        self.batches.append(lengths)
        if self.meeting is not None:
            self.meeting.wait(10)
        if 13 in lengths:
            raise RuntimeError("the engine broke")
        if 14 in lengths:
            raise Panic("the model panicked")
        if 15 in lengths:
            return np.zeros((len(rows), 3), np.float32)
        if 16 in lengths:
            return np.full((len(rows), 2), np.nan, np.float32)
        return np.array([[len(row.ids), 2 * len(row.ids)] for row in rows], np.float32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


Make = Callable[..., Batcher]


@pytest.fixture
def make_batcher(engine: Engine) -> Iterator[Make]:
    """Return `make_batcher(max_batch=4)`, which makes a batcher of the stub; all are closed at the end."""
    batchers: list[Batcher] = []

    def make(**options: Any) -> Batcher:
        batchers.append(Batcher(engine, **{"max_wait": 0.0} | options))  # type: ignore[arg-type]
        return batchers[-1]

    yield make
    engine.gate.set()
    for batcher in batchers:
        batcher.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_each_request_gets_the_results_of_its_rows(make_batcher: Make, workers: int) -> None:
    batcher = make_batcher(max_batch=3, workers=workers)
    requests = [[str(1 + (7 * request + row) % 12) for row in range(request % 5)] for request in range(200)]
    futures = [batcher.submit(texts) for texts in requests]
    for texts, future in zip(requests, futures, strict=True):
        assert future.result(10)[:, 0].tolist() == [int(text) for text in texts]
        assert future.result()[:, 1].tolist() == [2 * int(text) for text in texts]
    assert batcher.rows == 0


def test_pairs_and_single_texts_do_not_mix(make_batcher: Make) -> None:
    batcher = make_batcher()
    futures = [
        batcher.submit(["1"], ["4"]),
        batcher.submit(["2"]),
        batcher.submit([], []),
        batcher.submit(["3"], ["5"]),
    ]
    assert [future.result(10)[:, 0].tolist() for future in futures] == [[5], [2], [], [8]]


def test_a_batch_holds_the_oldest_row_and_its_neighbours_in_length(make_batcher: Make, engine: Engine) -> None:
    engine.gate.clear()
    batcher = make_batcher(max_batch=3)
    first = batcher.submit(["1"])
    while batcher.untokenized:  # it is being computed, and waits at the gate
        time.sleep(0.001)
    remaining = batcher.submit(["50", "20", "49", "10", "51", "49", "20", "26"])
    engine.gate.set()
    assert first.result(10).shape == (1, 2)
    assert remaining.result(10)[:, 0].tolist() == [50, 20, 49, 10, 51, 49, 20, 26]
    assert engine.batches == [[1], [50, 49, 51], [20, 20], [10, 26], [49]]


def test_a_partial_batch_waits_no_longer_than_max_wait(make_batcher: Make, engine: Engine) -> None:
    batcher = make_batcher(max_batch=4, max_wait=0.2)
    start = time.monotonic()
    futures = [batcher.submit(["40"]), batcher.submit(["41"])]
    assert [future.result(10)[0, 0] for future in futures] == [40, 41]
    assert 0.15 < time.monotonic() - start < 5
    assert engine.batches == [[40, 41]]
    full = batcher.submit(["40", "41", "40", "41"])  # nothing to wait for
    start = time.monotonic()
    full.result(10)
    assert time.monotonic() - start < 0.15


def test_a_text_that_cannot_be_encoded_fails_alone(make_batcher: Make, engine: Engine) -> None:
    engine.gate.clear()
    batcher = make_batcher()
    first, bad, third = batcher.submit(["1"]), batcher.submit(["2", "bad"]), batcher.submit(["3"])
    engine.gate.set()
    assert (first.result(10)[0, 0], third.result(10)[0, 0]) == (1, 3)
    with pytest.raises(DataError, match="a text is bad"):
        bad.result(10)
    assert batcher.rows == 0


def test_an_engine_error_fails_only_the_request_that_caused_it(make_batcher: Make) -> None:
    batcher = make_batcher(max_batch=1)
    broken, fine = batcher.submit(["13", "1", "1"]), batcher.submit(["5"])
    with pytest.raises(EngineError, match="the engine broke"):
        broken.result(10)
    assert fine.result(10)[0, 0] == 5
    assert batcher.rows == 0


def test_every_kind_of_failure_fails_only_its_own_request(make_batcher: Make, engine: Engine) -> None:
    for text, message in (
        ("bad", "a text is bad"),
        ("666", "the tokenizer panicked"),
        ("777", "gave 0 rows for 1 texts"),
        ("13", "the engine broke"),
        ("14", "the model panicked"),
        ("15", r"the shape \[1, 3\], not \[1, 2\]"),
        ("16", "no finite numbers"),
    ):
        engine.gate.clear()
        batcher = make_batcher(max_batch=8)
        first = batcher.submit(["1"])
        while batcher.untokenized:
            time.sleep(0.001)
        # All of these are tokenized in one call and computed in one batch.
        failing, others = batcher.submit([text]), [batcher.submit(["4", "5"]), batcher.submit(["6"])]
        engine.gate.set()
        with pytest.raises(SpdError, match=message):
            failing.result(10)
        assert [future.result(10)[:, 0].tolist() for future in (first, *others)] == [[1], [4, 5], [6]], text
        assert batcher.submit(["7"]).result(10)[0, 0] == 7, text
        assert (batcher.rows, batcher.death, batcher.running_workers) == (0, None, 1), text


@pytest.mark.parametrize("workers", [1, 3])
def test_a_dying_worker_fails_all_requests_and_reports_once(make_batcher: Make, engine: Engine, workers: int) -> None:
    deaths: list[str] = []

    def fail(_rows: int) -> None:
        raise Panic("a bug of ours")

    engine.gate.clear()
    batcher = make_batcher(workers=workers, max_batch=1, observe=fail, on_death=lambda: deaths.append("died"))
    futures = [batcher.submit([str(number)]) for number in range(1, 10)]
    engine.gate.set()
    for future in futures:
        with pytest.raises(EngineDied, match="a bug of ours"):
            future.result(10)
    with pytest.raises(EngineDied, match="a bug of ours"):
        batcher.submit(["1"])
    batcher.close()
    assert (deaths, batcher.running_workers) == (["died"], 0)


def test_the_check_runs_before_each_result_is_returned(make_batcher: Make) -> None:
    errors: list[DataError] = []

    def check() -> None:
        if errors:
            raise errors[0]

    batcher = make_batcher(check=check)
    assert batcher.submit(["1"]).result(10)[0, 0] == 1
    errors.append(DataError("the folder has changed"))
    with pytest.raises(DataError, match="the folder has changed"):
        batcher.submit(["1"]).result(10)
    errors.clear()
    assert batcher.submit(["2"]).result(10)[0, 0] == 2


def test_a_full_queue_refuses_requests_until_it_has_room(make_batcher: Make, engine: Engine) -> None:
    engine.gate.clear()
    batcher = make_batcher(max_rows=3)
    accepted = batcher.submit(["1", "2"])
    with pytest.raises(QueueFull, match="2 rows wait already; 3 may"):
        batcher.submit(["1", "2"])
    engine.gate.set()
    accepted.result(10)
    assert batcher.submit(["1", "2", "3"]).result(10).shape == (3, 2)


def test_windows_of_long_texts_fill_the_queue_no_further_than_rows_do(make_batcher: Make, engine: Engine) -> None:
    engine.windows = 3
    batcher = make_batcher(max_rows=7, max_batch=1)
    with pytest.raises(DataError, match="9 windows of the longest input; 7 rows may wait"):
        batcher.submit(["1", "2", "3"]).result(10)
    engine.gate.clear()
    first = batcher.submit(["1", "2"])
    while batcher.untokenized:
        time.sleep(0.001)
    second, third = batcher.submit(["3"]), batcher.submit([])
    engine.gate.set()
    with pytest.raises(QueueFull, match="3 windows of the longest input, and 5 rows wait already; 7 may"):
        second.result(10)
    assert (len(first.result(10)), len(third.result(10))) == (6, 0)
    assert len(batcher.submit(["4", "5"]).result(10)) == 6
    assert batcher.rows == 0


def test_large_requests_are_tokenized_one_after_the_other(
    make_batcher: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CHARACTERS_AT_ONCE", 4)
    engine.gate.clear()
    batcher = make_batcher(max_batch=1)
    futures = [batcher.submit(["1"])]
    while batcher.untokenized:
        time.sleep(0.001)
    futures += [batcher.submit(texts) for texts in (["1", "2"], ["3", "4"], ["0005", "6"], ["7"], ["8"])]
    engine.gate.set()
    for future, count in zip(futures, (1, 2, 2, 2, 1, 1), strict=True):
        assert len(future.result(10)) == count
    assert engine.encoded == [1, 4, 2, 2]  # texts of single requests are not divided
    assert batcher.rows == 0


def test_a_cancelled_request_is_not_computed(make_batcher: Make, engine: Engine) -> None:
    engine.gate.clear()
    batcher = make_batcher(max_batch=1)
    first = batcher.submit(["1"])
    while batcher.untokenized:
        time.sleep(0.001)
    cancelled = batcher.submit(["2", "3"])
    assert cancelled.cancel()
    engine.gate.set()
    first.result(10)
    assert batcher.submit(["4"]).result(10)[0, 0] == 4
    assert [1] in engine.batches
    assert [2] not in engine.batches
    assert batcher.rows == 0


def test_workers_compute_at_the_same_time(make_batcher: Make, engine: Engine) -> None:
    engine.meeting = threading.Barrier(3)
    batcher = make_batcher(workers=3, max_batch=1)
    assert batcher.submit(["1", "2", "3", "4", "5", "6"]).result(20)[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(engine.batches) == [[1], [2], [3], [4], [5], [6]]


def test_a_batch_that_breaks_fails_its_own_request_and_no_other_worker(make_batcher: Make, engine: Engine) -> None:
    engine.meeting = threading.Barrier(3)
    batcher = make_batcher(workers=3, max_batch=1)
    broken, fine = batcher.submit(["13", "13", "2"]), batcher.submit(["5", "6", "7"])  # each trio is computed at once
    with pytest.raises(EngineError, match="the engine broke"):
        broken.result(20)
    assert fine.result(20)[:, 0].tolist() == [5, 6, 7]
    assert batcher.submit(["8", "9", "10"]).result(20)[:, 0].tolist() == [8, 9, 10]  # all three are still there
    assert batcher.rows == 0


def test_many_clients_of_several_workers_get_their_own_answers(make_batcher: Make) -> None:
    batcher = make_batcher(workers=3, max_batch=5, max_wait=0.001)

    def client(number: int) -> int:
        mismatches = 0
        for request in range(40):
            texts = [str(20 + (7 * number + 5 * request + row) % 40) for row in range(1 + request % 4)]
            mismatches += batcher.submit(texts).result(20)[:, 0].tolist() != [int(text) for text in texts]
        return mismatches

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(client, range(16))) == 0
    assert batcher.rows == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_closing_finishes_waiting_requests_and_refuses_new_ones(
    make_batcher: Make, engine: Engine, workers: int
) -> None:
    engine.gate.clear()
    batcher = make_batcher(workers=workers, max_batch=2, max_wait=30.0)
    futures = [batcher.submit([str(number)]) for number in range(1, 6)]
    threading.Timer(0.05, engine.gate.set).start()
    batcher.close()
    assert [future.result(0)[0, 0] for future in futures] == [1, 2, 3, 4, 5]
    assert batcher.running_workers == 0
    with pytest.raises(ServerClosing):
        batcher.submit(["1"])


def test_several_threads_can_use_one_classifier(older_bundle: Path) -> None:
    classify = spdtool.load(older_bundle, variant="onnx", threads=1)
    texts = [" ".join(("good", "bad", "film", "very")[: 1 + index % 4]) for index in range(48)]
    batches = [texts[start : start + 4] for start in range(0, len(texts), 3)]
    expected = [classify.compute(classify.encode(batch)) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda batch: classify.compute(classify.encode(batch)), batches))
            assert all(map(np.array_equal, actual, expected))
