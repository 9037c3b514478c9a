"""The bench stage on a fabricated run, with real engine processes. Nothing is asserted about durations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool import plugins
from spdtool.bench import ledger, lineup
from spdtool.bench.engines import Engine, EngineProcess
from spdtool.bench.gpu import rows
from spdtool.bench.gpu.scores import TorchScore
from spdtool.bench.latency import Timing, TimingResult
from spdtool.errors import DeviceError, ModelError, SpdError, StageMissing
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import save_model
from spdtool.recipe.reading import parse_recipe
from spdtool.run.folder import Run
from spdtool.run.records import BenchResult, ExportedModel, ExportResult, GpuRecord, TargetExport
from spdtool.stages import bench as stage
from spdtool.stages.bench import bench

FEW = ("bench.torch=false", "bench.int8=false", "bench.unfused=false", "bench.ledger=false", "bench.padded=[]")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A folder with two checkpoints and their exports, made once: `teacher`, and `student` with half of it zero."""
    folder = tmp_path_factory.mktemp("exported")
    model = toys.bert()
    for role in ("teacher", "student"):
        save_model(model, toys.tokenizer(), folder / role / "checkpoint")
        Onnx().export(folder / role / "checkpoint", folder / role / "onnx", toys.recipe())
        with torch.no_grad():
            for weight in find_prunable_weights(model).values():
                weight.view(-1)[::2] = 0
    return folder


