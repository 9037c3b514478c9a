"""`spdtool distill`: the replacing rate rises to 1 while the zeros of `prune` are held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spdtool.errors import Corrupt, GateError, StageMissing
from spdtool.run import folder as runs
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import Run
from spdtool.stages.distill import distill
from spdtool.stages.finetune import finetune


@pytest.fixture(scope="module")
def pruned_folder(toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished up to `prune`; read only."""
    from spdtool.stages.prune import prune
    from spdtool.stages.teacher import teacher

    toys.register(toys.dataset())
    run = Run.for_recipe(tmp_path_factory.mktemp("pruned") / "run", toys.recipe("prune.epochs=1", sparsity=0.9))
    teacher(run)
    prune(run)
    return run.path


@pytest.fixture
def pruned(pruned_folder: Path, tmp_path: Path, toy_run: Callable[..., Run]) -> Callable[..., Run]:
    """`pruned("distill.epochs=1")`: a copy of that run."""

    def make(*sets: str, folder: str = "run") -> Run:
        shutil.copytree(pruned_folder, tmp_path / folder)
        return toy_run("prune.epochs=1", *sets, sparsity=0.9, folder=folder)

    return make


def poison(run: Run, stage: str, sparser: bool = False) -> None:
    """Change one weight in the checkpoint of `stage` and rewrite its record to match."""
    folder = run.path / stage
    weights = load_file(folder / "model.safetensors")
    weight = weights["bert.encoder.layer.1.output.dense.weight"].view(-1)
    weight[(weight != 0) if sparser else (weight == 0)] = weight[
        (weight != 0) if sparser else (weight == 0)
    ].index_fill(0, torch.tensor([0]), 0.0 if sparser else 0.5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "stage.json").read_text("utf-8"))
    for file in record["files"]:
        path = folder / file["path"]
        file |= {"size": path.stat().st_size, "sha256": sha256(path)}
    runs.write_json(folder / "stage.json", record)


def log(run: Run, stage: str, kind: str) -> list[dict[str, Any]]:
    lines = (run.path / stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_distill_keeps_the_zeros_of_prune_and_trains_the_other_weights(
    pruned: Callable[..., Run], stage_files: list[str]
) -> None:
    run = pruned("distill.keep_best=false")
    metrics = distill(run)
    assert sorted(path.name for path in (run.path / "distill").iterdir()) == stage_files
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("prune", "distill"))
    assert before.keys() == after.keys()
    for name in metrics.zeros:
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert not torch.equal(before[name], after[name]), name
    assert metrics.zeros == run.training_result("prune").zeros
    assert metrics.sparsity == pytest.approx(0.9, abs=1e-3)
    assert metrics.dev["score"] == metrics.fit.best.score
    assert set(run.record("distill").inputs) == {"teacher", "prune"}


def test_the_replacing_rate_rises_and_decides_the_draws(pruned: Callable[..., Run]) -> None:
    run = pruned("distill.grafting={schedule='linear', start=0.0, rise=0.5}", "distill.epochs=10")
    distill(run)
    steps = log(run, "distill", "step")
    rates = [step["replacing_rate"] for step in steps]
    assert rates == [pytest.approx(min(1.0, index / 30)) for index in range(60)]
    assert all(is_student is False for step in steps[:1] for is_student in step["drawn"])
    assert all(is_student is True for step in steps[30:] for is_student in step["drawn"])
    assert {is_student for step in steps[:30] for is_student in step["drawn"]} == {True, False}
    assert log(run, "distill", "prune") == []


def test_a_step_without_any_layer_of_the_students_is_no_failure(pruned: Callable[..., Run]) -> None:
    """At replacing rate 0 with frozen embeddings no trained parameter is in the forward pass."""
    grafting = "distill.grafting={schedule='constant', start=0}"
    run = pruned(grafting, "distill.train=layers", "distill.epochs=1", "distill.keep_best=false")
    distill(run)
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("prune", "distill"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.epochs=1", "prune.learning_rate=1e-30", "distill.epochs=1", "distill.loss.attention=1",
                  "distill.learning_rate=1e-30", sparsity=0.0, until="prune")  # fmt: skip
    distill(run)
    for step in log(run, "distill", "step"):
        assert step["losses"]["logits"] == pytest.approx(0, abs=1e-6)
        assert step["losses"]["hidden"] == pytest.approx(0, abs=1e-9)
        assert step["losses"]["attention"] == pytest.approx(0, abs=1e-9)


def assert_refused(run: Run, stage: Callable[[Run], Any], error: type[Exception], message: str) -> None:
    name = stage.__name__
    with pytest.raises(error, match=message):
        stage(run)
    assert not run.done(name)
    assert not (run.path / f".{name}.partial").exists()


def test_it_is_refused_before_prune(toy_run: Callable[..., Run]) -> None:
    assert_refused(toy_run(until="teacher"), distill, StageMissing, "no finished stage 'prune'")


@pytest.mark.parametrize("sparser", [False, True])
def test_a_poisoned_checkpoint_is_refused_though_its_record_is_fresh(pruned: Callable[..., Run], sparser: bool) -> None:
    run = pruned()
    poison(run, "prune", sparser)
    count = 1844 if sparser else 1842
    assert_refused(run, distill, GateError, f"layer.1.output.dense.weight has {count} zeros of 2048; .* asks for 1843")


def test_a_poisoned_checkpoint_is_refused_by_finetune_too(pruned: Callable[..., Run]) -> None:
    run = pruned("distill.epochs=1")
    distill(run)
    poison(run, "distill")
    assert_refused(run, finetune, GateError, "has 1842 zeros of 2048")


def test_a_stage_whose_input_was_forged_is_refused(pruned: Callable[..., Run]) -> None:
    """The record of prune is replaced after distill has read it."""
    run = pruned("distill.epochs=1")
    distill(run)
    poison(run, "prune")
    assert_refused(run, finetune, Corrupt, "distill was made from a prune stage that has since been replaced")


def test_a_teacher_that_was_replaced_is_noticed(pruned: Callable[..., Run]) -> None:
    run = pruned()
    poison(run, "teacher", sparser=True)
    assert_refused(run, distill, Corrupt, "prune was made from a teacher stage that has since been replaced")


def test_without_epochs_the_checkpoint_is_copied_unchanged(pruned: Callable[..., Run]) -> None:
    run = pruned("distill.epochs=0")
    metrics = distill(run)
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("prune", "distill"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics.dev == run.training_result("prune").dev
    assert metrics.fit is None
