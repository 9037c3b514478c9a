"""Phases that learn from texts without labels: what they train on, and the same bits after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spdtool.run.folder import Run
from spdtool.stages.phase import load_phase
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.training import loop


@pytest.fixture
def texts(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Any]) -> Path:
    toy_task(train=24, dev=8)
    file = tmp_path / "more.txt"
    file.write_text("".join(f"{text}\n" for text in toys.rows(40, seed=9).first))
    return file


def begun(folder: Path, toys: ModuleType, texts: Path | None, *sets: str) -> Run:
    recipe = toys.recipe("prune.epochs=2", *sets, unlabeled=None if texts is None else str(texts))
    run = Run.for_recipe(folder, recipe)
    teacher(run)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "prune" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_phase_goes_on_with_the_same_bits_and_the_texts_change_the_student(
    texts: Path, tmp_path: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "whole", toys, texts, "prune.loss.hardness=0.5")
    phase = load_phase(run, "prune", start="teacher")
    rows = phase.splits["train"]
    assert (len(rows), rows.epoch_rows, phase.length.steps_per_epoch) == (64, 48, 6)
    assert (len(phase.scored_rows), phase.scored_rows.mixture) == (24, None)
    prune(run)
    assert run.record("prune").data is not None
    assert run.record("teacher").data.unlabeled is None  # type: ignore[union-attr]
    assert run.record("prune").data.rows["unlabeled"] == 40  # type: ignore[union-attr]

    killed = begun(tmp_path / "killed", toys, texts, "prune.loss.hardness=0.5", "save_minutes=0")
    steps: list[int] = []
    step = loop._train_step

    def stop_at_8(*arguments: Any) -> None:
        steps.append(arguments[2])
        if len(steps) == 9:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(loop, "_train_step", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        prune(killed)
    prune(Run.open(killed.path))
    assert steps == [*range(9), *range(8, 12)]
    assert equal(weights(run), weights(killed))

    without = begun(tmp_path / "without", toys, None, "prune.loss.hardness=0.5")
    prune(without)
    assert not equal(weights(run), weights(without))


def test_other_texts_need_no_new_teacher(texts: Path, tmp_path: Path, toys: ModuleType) -> None:
    run = begun(tmp_path / "run", toys, texts)
    texts.write_text("a very good film\n" * 3)
    rows = load_phase(Run.open(run.path), "prune", start="teacher").splits["train"]
    assert len(rows) == 27