@pytest.fixture
def run(tmp_path: Path, toys: ModuleType, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Return `run("bench.rounds=3")`, which makes a run with finished teacher and export stages.

    With `further="twin"` the student is also exported for a target of that name.
    """
    monkeypatch.setattr(ledger, "PEAK_SECONDS", 0)

    def make(*sets: str, further: str | None = None) -> Run:
        quick = [
            "bench.batches=[1, 3]",
            "bench.lengths=[8, 500]",
            "bench.rounds=3",
            "bench.warmup=1",
            "bench.threads=1",
            "bench.compiled=false",
            "bench.openvino=false",  # whether it is installed or not
            "export.optional=[]",
        ]
        bench_run = Run.for_recipe(tmp_path / "run", toys.recipe(*quick, *sets))
        with bench_run.stage("teacher") as work:
            shutil.copytree(exported / "teacher/checkpoint", work.folder, dirs_exist_ok=True)
        with bench_run.stage("finetune") as work:
            shutil.copytree(exported / "student/checkpoint", work.folder, dirs_exist_ok=True)
        with bench_run.stage("export") as work:
            models = {
                role: copy_export(exported / role / "onnx", work.folder / role, sparsity)
                for role, sparsity in (("teacher", 0.0), ("student", 0.5))
            }
            work.result = ExportResult(first="onnx", targets={"onnx": TargetExport(**models)})
            if further:
                copied = copy_export(exported / "student/onnx", work.folder / further / "student", 0.5)
                work.result.targets[further] = TargetExport(student=copied)
        return bench_run

    return make


def copy_export(source: Path, folder: Path, sparsity: float) -> ExportedModel:
    """Copy an exported model into `folder` and return the record that the export stage would write."""
    shutil.copytree(source, folder)
    file = folder / "onnx/model.onnx"
    return ExportedModel(
        files=["onnx/model.onnx"],
        bytes=file.stat().st_size,
        zeros=round(100 * sparsity),
        size=100,
        sparsity=sparsity,
        positions=64,
        dev={"score": 0.75},
    )


def names(metrics: BenchResult) -> list[str]:
    return [row[0] for row in metrics.rows]


def test_every_engine_is_measured_and_its_figures_are_written(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bench_run = run("bench.padded=[[3, 60]]")
    metrics = bench(bench_run)
    folder = bench_run.path / "bench"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "stage.json"]
    assert bench_run.bench_result() == metrics
    assert set(bench_run.record("bench").inputs) == {"teacher", "export"}
    assert metrics.columns[-3:] == ["speed", "ms 1x8", "ms 3x64"]
    assert names(metrics) == ["teacher", "student", "unfused", "int8", "torch"]
    assert metrics.rows[1][1:4] == [0.75, "50.00%", (bench_run.path / "export/student/onnx/model.onnx").stat().st_size]
    assert metrics.rows[3][1:3] == ["-", "-"]
    assert metrics.rows[3][3] < metrics.rows[0][3]
    assert metrics.provider == "CPUExecutionProvider"
    assert (metrics.size, metrics.best) == (1.0, "student")
    assert "3 rounds are too few" in metrics.verdict[0]
    assert "it stores the zeros" in metrics.verdict[1]
    assert metrics.verdict[-2:] == [
        "Padded shapes: real lengths are spread evenly from 1 to the longest.",
        "1x is the dense teacher, fused or unfused, whichever is the faster at that shape.",
    ]
    assert len(metrics.latency) == 25
    raw = json.loads((folder / "bench.json").read_text())
    assert raw["environment"]["threads"] == [1]
    assert raw["environment"]["peaks"]["1"]["flops"] > 0
    for engine in raw["engines"]:
        assert len(engine["rounds"]) == 5
        assert all(len(entry["ms"]) == 3 and np.min(entry["ms"]) > 0 for entry in engine["rounds"])
        assert sorted(engine["rounds"][-1]["real"]) == [1, 30, 60]
    onnx, torch = raw["engines"][1], raw["engines"][-1]
    assert onnx["nodes"]["CPUExecutionProvider"]["MatMul"] > 8
    assert onnx["peak_bytes"] < torch["peak_bytes"]
    assert str(bench_run.path) not in (folder / "bench.json").read_text()
    assert metrics.verdict[0] in (folder / "bench.md").read_text()
    assert "the model has 64 positions: length 500 is timed at 64" in capsys.readouterr().err
    assert len(raw["ledger"]) == 12
    assert {entry["density"] for entry in raw["ledger"]} == {0.5}
    assert {entry["sparse_bytes"] for entry in raw["ledger"]} == {None}
    assert [row[0] for row in metrics.tables[0].rows] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_on_a_gpu_the_1x_is_the_fastest_dense_row_whose_score_passes(run: Callable[..., Run], monkeypatch: Any) -> None:
    """No GPU here: the engines are lined up, judged and reported for real, and their times are made up."""
    milliseconds = {"torch bf16": 0.1, "torch fp16 graph": 1.0, "student in torch fp16 graph": 0.5}

    def score(_: Path, precisions: Any, recipe: Any, *, device: str) -> dict[str, TorchScore]:
        return {name: TorchScore(0.7, 0.75, passes=name != "bf16") for name in precisions}

    def invent_times(engines: Any, shapes: Any, **options: Any) -> TimingResult:
        timings = []
        for engine in engines:
            ms = milliseconds.get(engine.name, 4.0)
            rounds = {shape: 6 * [ms] for shape in shapes}
            device = {shape: 6 * [ms / 2] for shape in shapes if engine.kind == "torch"}
            timed = replace(engine, threads=options["threads"][0])
            timings.append(Timing(timed, "CUDA", None, 10, 2**21, rounds, dict.fromkeys(shapes, ms), device))
        return TimingResult(timings, {"torch 2:4": "torch 2:4 cannot be timed: no tensor cores"})

    monkeypatch.setattr(stage, "choose_device", lambda _: ("cuda", None))
    monkeypatch.setattr(rows, "score_precisions", score)
    monkeypatch.setattr(stage, "time_engines", invent_times)
    monkeypatch.setattr(stage, "describe_gpu", lambda: GpuRecord(name="NVIDIA H200", driver="570", power_limit_w=700))
    bench_run = run("bench.padded=[]", "bench.rounds=6")
    result = bench(bench_run)
    assert result.best == "student in torch fp16 graph"
    assert (
        result.speed.median == 2
    )  # not 8, against plain onnxruntime; nor 0.2, against a row whose score does not pass
    assert {record.dense for record in result.latency} == {"torch fp16 graph"}
    assert "1x is the fastest dense row whose score passes, 1 thread: torch fp16 graph" in result.verdict[0]
    assert "The student was not timed" not in result.verdict[0]
    assert any("torch bf16 is no 1x: its dev score is 0.7000" in line for line in result.verdict)
    assert result.columns[4] == "VRAM"
    assert result.columns[-1].startswith("device ")
    student = next(row for row in result.rows if row[0] == result.best)
    assert (student[4], student[-1]) == ("2M", 0.25)
    written = json.loads((bench_run.path / "bench/bench.json").read_text())
    assert written["environment"]["gpu"]["name"] == "NVIDIA H200"
    assert written["environment"]["processor"]
    graphs = [engine["name"] for engine in written["engines"] if engine["graph"]]
    assert graphs == ["torch fp16 graph", "student in torch fp16 graph", "teacher graph", "student in teacher graph"]
    assert written["engines"][2]["rounds"][0]["device_ms"] == 6 * [2.0]


def test_torch_alone_is_chosen_where_onnxruntime_has_no_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(stage.onnx_session, "provider_problem", lambda name: None if name == "cpu" else "no CUDA")
    for has_gpu, device, expected in (
        (False, "auto", ("cpu", None)),
        (True, "cpu", ("cpu", None)),
        (True, "auto", ("cuda", "onnxruntime does not run on CUDA (no CUDA)")),
        (True, "cuda", ("cuda", "onnxruntime does not run on CUDA (no CUDA)")),
    ):
        monkeypatch.setattr(stage, "torch_runs_on_cuda", lambda has_gpu=has_gpu: has_gpu)
        assert stage.choose_device(device) == expected
    monkeypatch.setattr(stage, "torch_runs_on_cuda", lambda: False)
    with pytest.raises(DeviceError, match="CUDA was demanded"):
        stage.choose_device("cuda")


def test_engines_switched_off_in_the_recipe_are_left_out(run: Callable[..., Run]) -> None:
    metrics = bench(run(*FEW, "bench.rounds=1", "bench.batches=[1]"))
    assert names(metrics) == ["teacher", "student"]
    assert metrics.tables == metrics.ledger == []
    assert "real lengths" not in str(metrics.verdict)


def test_engines_are_compared_with_each_number_of_threads(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.onnx_session, "usable_cores", lambda: 2)
    metrics = bench(run(*FEW, "bench.threads=[1, 0, 2]", "bench.rounds=1", "bench.batches=[1]"))
    assert [entry.threads for entry in metrics.latency] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert metrics.columns[5:7] == ["speed 1t", "2t"]
    assert set(metrics.speeds) == {1, 2}
    assert metrics.speed == metrics.speeds[1]
    assert set(metrics.caveats.values()) == {"1 round is too few to tell it from noise"}


def test_a_machine_of_one_core_has_one_number_of_threads(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.onnx_session, "usable_cores", lambda: 1)
    metrics = bench(run(*FEW, "bench.threads=[1, 0]", "bench.rounds=1", "bench.batches=[1]"))
    assert set(metrics.speeds) == {1}


def test_a_further_target_is_a_row_with_its_libraries_and_the_headline(
    run: Callable[..., Run], clean_plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Twin(Onnx):
        """The target `onnx` under another name, with the student only."""

        roles = ("student",)

        def libraries(self, folder: Path) -> list[Path]:
            return [folder / "lib.so"]

    plugins.targets.register("twin")(Twin)
    timed_engines: list[Engine] = []
    time_engines = stage.time_engines

    def record_engines(engines: Any, *shapes: Any, **options: Any) -> TimingResult:
        timed_engines.extend(engines)
        return time_engines([replace(engine, libraries=()) for engine in engines], *shapes, **options)

    monkeypatch.setattr(stage, "time_engines", record_engines)
    bench_run = run(*FEW, "bench.rounds=1", "bench.batches=[1]", further="twin")
    metrics = bench(bench_run)
    assert names(metrics) == ["teacher", "student", "twin", "twin dense"]
    assert metrics.rows[3][1:3] == ["-", "0.00%"]
    assert metrics.factors[1].whole == pytest.approx(metrics.speeds[1].median)  # of one round
    assert "Where it comes from, 1 thread: fusion" in metrics.verdict[1]
    assert timed_engines[2].libraries == (str(bench_run.path / "export/twin/student/lib.so"),)
    assert metrics.best == "twin"
    assert metrics.verdict[0].startswith("Speed of twin, 50.0% zeros, 1 thread")
    assert str(bench_run.path) not in (bench_run.path / "bench/bench.json").read_text()


def test_a_missing_target_is_named_in_the_verdict(run: Callable[..., Run], clean_plugins: None) -> None:
    metrics = bench(run(*FEW, "export.optional=['vanished']", "bench.rounds=1", "bench.batches=[1]", further="twin"))
    assert names(metrics) == ["teacher", "student"]
    verdict = " ".join(metrics.verdict)
    assert "Not timed: twin: there is no export target 'twin'" in verdict
    assert "Not exported, so not timed: vanished: there is no export target 'vanished'" in verdict


@pytest.mark.long  # it starts engines in torch; each reason has a test of its own
def test_engines_that_cannot_be_built_here_are_named_in_the_verdict(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("onnxruntime cannot quantise model.onnx: no")

    monkeypatch.setattr(lineup, "quantize_dynamic_int8", refuse)
    original_ask = EngineProcess.ask

    def without_a_compiler(self: Any, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("open", {}).get("compiled"):
            raise SpdError("compiled cannot be timed: torch.compile does not work here: no g++")
        return original_ask(self, request)

    monkeypatch.setattr(EngineProcess, "ask", without_a_compiler)
    assignments = [assignment for assignment in FEW if not assignment.startswith(("bench.torch", "bench.int8"))]
    metrics = bench(run(*assignments, "bench.compiled=true", "bench.rounds=1", "bench.batches=[1]"))
    assert names(metrics) == ["teacher", "student", "torch"]
    verdict = " ".join(metrics.verdict)
    assert "Not timed: int8: onnxruntime cannot quantise model.onnx: no." in verdict
    assert "compiled cannot be timed: torch.compile does not work here: no g++." in verdict


def test_real_lengths_follow_the_dev_set(toy_task: Callable[..., Any], toys: ModuleType, exported: Path) -> None:
    toy_task()
    notes: list[str] = []
    shapes = stage.choose_shapes(toys.recipe("bench.padded=[[8, 40]]"), 64, exported / "teacher/onnx", notes)
    assert notes == ["Padded shapes: real lengths are spread as in the dev set, scaled to the longest."]
    assert [str(shape) for shape in shapes] == ["1x32", "1x64", "8x32", "8x64", "8x40 padded"]
    assert len(shapes[-1].real) == 8
    assert max(shapes[-1].real) == 40
    assert 10 < np.mean(shapes[-1].real) < 36


def test_real_lengths_are_quantiles_scaled_to_the_longest_and_the_same_every_time() -> None:
    dev_lengths = np.array([10, 20, 30, 40, 50, 60, 70, 80])
    lengths = stage.spread_lengths(4, 100, dev_lengths)
    assert sorted(lengths) == sorted(
        np.rint(np.quantile(dev_lengths, [0.125, 0.375, 0.625, 0.875]) / 71.25 * 100).astype(int)
    )
    assert lengths == stage.spread_lengths(4, 100, dev_lengths)
    assert sorted(stage.spread_lengths(5, 9, None)) == [1, 3, 5, 7, 9]
    assert stage.spread_lengths(1, 9, np.array([3])) == (9,)
    assert min(stage.spread_lengths(2, 3, np.array([1, 1000]))) == 1


def test_one_number_of_threads_of_an_older_recipe_is_read(toys: ModuleType) -> None:
    assert parse_recipe({"bench": {"threads": 3}}).bench.threads == (3,)
    assert toys.recipe("bench.threads=[1, 2]").bench.threads == (1, 2)


def test_it_needs_the_export(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(StageMissing, match="no finished stage 'export'"):
        bench(toy_run())


def test_a_demanded_device_that_is_not_there_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA was demanded"):
        bench(Run.for_recipe(tmp_path / "run", toys.recipe(device="cuda")))
    assert not (tmp_path / "run").exists()
