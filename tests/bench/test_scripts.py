"""The scripts under benchmarks/ that measure engines: what can be tested of them without those engines."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spdtool.bench import latency
from spdtool.bench.latency import Engine, Race, Shape, Timing
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
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def deepsparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose worker finds a stand-in for DeepSparse."""
    (tmp_path / "deepsparse.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    return Engine("deepsparse", "onnxruntime", "m", 50, command=(sys.executable, str(SCRIPTS / "deepsparse_worker.py")))


def test_the_worker_speaks_the_protocol(deepsparse: Engine) -> None:
    shapes = [Shape(1, 4), Shape(2, 8, (8, 3))]
    timings = latency.race([deepsparse], shapes, threads=(1, 2), rounds=2, warmup=1).timings
    assert [timing.provider for timing in timings] == ["DeepSparse", "DeepSparse"]
    for timing in timings:
        assert [len(timing.rounds[shape]) for shape in shapes] == [2, 2]
        assert 0 < timing.resident <= timing.peak


def test_what_goes_wrong_in_the_worker_is_told(deepsparse: Engine) -> None:
    with pytest.raises(SpdError, match="deepsparse cannot be timed: RuntimeError: no such file"):
        latency.race([latency.replace(deepsparse, path="broken")], [Shape(1, 4)], rounds=1, warmup=0)


def test_the_worker_gives_the_batch_that_the_others_are_given(deepsparse: Engine) -> None:
    shape = Shape(3, 7, (7, 1, 4))
    own = latency._batch(shape, Engine("x", "onnxruntime", "", 50, pad=2))
    theirs = script("deepsparse_worker").batch((3, 7), list(shape.real), 50, 2)
    for name, array in zip(own, theirs, strict=True):
        np.testing.assert_array_equal(own[name], array)


def test_the_table_has_ratios_to_the_faster_dense_form_and_between_rivals() -> None:
    benchmark = script("sparse_cpu")
    shape = benchmark.shape_of("8x128p")
    assert (str(shape), max(shape.real), sum(shape.real) / 8) == ("8x128 padded", 128, pytest.approx(64.5, abs=0.5))
    assert benchmark.shape_of("1x32") == Shape(1, 32)
    times = {"onnxruntime": 8.0, "onnxruntime basic": 6.0, "int8": 3.0, "sparse-cpu": 1.0, "deepsparse": 2.0}
    timings = [
        Timing(Engine(name, "onnxruntime", "", 9, threads=2, baseline="onnx" in name), "p", None, 1, 2, *at(shape, ms))
        for name, ms in times.items()
    ]
    head, _, row = benchmark.table(Race(timings)).splitlines()
    assert head.endswith("| int8 | sparse-cpu | deepsparse | sparse-cpu / int8 | sparse-cpu / deepsparse |")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["2", "8x128 padded", "6", "8.00", "6.00"]
    assert [cell.split()[0] for cell in cells[5:]] == ["2.00x", "6.00x", "3.00x", "3.00x", "2.00x"]


def at(shape: Shape, ms: float) -> tuple[dict[Shape, list[float]], dict[Shape, float]]:
    return {shape: [ms] * 6}, {shape: ms}
