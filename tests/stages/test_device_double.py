"""Every stage on a double of a GPU: a CPU that says it is one, with graphs that repeat their operations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spdtool.distillation import device_states
from spdtool.models import device
from spdtool.run.folder import Run
from spdtool.stages.distill import distill
from spdtool.stages.finetune import finetune
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.training import loop

FIELDS = ("precision=bf16", "prune.calibration=1", "prune.criterion=layerwise", "prune.first=none")


class Repeating:
    """In place of `CudaRecorder`."""

    recorded = 0

    def warm_up(self, step: Callable[[], Any]) -> Any:
        return step()

    def record(self, step: Callable[[], Any]) -> Any:
        Repeating.recorded += 1
        return type("Repeated", (), {"replay": staticmethod(step)})()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    Repeating.recorded = 0
    monkeypatch.setattr(device, "is_gpu", lambda _: True)
    monkeypatch.setattr(loop, "CudaRecorder", Repeating)
    monkeypatch.setattr(device_states, "free_device_memory", lambda _: 10**9)


def flatten(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def train(run: Run, *stages: Callable[[Run], Any]) -> dict[str, dict[str, torch.Tensor]]:
    weights = {}
    for stage in stages:
        stage(run)
        name = stage.__name__
        weights[name] = load_file(run.path / name / "model.safetensors")
    return weights


def watch_optimizers_and_snapshots(monkeypatch: pytest.MonkeyPatch) -> tuple[list[bool], list[bool]]:
    """Lists that get whether each optimiser can be in a graph, and whether each snapshot is written aside."""
    optimizers: list[bool] = []
    saved: list[bool] = []
    create, save = loop.create_adamw, loop.Snapshotter.save

    def create_and_note(*arguments: Any, capturable: bool, **options: Any) -> Any:
        optimizers.append(capturable)
        return create(*arguments, capturable=capturable, **options)

    def save_and_note(self: Any, step: int, *, aside: bool = False) -> None:
        saved.append(aside)
        before = self.log.stopwatch.seconds
        save(self, step, aside=aside)
        assert self.log.stopwatch.seconds > before, "its time counts in the examples a second"

    monkeypatch.setattr(loop, "create_adamw", create_and_note)
    monkeypatch.setattr(loop.Snapshotter, "save", save_and_note)
    return optimizers, saved


def test_every_stage_runs_on_a_double_of_a_gpu(
    toy_run: Callable[..., Run], double: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizers, saved = watch_optimizers_and_snapshots(monkeypatch)
    on_gpu = train(toy_run(*FIELDS, folder="gpu"), teacher, prune, distill, finetune)
    assert optimizers == [True] * 4, "each counts its steps on the device, where a graph reads them"
    assert not saved, "evaluations save nothing: on a GPU the clock alone does"
    assert Repeating.recorded >= 4, "each stage has lengths that come again"
    assert "stay on the GPU" in "".join(capsys.readouterr())
    record = json.loads(Path(toy_run(*FIELDS, folder="gpu").path / "finetune" / "stage.json").read_text("utf-8"))
    assert record["machine"]["precision"] == "bf16"
    monkeypatch.setattr(device, "is_gpu", lambda target: target.type == "cuda")
    on_cpu = train(toy_run(*FIELDS, folder="cpu"), teacher, prune)
    for stage, weights in on_cpu.items():
        for name, weight in weights.items():
            if stage != "teacher" and ".layer." in name and weight.dim() == 2:
                assert int((on_gpu[stage][name] == 0).sum()) == int((weight == 0).sum()), (stage, name)
        # bf16, padding to other lengths and a learning rate in float32: a few weights are pruned in place of others
        similarity = torch.cosine_similarity(flatten(weights), flatten(on_gpu[stage]), dim=0)
        assert float(similarity) > (0.999 if stage == "teacher" else 0.9), stage


def test_a_stage_is_resumed_from_what_a_thread_wrote(
    toy_run: Callable[..., Run], double: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = (*FIELDS, "save_minutes=0")
    run = toy_run(*fields, until="teacher", folder="undisturbed")
    stopped = Run.for_recipe(run.path.with_name("stopped"), run.recipe)
    shutil.copytree(run.path, stopped.path)
    prune(run)
    take, steps = loop.Stepper.take, []

    def stop_at_seven(self: Any, step: int, *args: Any) -> None:
        steps.append(step)
        if step == 7 and steps.count(7) == 1:
            raise KeyboardInterrupt
        take(self, step, *args)

    monkeypatch.setattr(loop.Stepper, "take", stop_at_seven)
    _, saved = watch_optimizers_and_snapshots(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(stopped)
    saved = sorted(path.name for path in (stopped.partial_folder("prune") / "state").glob("step-*"))
    assert saved == ["step-000000006", "step-000000007"], "two are kept, and the last one was finished"
    prune(Run.open(stopped.path))
    assert saved
    assert all(saved), "a thread writes them"
    assert steps.count(6) == 1
    assert steps.count(7) == 2
    weights = [load_file(each.path / "prune" / "model.safetensors") for each in (run, stopped)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
