"""Prefetching by a thread: the same batches in the same order, and the thread ends with its loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.errors import DataError
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.training import prefetch
from spdtool.training.microbatches import MicrobatchSplitter
from spdtool.training.prefetch import STEPS_AHEAD

pytestmark = pytest.mark.slow  # it trains whole stages

CPU = torch.device("cpu")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture
def prefetched_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefetch on the CPU too; return the list of prefetched steps."""
    loop, steps = threading.current_thread(), []

    def prefetch_recorded(batches: Iterator[prefetch.StepBatch], _device: torch.device) -> Any:
        def record_steps() -> Iterator[prefetch.StepBatch]:
            for batch in batches:
                assert threading.current_thread() is not loop
                steps.append(batch[0])
                yield prefetch.pin_batch(batch)

        return prefetch.iterate_ahead(record_steps())

    monkeypatch.setattr(prefetch, "prefetch_batches", prefetch_recorded)
    return steps


def test_the_items_come_in_order_and_a_few_ahead() -> None:
    produced: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            produced.append(number)
            yield number

    with prefetch.iterate_ahead(items()) as consumed:
        for count, number in enumerate(consumed):
            assert number == count
            assert len(produced) <= count + 1 + STEPS_AHEAD
            assert len(prefetch_threads()) == 1
    assert produced == list(range(20))
    assert not prefetch_threads()


def test_an_error_of_the_iterator_is_raised_in_its_order() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise DataError("row 5 cannot be read")

    received: list[int] = []
    with pytest.raises(DataError, match="row 5 cannot be read"), prefetch.iterate_ahead(items()) as items_ahead:
        received.extend(items_ahead)
    assert not received or received == list(range(5))
    received.clear()
    with pytest.raises(DataError), prefetch.iterate_ahead(items()) as items_ahead:
        for item in items_ahead:
            received.append(item)
    assert received == list(range(5))
    assert not prefetch_threads()


@pytest.mark.parametrize("ending", ["break", "raise"])
def test_the_thread_ends_with_the_loop(ending: str) -> None:
    produced: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10**9):
            produced.append(number)
            yield number

    def loop() -> None:
        with prefetch.iterate_ahead(items()) as items_ahead:
            for number in items_ahead:
                if number == 3 and ending == "raise":
                    raise KeyboardInterrupt
                if number == 3:
                    break

    if ending == "raise":
        with pytest.raises(KeyboardInterrupt):
            loop()
    else:
        loop()
    assert not prefetch_threads()
    assert len(produced) <= 4 + STEPS_AHEAD


def test_on_a_cpu_there_is_no_thread_and_batches_are_made_when_asked_for() -> None:
    produced: list[int] = []

    def batches() -> Iterator[prefetch.StepBatch]:
        for step in range(3):
            produced.append(step)
            yield step, 0, ()

    with prefetch.prefetch_batches(batches(), CPU) as steps:
        assert next(steps)[0] == 0
        assert produced == [0]
        assert not prefetch_threads()


def test_pinned_micro_batches_equal_the_unpinned_ones(toys: ModuleType, toy_task: Callable[..., Any]) -> None:
    rows = data.encode_splits(toys.tokenizer(), toy_task(train=10).dataset.load(None, 0), 32)["train"]
    splitter, batch = MicrobatchSplitter(accumulate=3), np.arange(10)
    step, size, micro_batches = prefetch.pin_batch((7, 10, splitter.split(rows, batch)))
    assert (step, size) == (7, 10)
    for pinned, expected in zip(micro_batches, splitter.split(rows, batch), strict=True):
        assert pinned.weight == expected.weight
        assert pinned.batch.keys() == expected.batch.keys()
        for name, column in expected.batch.items():
            assert torch.equal(pinned.batch[name], torch.from_numpy(column))


CRITERION = ("prune.criterion=movement", "prune.calibration=0", "prune.first=none")


@pytest.mark.parametrize("assignments", [pytest.param((), marks=pytest.mark.long), ("prune.accumulate=3",), CRITERION])
def test_prefetching_does_not_change_the_weights(
    toy_run: Callable[..., Run],
    prefetched_steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
    assignments: tuple[str, ...],
) -> None:
    sets = (*assignments, "prune.grafting.start=0.5", "prune.dropout=0.1", "teacher_states_gb=0.0")
    prefetched = toy_run(*sets, until="prune", folder="ahead")
    assert prefetched_steps == [*range(12), *range(12)], "the teacher's steps, and the student's"
    monkeypatch.undo()
    synchronous = toy_run(*sets, until="prune", folder="plain")
    assert len(prefetched_steps) == 24
    assert (prefetched.path / "prune/model.safetensors").read_bytes() == (
        synchronous.path / "prune/model.safetensors"
    ).read_bytes()
    assert not prefetch_threads()


def test_an_interrupted_stage_with_prefetching_resumes_at_its_step(
    toy_run: Callable[..., Run], prefetched_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assignments = ("prune.dropout=0.1", "save_minutes=0", "teacher_states_gb=0.0")
    uninterrupted = toy_run(*assignments, until="prune", folder="whole")
    run = toy_run(*assignments, until="teacher", folder="stopped")
    prefetched_steps.clear()
    original_step = torch.optim.AdamW.step

    def stop(optimizer: Any, *args: Any, **options: Any) -> Any:
        if prefetched_steps and len(prefetched_steps) > 5 + STEPS_AHEAD:
            raise KeyboardInterrupt
        return original_step(optimizer, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.AdamW, "step", stop)
        prune(run)
    assert not prefetch_threads()
    prefetched_steps.clear()
    prune(run)
    assert 0 < prefetched_steps[0] < 10
    assert prefetched_steps == list(range(prefetched_steps[0], 12))
    assert (run.path / "prune/model.safetensors").read_bytes() == (
        uninterrupted.path / "prune/model.safetensors"
    ).read_bytes()
