"""Phases that learn from texts without labels: their training rows, and exact resuming."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spdtool import plugins
from spdtool.run.folder import Run
from spdtool.stages.phase import load_phase
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.training.step import Stepper

SETS = ("prune.epochs=2", "prune.loss.hardness=0.5")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Iterator[Path]:
    """A folder with a run up to its teacher and a file of texts without labels."""
    folder = tmp_path_factory.mktemp("unlabeled")
    (folder / "more.txt").write_text("".join(f"{text}\n" for text in toys.rows(40, seed=9).first))
    with plugins.isolated():
        toys.register(toys.dataset(train=24, dev=8))
        teacher(Run.for_recipe(folder / "run", toys.recipe(*SETS, unlabeled=str(folder / "more.txt"))))
        yield folder


def copy_run(base_folder: Path, target: Path, toys: ModuleType, *sets: str) -> Run:
    """Copy the run to `target` with further settings."""
    shutil.copytree(base_folder / "run", target)
    return Run.for_recipe(target, toys.recipe(*SETS, f"unlabeled={base_folder / 'more.txt'}", *sets))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "prune" / "model.safetensors")


def have_equal_weights(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], reference[name]) for name in weights)


@pytest.mark.slow
def test_a_killed_phase_goes_on_with_the_same_bits_and_the_texts_change_the_student(
    base_folder: Path, tmp_path: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(base_folder, tmp_path / "whole", toys)
    phase = load_phase(run, "prune", start="teacher")
    rows = phase.splits["train"]
    assert (len(rows), rows.epoch_rows, phase.length.steps_per_epoch) == (64, 48, 6)
    assert (len(phase.scored_rows), phase.scored_rows.mixture) == (24, None)
    prune(run)
    recorded, of_teacher = run.record("prune").data, run.record("teacher").data
    assert recorded is not None
    assert of_teacher is not None
    assert (recorded.rows["unlabeled"], of_teacher.unlabeled) == (40, None)

    interrupted = copy_run(base_folder, tmp_path / "killed", toys, "save_minutes=0")
    steps: list[int] = []
    take = Stepper.take

    def stop_at_8(*arguments: Any) -> None:
        steps.append(arguments[1])
        if len(steps) == 9:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(Stepper, "take", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        prune(interrupted)
    prune(Run.open(interrupted.path))
    assert steps == [*range(9), *range(8, 12)]
    assert have_equal_weights(weights(run), weights(interrupted))

    without = copy_run(base_folder, tmp_path / "without", toys, "unlabeled=none")
    prune(without)
    assert not have_equal_weights(weights(run), weights(without))


def test_other_texts_need_no_new_teacher(base_folder: Path, tmp_path: Path, toys: ModuleType) -> None:
    other_run = tmp_path / "other.txt"
    other_run.write_text("a very good film\n" * 3)
    run = copy_run(base_folder, tmp_path / "run", toys, f"unlabeled={other_run}")
    rows = load_phase(run, "prune", start="teacher").splits["train"]
    assert (len(rows), rows.epoch_rows) == (27, 27)
