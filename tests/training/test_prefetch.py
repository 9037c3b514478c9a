"""Batches made ahead by a thread: the same ones, in order, and no thread that outlives its loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches are made ahead on the CPU too; gives the steps for which they were, by another thread than the loop's."""
    loop, made = threading.current_thread(), []

    def ready(batches: Iterator[prefetch.StepBatch], _device: torch.device) -> Any:
        def noted() -> Iterator[prefetch.StepBatch]:
            for batch in batches:
                assert threading.current_thread() is not loop
                made.append(batch[0])
                yield prefetch.pin_batch(batch)

        return prefetch.iterate_ahead(noted())

    monkeypatch.setattr(prefetch, "prefetch_batches", ready)
    return made


def test_the_items_come_in_order_and_a_few_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with prefetch.iterate_ahead(items()) as taken:
        for count, number in enumerate(taken):
            assert number == count
            assert len(made) <= count + 1 + STEPS_AHEAD
            assert len(working()) == 1
    assert made == list(range(20))
    assert not working()


def test_an_error_is_raised_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise DataError("row 5 cannot be read")

    seen: list[int] = []
    with pytest.raises(DataError, match="row 5 cannot be read"), prefetch.iterate_ahead(items()) as taken:
        seen.extend(taken)
    assert not seen or seen == list(range(5))
    seen.clear()
    with pytest.raises(DataError), prefetch.iterate_ahead(items()) as taken:
        for item in taken:
            seen.append(item)
    assert seen == list(range(5))
    assert not working()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_the_thread_ends_with_the_loop(how: str) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10**9):
            made.append(number)
            yield number

    def loop() -> None:
        with prefetch.iterate_ahead(items()) as taken:
            for number in taken:
                if number == 3 and how == "raise":
                    raise KeyboardInterrupt
                if number == 3:
                    break

    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            loop()
    else:
        loop()
    assert not working()
    assert len(made) <= 4 + STEPS_AHEAD


def test_on_a_cpu_there_is_no_thread_and_batches_are_made_when_asked_for() -> None:
    made: list[int] = []

    def batches() -> Iterator[prefetch.StepBatch]:
        for step in range(3):
            made.append(step)
            yield step, 0, ()

    with prefetch.prefetch_batches(batches(), CPU) as taken:
        assert next(taken)[0] == 0
        assert made == [0]
        assert not working()


def test_pieces_are_the_same_as_tensors(toys: Any, toy_task: Callable[..., Any]) -> None:
    rows = data.encode_splits(toys.tokenizer(), toy_task(train=10).dataset.load(None, 0), 32)["train"]
    cut, batch = MicrobatchSplitter(accumulate=3), np.arange(10)
    step, size, pieces = prefetch.pin_batch((7, 10, cut.split(rows, batch)))
    assert (step, size) == (7, 10)
    for mine, its in zip(pieces, cut.split(rows, batch), strict=True):
        assert mine.weight == its.weight
        assert mine.batch.keys() == its.batch.keys()
        for name, column in its.batch.items():
            assert torch.equal(mine.batch[name], torch.from_numpy(column))


CRITERION = ("prune.criterion=movement", "prune.calibration=0", "prune.first=none")


@pytest.mark.parametrize("how", [pytest.param((), marks=pytest.mark.long), ("prune.accumulate=3",), CRITERION])
def test_a_stage_ends_with_the_same_weights(
    toy_run: Callable[..., Run], always: list[int], monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    sets = (*how, "prune.grafting.start=0.5", "prune.dropout=0.1", "teacher_states_gb=0.0")
    ahead = toy_run(*sets, until="prune", folder="ahead")
    assert always == [*range(12), *range(12)], "the teacher's steps, and the student's"
    monkeypatch.undo()
    plain = toy_run(*sets, until="prune", folder="plain")
    assert len(always) == 24
    assert (ahead.path / "prune/model.safetensors").read_bytes() == (
        plain.path / "prune/model.safetensors"
    ).read_bytes()
    assert not working()


def test_an_interrupted_stage_goes_on_from_its_step(
    toy_run: Callable[..., Run], always: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("prune.dropout=0.1", "save_minutes=0", "teacher_states_gb=0.0")
    whole = toy_run(*how, until="prune", folder="whole")
    run = toy_run(*how, until="teacher", folder="stopped")
    always.clear()
    after = torch.optim.AdamW.step

    def stop(optimizer: Any, *args: Any, **options: Any) -> Any:
        if always and len(always) > 5 + STEPS_AHEAD:
            raise KeyboardInterrupt
        return after(optimizer, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.AdamW, "step", stop)
        prune(run)
    assert not working()
    always.clear()
    prune(run)
    assert 0 < always[0] < 10
    assert always == list(range(always[0], 12))
    assert (run.path / "prune/model.safetensors").read_bytes() == (whole.path / "prune/model.safetensors").read_bytes()
