"""A finished stage reports the same result and exit code when it is run again."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from spdtool.run.folder import Run
from spdtool.run.records import ExportedModel, ExportResult, Promise, TargetExport
from spdtool.stages.run_stages import recorded_refusal, run_missing


def test_a_run_whose_export_refused_a_demanded_target_says_so_again(tmp_path: Path, toys: ModuleType) -> None:
    run = Run.for_recipe(tmp_path, toys.recipe("export.targets=['onnx','onnx-fp16']", "export.optional=[]"))
    model = ExportedModel(files=[], bytes=1, zeros=0, size=1, sparsity=0.0, positions=9)
    plain = {"onnx": TargetExport(student=model, teacher=model)}
    with run.stage("export") as work:
        work.result = ExportResult(
            first="onnx", targets=plain, refused={"onnx-fp16": "a reason", "onnx-ort": "optional"}
        )
    refusal = run_missing(run, ["export"])
    assert refusal is not None
    assert refusal.message == "not shipped: onnx-fp16: a reason"
    assert run_missing(run, []) is None


def test_a_run_that_missed_its_goal_says_so_again(toys: ModuleType) -> None:
    class Finished:
        recipe = toys.recipe("goal.speedup=2")

        class Bench:
            promise = Promise(lines=["2x were asked for"], broken=["2x were asked for: 1.5x"])

        def bench_result(self) -> Bench:
            return self.Bench()

    finished = Finished()
    refusal = recorded_refusal(finished, "bench")  # type: ignore[arg-type]
    assert refusal is not None
    assert "the goal was missed: 2x were asked for: 1.5x" in refusal.message
    finished.Bench.promise.broken = []
    assert recorded_refusal(finished, "bench") is None  # type: ignore[arg-type]
    assert recorded_refusal(finished, "teacher") is None  # type: ignore[arg-type]
