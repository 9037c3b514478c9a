"""Bench on a fabricated run: real processes, what is written, what is said. No assertion on a duration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spdtool import encoders
from spdtool.errors import DeviceError, StageMissing
from spdtool.export.onnx import Onnx
from spdtool.run import Run
from spdtool.stages.bench import bench


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A folder with a checkpoint and its export, made once."""
    folder = tmp_path_factory.mktemp("exported")
    encoders.save(toys.bert(), toys.tokenizer(), folder / "checkpoint")
    Onnx.export(folder / "checkpoint", folder / "onnx", toys.recipe())
    return folder


@pytest.fixture
def run(tmp_path: Path, toys: ModuleType, exported: Path) -> Callable[..., Run]:
    """`run("bench.rounds=3")`: a run whose teacher and export stages are done."""

    def make(*sets: str) -> Run:
        quick = [
            "bench.batches=[1, 3]",
            "bench.lengths=[8, 500]",
            "bench.rounds=3",
            "bench.warmup=1",
            "bench.threads=1",
        ]
        made = Run.at(tmp_path / "run", toys.recipe(*quick, *sets))
        with made.stage("teacher") as work:
            shutil.copytree(exported / "checkpoint", work.folder, dirs_exist_ok=True)
        with made.stage("export") as work:
            for role, sparsity in (("teacher", 0.0), ("student", 0.5)):
                shutil.copytree(exported / "onnx", work.folder / role)
                work.metrics[role] = {
                    "files": ["onnx/model.onnx"],
                    "bytes": (work.folder / role / "onnx/model.onnx").stat().st_size,
                    "sparsity": sparsity,
                    "dev": {"score": 0.75},
                    "positions": 64,
                }
        return made

    return make


def test_every_engine_is_measured_and_the_figures_are_kept(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    made = run()
    metrics = bench(made)
    folder = made.path / "bench"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "stage.json"]
    assert made.record("bench")["metrics"] == json.loads(json.dumps(metrics))
    assert set(made.record("bench")["inputs"]) == {"teacher", "export"}
    assert metrics["columns"][-2:] == ["ms 1x8", "ms 3x64"]
    assert [row[0] for row in metrics["rows"]] == ["teacher", "student", "torch"]
    assert metrics["rows"][1][1:4] == [0.75, "50.00%", (made.path / "export/student/onnx/model.onnx").stat().st_size]
    assert metrics["provider"] == "CPUExecutionProvider"
    assert metrics["size"] == 1.0
    assert "3 rounds are too few" in metrics["verdict"][0]
    assert "it stores the zeros" in metrics["verdict"][1]
    assert len(metrics["latency"]) == 12
    raw = json.loads((folder / "bench.json").read_text())
    assert raw["environment"]["threads"] == 1
    for engine in raw["engines"]:
        assert len(engine["rounds_ms"]) == 4
        assert all(len(entry["ms"]) == 3 and np.min(entry["ms"]) > 0 for entry in engine["rounds_ms"])
    onnx, torch = raw["engines"][1], raw["engines"][2]
    assert onnx["nodes"]["CPUExecutionProvider"]["MatMul"] > 8
    assert onnx["peak_bytes"] < torch["peak_bytes"]
    assert str(made.path) not in (folder / "bench.json").read_text()
    assert metrics["verdict"][0] in (folder / "bench.md").read_text()
    assert "the model has 64 positions: length 500 is timed at 64" in capsys.readouterr().err


def test_torch_can_be_left_out(run: Callable[..., Run]) -> None:
    metrics = bench(run("bench.torch=false", "bench.rounds=1", "bench.batches=[1]"))
    assert [row[0] for row in metrics["rows"]] == ["teacher", "student"]


def test_it_needs_the_export(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(StageMissing, match="no finished stage 'export'"):
        bench(toy_run())


def test_a_demanded_device_that_is_not_there_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA was demanded"):
        bench(Run.at(tmp_path / "run", toys.recipe(device="cuda")))
    assert not (tmp_path / "run").exists()
