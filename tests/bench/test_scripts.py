"""Scripts under benchmarks/ that measure other engines, tested with stubs of those engines."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spdtool.bench.engines import Engine, Shape, make_batch
from spdtool.bench.latency import Timing, TimingResult, time_engines
from spdtool.errors import SpdError

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
STAND_IN = """
print("a banner on standard output")

class Compiled:
    def __init__(self, *facts):
        self.facts = facts

    def run(self, given):
        assert all(array.shape == tuple(self.facts[3][0]) for array in given)

def compile_model(path, batch, threads, input_shapes):
    if path == "broken":
        raise RuntimeError("no such file")
    return Compiled(path, batch, threads, input_shapes)
"""


def script(name: str) -> ModuleType:
    """Import a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(SCRIPTS))  # where its neighbours are when it is run
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture
def deepsparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose worker imports a stub of DeepSparse."""
    (tmp_path / "deepsparse.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    return Engine("deepsparse", "onnxruntime", "m", 50, command=(sys.executable, str(SCRIPTS / "deepsparse_worker.py")))


def test_the_worker_speaks_the_protocol(deepsparse: Engine) -> None:
    shapes = [Shape(1, 4), Shape(2, 8, (8, 3))]
    timings = time_engines([deepsparse], shapes, threads=(1, 2), rounds=2, warmup=1).timings
    assert [timing.provider for timing in timings] == ["DeepSparse", "DeepSparse"]
    for timing in timings:
        assert [len(timing.rounds[shape]) for shape in shapes] == [2, 2]
        assert 0 < timing.resident <= timing.peak


def test_errors_in_the_worker_are_reported(deepsparse: Engine) -> None:
    with pytest.raises(SpdError, match="deepsparse cannot be timed: RuntimeError: no such file"):
        time_engines([replace(deepsparse, path="broken")], [Shape(1, 4)], rounds=1, warmup=0)


def test_the_worker_makes_the_same_batch_as_the_other_engines(deepsparse: Engine) -> None:
    shape = Shape(3, 7, (7, 1, 4))
    expected = make_batch(shape, Engine("x", "onnxruntime", "", 50, pad=2))
    actual = script("deepsparse_worker").batch((3, 7), list(shape.real), 50, 2)
    for name, array in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(expected[name], array)


def test_the_table_has_ratios_to_the_faster_dense_form_and_between_rivals() -> None:
    benchmark = script("sparse_cpu")
    shape = benchmark.shape_of("8x128p")
    assert (str(shape), max(shape.real), sum(shape.real) / 8) == ("8x128 padded", 128, pytest.approx(64.5, abs=0.5))
    assert benchmark.shape_of("1x32") == Shape(1, 32)
    times = {"onnxruntime": 8.0, "onnxruntime basic": 6.0, "int8": 3.0, "sparse-cpu": 1.0, "deepsparse": 2.0}
    timings = [
        Timing(
            Engine(name, "onnxruntime", "", 9, threads=2, baseline="onnx" in name),
            "p",
            None,
            1,
            2,
            *same_rounds(shape, ms),
        )
        for name, ms in times.items()
    ]
    head, _, row = benchmark.table(TimingResult(timings)).splitlines()
    assert head.endswith("| int8 | sparse-cpu | deepsparse | sparse-cpu / int8 | sparse-cpu / deepsparse |")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["2", "8x128 padded", "6", "8.00", "6.00"]
    assert [cell.split()[0] for cell in cells[5:]] == ["2.00x", "6.00x", "3.00x", "3.00x", "2.00x"]


def test_a_round_waits_for_the_device_only_at_its_ends() -> None:
    waits: list[int] = []
    clocks = [
        script("train_speed_worker").Clock(1, 2, 3, lambda: waits.append(1), with_parts=with_parts)
        for with_parts in (False, True)
    ]  # fmt: skip
    for clock, expected in zip(clocks, (2, 6 + 2 * 5), strict=True):
        waits.clear()
        timed_call = clock.time_calls("work", lambda: None)
        while not clock.is_finished:
            clock.tick()
            timed_call()
        assert len(clock.ticks) == 1 + 2 + 3
        assert len(waits) == expected + 2 * clock.with_parts, "around each tick and each part, or at two ticks"
        assert ("work" in clock.parts) == clock.with_parts


def test_parts_of_a_step_come_from_the_profiled_round_if_timed_rounds_have_none() -> None:
    timed_round = {"examples_per_second": 8.0, "step_seconds": 0.5, "gflops": 50.0, "parts": {"rest": 0.5}}
    profiled_round = {"parts": {"data": 0.1, "rest": 0.6}}
    summary = script("train_speed").summary(
        "bf16", [timed_round], [timed_round | {"examples_per_second": 2.0}], {"bf16": 200}, profiled_round
    )
    assert (summary["parts"], summary["of_peak"], summary["ratio"]) == (profiled_round["parts"], 0.5, [4.0, 4.0, 4.0])
    round_with_parts = timed_round | {"parts": {"data": 0.2, "rest": 0.3}}
    summary = script("train_speed").summary(
        "fp32", [round_with_parts], None, {"fp32": 100}, {"parts": {}, "inside": 0.5}
    )
    assert (summary["parts"], summary["inside"]) == (round_with_parts["parts"], 2.0)


def test_the_share_of_padding_in_a_batch() -> None:
    shares = script("padding").padding_shares(np.array([2, 4] * 8), 8, 16)
    assert list(shares.values()) == [0.0, pytest.approx(0.25), pytest.approx(1 - 3 / 16)]


def test_every_row_of_the_training_benchmark_resolves_and_is_used() -> None:
    from spdtool.recipe import reading as recipe

    benchmark = script("train_speed_rows")
    assert {*benchmark.ON_CPU, *benchmark.ON_GPU} == set(benchmark.ROWS)
    for name, _stage, sets, _patches in benchmark.ROWS.values():
        recipe.build_recipe(name, {"task": "demo"}, [*benchmark.QUICK, *sets])


@pytest.mark.long
@pytest.mark.parametrize("row", ["bf16, no prefetching", "bf16, 128 tokens"])
def test_a_row_runs_with_a_model_of_random_weights(row: str) -> None:
    arguments = [row, "--task=demo", "--device=cpu", "--threads=1", "--steps=2", "--warm=1", "--batch=4"]
    arguments += ["--random-model=16x1"]
    script_file = str(SCRIPTS / "train_speed_worker.py")
    process = subprocess.run([sys.executable, script_file, *arguments], capture_output=True, text=True, check=True)
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["examples_per_second"] * result["step_seconds"] == pytest.approx(4)
    assert 20 < result["tokens_per_second"] * result["step_seconds"] < 4 * 32
    weights, length = 4 * 16 * 16 + 2 * 16 * 64, 128  # the teacher's states are kept: three passes, all the student's
    padded = 3 * 4 * length * (2 * weights + 4 * length * 16) / 1e9
    assert result["gflops"] == pytest.approx(padded) if row.endswith("128 tokens") else result["gflops"] < padded / 4


def same_rounds(shape: Shape, ms: float) -> tuple[dict[Shape, list[float]], dict[Shape, float]]:
    return {shape: [ms] * 6}, {shape: ms}


WEB_LIBRARY = """
exports.env = { versions: { web: "9.8.7" }, wasm: {} };
exports.Tensor = class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } };
exports.InferenceSession = {
  async create() {
    const run = async ({ input_ids }) => {
      const sum = input_ids.data.reduce((total, id) => total + Number(id), 0);
      return { logits: { data: [sum, Number(process.env.THRESHOLD)] } };
    };
    return { inputNames: ["input_ids"], run, release: async () => undefined };
  },
};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
def test_answers_in_the_browser_s_runtime_are_compared_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "node_modules/onnxruntime-web"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "main": "index.js"}))
    (package / "index.js").write_text(WEB_LIBRARY)
    monkeypatch.chdir(tmp_path)
    browser = script("browser")
    # The sum of a row's tokens against a threshold of 10.
    values = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, None])]
    results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats"], ["sum"], keepdims=1),
        helper.make_node("Concat", ["sum", "threshold"], ["logits"], axis=1),
    ]
    threshold = helper.make_tensor("threshold", TensorProto.FLOAT, [1, 1], [10.0])
    graph = helper.make_graph(nodes, "sums", values, results, [threshold])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    rows = [{"input_ids": [1, 2]}, {"input_ids": [7, 8]}, {"input_ids": [6, 6, 1]}]
    for number, flipped, difference in ((10.0, 0, 0.0), (14.0, 1, 4.0)):
        monkeypatch.setenv("THRESHOLD", str(number))
        answers = browser.compare_answers(tmp_path / "m.onnx", rows)
        assert answers == {"rows": 3, "flipped": flipped, "difference": difference}, number
    for form, target in (("fp32", ""), ("int8", "onnx-int8")):
        for role in ("teacher", "student"):
            file = tmp_path / "export" / target / role / "onnx/model.onnx"
            assert browser.list_files(tmp_path)[form, role] == file
            file.parent.mkdir(parents=True)
            file.write_bytes(b"")
            (file.parents[1] / "config.json").write_text(json.dumps({"vocab_size": 9, "pad_token_id": 0}))
    files, shape = browser.list_files(tmp_path), browser.read_shape("2x5")
    figures = browser.time_in_web(files, [shape], threads=1, rounds=1, seconds=0)
    assert set(figures) == {"fp32", "int8"}
    assert figures["int8"]["2x5"]["rounds"] == 1
    assert len(figures["int8"]["2x5"]["speed"]) == 3
