"""Export on a fabricated run: what is written, what is measured, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from transformers import AutoConfig, AutoTokenizer

from spdtool import data, encoders, plugins
from spdtool.errors import DataError, DeviceError, GateError, StageMissing, UnknownName
from spdtool.export import runtime
from spdtool.export.onnx import Onnx
from spdtool.run import Run, sha256
from spdtool.stages.export import compare, export
from spdtool.tasks import Task

Fabricate = Callable[..., Run]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files that were exported once wait for the next test."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(autouse=True)
def export_once(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export each checkpoint once for the whole module: an export takes seconds, and gives the same bytes again."""
    real = Onnx.export

    def cached(checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:
        kept = shelf / sha256(checkpoint / "model.safetensors")
        if not kept.exists():
            real(checkpoint, kept, recipe)
        shutil.copytree(kept, folder)
        return [folder / "onnx/model.onnx"]

    monkeypatch.setattr(Onnx, "export", staticmethod(cached))


@pytest.fixture
def fabricate(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Task]) -> Fabricate:
    """`fabricate("export.opset=20")`: a run of the task `toy` with a dense teacher and a student of 75 % zeros."""

    def make(*sets: str, **how: Any) -> Run:
        toy_task(**{"dev": 20} | how)
        run = Run.at(tmp_path / "run", toys.recipe("export.sentences=8", *sets))
        names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
        for stage, seed in (("teacher", 1), ("finetune", 2)):
            model = toys.bert(seed=seed, **names)
            if stage == "finetune":
                for weight in encoders.prunable_linears(model).values():
                    weight.data.view(-1)[np.arange(weight.numel()) % 4 > 0] = 0
            with run.stage(stage) as work:
                encoders.save(model, toys.tokenizer(), work.folder)
        return run

    return make


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_both_are_written_measured_and_equal_to_their_checkpoints(
    fabricate: Fabricate, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate(pairs=True)
    metrics = export(run)
    layout = ["config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert files(run.path / "export") == sorted(
        ["stage.json", *(f"{role}/{name}" for role in ("student", "teacher") for name in layout)]
    )
    assert run.record("export")["metrics"] == json.loads(json.dumps(metrics))
    assert set(run.record("export")["inputs"]) == {"teacher", "finetune"}
    student, teacher = metrics["student"], metrics["teacher"]
    assert (student["sparsity"], teacher["sparsity"]) == (0.75, 0.0)
    assert student["zeros"] * 4 == student["size"] * 3
    for measured in (student, teacher):
        assert measured["dev"] == measured["checkpoint_dev"]
        assert set(measured["dev"]) == {"score", "accuracy"}
        assert (measured["flipped"], measured["rows"]) == (0, 20)
        assert 0 < measured["largest_difference"] < 1e-4
        assert measured["largest_difference_at"]
        assert (measured["providers"], measured["files"], measured["positions"]) == (["cpu"], ["onnx/model.onnx"], 64)
    assert student["bytes"] == (run.path / "export/student/onnx/model.onnx").stat().st_size
    config = AutoConfig.from_pretrained(run.path / "export/student")
    assert config.id2label == {0: "good", 1: "bad"}
    assert AutoTokenizer.from_pretrained(run.path / "export/student")("good", "film")["token_type_ids"][-1] == 1
    out = capsys.readouterr().out
    assert "student: " in out
    assert "75.00% zeros as in its checkpoint" in out


def test_it_needs_its_predecessors(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(StageMissing, match="no finished stage 'teacher'"):
        export(toy_run())


def nothing_half_written(run: Run) -> bool:
    return files(run.path) == sorted(
        [".lock", "run.json"]
        + [
            f"{stage}/{name}"
            for stage in ("teacher", "finetune")
            for name in ("config.json", "model.safetensors", "stage.json", "tokenizer.json", "tokenizer_config.json")
        ]
    )


@pytest.mark.parametrize(
    ("name", "error"), [("onnxx", UnknownName), ("data", DataError), ("runtime", DeviceError), ("cuda", DeviceError)]
)
def test_bad_input_leaves_nothing_half_written(
    name: str, error: type[Exception], fabricate: Fabricate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fabricate(
        *(['export.targets=["onnxx"]'] if name == "onnxx" else []), **({"dev": 0} if name == "data" else {})
    )
    if name == "runtime":
        monkeypatch.setattr(runtime, "installed", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    if name in ("runtime", "cuda"):
        run.recipe = run.recipe.model_copy(update={"device": "cuda"})
    with pytest.raises(error):
        export(run)
    assert nothing_half_written(run)


class Faulty(Onnx):
    """An export whose student's file is not its checkpoint."""

    change: Callable[[np.ndarray], None]

    @classmethod
    def export(cls, checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:  # type: ignore[override]
        written = Onnx.export(checkpoint, folder, recipe)
        proto = onnx.load(written[0])
        tensor = next(t for t in proto.graph.initializer if t.name.endswith("layer.0.intermediate.dense.weight.T"))
        array = numpy_helper.to_array(tensor).copy()
        cls.change(array)
        tensor.raw_data = array.tobytes()
        onnx.save(proto, written[0])
        return written


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda array: array.__setitem__(array == 0, 1e-30),
            "layer.0.intermediate.dense.weight: the exported file has",
        ),
        (lambda array: array.__imul__(1.1), "checkpoint and exported file differ by .* on 8 dev rows"),
    ],
    ids=["lost zeros", "perturbed matrix"],
)
def test_a_file_that_is_not_its_checkpoint_is_refused(
    change: Any, what: str, fabricate: Fabricate, clean_plugins: None
) -> None:
    run = fabricate('export.targets=["faulty"]')
    plugins.targets.register("faulty")(type("Broken", (Faulty,), {"change": staticmethod(change)}))
    checkpoints = (run.path / "teacher", run.path / "finetune")
    (run.path / "teacher").rename(run.path / "dense")
    (run.path / "finetune").rename(checkpoints[0])  # a teacher with zeros, so that the first export shows the fault
    (run.path / "dense").rename(checkpoints[1])
    with pytest.raises(GateError, match=what) as caught:
        export(run)
    assert caught.value.exit_code == 3
    assert nothing_half_written(run)


def test_a_changed_dev_metric_is_refused(
    fabricate: Fabricate, monkeypatch: pytest.MonkeyPatch, clean_plugins: None
) -> None:
    """The probes may all pass and the dev set still tell: here, because the tolerance is set absurdly wide."""

    class Contrary(Onnx):
        @staticmethod
        def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Any:
            forward = Onnx.session(folder, provider, threads)
            return lambda batch: -forward(batch)

    plugins.targets.register("contrary")(Contrary)
    run = fabricate('export.targets=["contrary"]', "export.tolerance=1000")
    with pytest.raises(GateError, match=r"the exported file has .* on the dev set; its checkpoint has") as caught:
        export(run)
    assert caught.value.hint == "export.budget is 0.001"
    assert nothing_half_written(run)


def test_compare_counts_flips_and_every_dev_set(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task()
    rows = toys.rows(6)
    dev = data.encode(toys.tokenizer(), {"dev": rows, "dev_mm": rows}, 32)

    def answer(sign: float) -> Callable[[Any], np.ndarray]:
        def forward(batch: Any) -> np.ndarray:
            gold = batch["labels"].astype(np.float32) * 2 - 1
            return np.stack([-gold, gold * sign], axis=1)

        return forward

    change = compare(task, answer(1.0), answer(-2.0), dev, 1e-4)
    assert change.checkpoint == {"score": 1.0, "accuracy": 1.0, "accuracy_mm": 1.0}
    assert change.metrics["accuracy"] == change.metrics["accuracy_mm"] < 1
    assert change.flipped == 2 * 6 * (1 - change.metrics["accuracy"])
    assert change.difference == 3.0


def test_compare_takes_a_regression_by_its_values(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task(labels=())
    dev = data.encode(toys.tokenizer(), {"dev": toys.rows(6, labels=1)}, 32)

    def answer(shift: float) -> Callable[[Any], np.ndarray]:
        return lambda batch: batch["labels"][:, None] + np.float32(shift) * (batch["labels"] > 1)[:, None]

    assert compare(task, answer(0), answer(1e-6), dev, 1e-4).flipped == 0
    assert compare(task, answer(0), answer(1e-2), dev, 1e-4).flipped == 3


def test_a_second_target_lies_under_its_name(fabricate: Fabricate, clean_plugins: None) -> None:
    plugins.targets.register("other")(type("Other", (Onnx,), {}))
    run = fabricate('export.targets=["onnx", "other"]')
    metrics = export(run)
    assert metrics["other"]["student"]["bytes"] == metrics["student"]["bytes"]
    assert (run.path / "export/other/student/onnx/model.onnx").is_file()
    assert (run.path / "export/teacher/onnx/model.onnx").is_file()
