"""Other runtimes that time a portable file: onnxruntime-web under Node.js, here with a library that only waits."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spdtool.bench.engines import Engine, Shape
from spdtool.bench.latency import time_engines
from spdtool.bench.lineup import Lineup, add_goal_runtime
from spdtool.bench.ratios import ModelFile
from spdtool.bench.runtimes import WEB_PROGRAM, require_runtime, run_in, runtime_version
from spdtool.errors import DeviceError, SpdError

LIBRARY = """
const state = { threads: 0 };
exports.env = { versions: { web: "9.8.7" }, wasm: {} };
exports.Tensor = class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } };
exports.InferenceSession = {
  async create(bytes, options) {
    if (bytes.toString() === "broken") throw new Error("no model\\nat all");
    console.log("noise between two answers");
    const names = ["input_ids", "attention_mask"];
    const run = async (feeds) => {
      if (Object.keys(feeds).join() !== names.join()) throw new Error("other inputs");
      const ids = Array.from(feeds.input_ids.data, Number);
      if (process.env.SPY) require("node:fs").appendFileSync(process.env.SPY, JSON.stringify(
        { ids, mask: Array.from(feeds.attention_mask.data, Number), dims: feeds.input_ids.dims,
          threads: exports.env.wasm.numThreads, loads: ++state.threads }) + "\\n");
      const end = performance.now() + Number(bytes.toString());
      while (performance.now() < end);
    };
    return { inputNames: names, run, release: async () => undefined };
  },
};
"""

with_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which Node.js finds an onnxruntime-web whose models say how many milliseconds a batch takes."""
    package = tmp_path / "node_modules/onnxruntime-web"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "main": "index.js"}))
    (package / "index.js").write_text(LIBRARY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def engine(file: Path, content: str, **fields: Any) -> Engine:
    """Write a model that takes so many milliseconds; return its engine in onnxruntime-web."""
    file.write_text(content)
    return run_in(Engine(name=file.stem, kind="onnxruntime", path=str(file), vocabulary=9, pad=3, **fields), "web")


@with_node
def test_a_model_is_timed_in_onnxruntime_web(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPY", str(library / "spy.jsonl"))
    shapes = [Shape(2, 5), Shape(2, 5, (5, 2))]
    engines = [engine(library / "slow.onnx", "40"), engine(library / "fast.onnx", "4")]
    result = time_engines(engines, shapes, threads=(1, 2), rounds=1, warmup=0, seconds=0, timeout=60)
    assert [timing.engine.threads for timing in result.timings] == [1, 1, 2, 2]
    assert result.timings[0].provider == f"onnxruntime-web {runtime_version('web')}"
    for slow, fast in (result.timings[:2], result.timings[2:]):
        for shape in shapes:
            assert (slow.least[shape] >= 40, fast.least[shape] >= 4) == (True, True)
            assert len(slow.rounds[shape]) == len(fast.rounds[shape]) == 1
        assert slow.peak >= slow.resident > 2**20
    seen = [json.loads(line) for line in (library / "spy.jsonl").read_text().splitlines()]
    assert {call["threads"] for call in seen} == {1, 2}
    for call in seen:
        assert call["dims"] == [2, 5]
        for token, real in zip(call["ids"], call["mask"], strict=True):
            assert 0 <= token < 9
            assert (token != 3) == bool(real)
    assert {sum(call["mask"]) for call in seen} == {10, 7}
    # The number of threads of a loaded library does not change: it is loaded anew.
    assert next(call["loads"] for call in seen if call["threads"] == 2) == 1


@with_node
def test_a_model_that_cannot_be_opened_is_named(library: Path) -> None:
    broken = engine(library / "broken.onnx", "broken")
    with pytest.raises(SpdError, match="broken cannot be timed: no model$"):
        time_engines([broken], [Shape(1, 4)], rounds=1, warmup=0, timeout=60)


@with_node
def test_without_the_library_the_web_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(DeviceError, match="does not find onnxruntime-web") as error:
        require_runtime("web")
    assert "npm install onnxruntime-web" in (error.value.hint or "")


@with_node
def test_the_version_names_library_and_node(library: Path) -> None:
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert runtime_version("web") == f"9.8.7, node {node.removeprefix('v')}"
    require_runtime("web")


def test_without_node_the_web_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="there is no `node` here"):
        require_runtime("web")


def test_a_runtime_that_is_not_timed_here_is_refused() -> None:
    with pytest.raises(DeviceError, match="cuda is not timed here: layers are timed in onnxruntime, openvino or web"):
        require_runtime("cuda")


def lineup_of(kind: Any = "onnxruntime") -> Lineup:
    """Make a lineup of both plain files."""
    engines = [Engine(name=name, kind=kind, path=name, vocabulary=9) for name in ("teacher", "student")]
    return Lineup(engines=engines, files={"teacher": ModelFile(20), "student": ModelFile(10)})


def test_both_plain_files_are_timed_in_the_runtime_of_the_goal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("spdtool.bench.lineup.require_runtime", lambda _: None)
    for runtime, command in (("web", ("node", str(WEB_PROGRAM))), ("openvino", ())):
        lineup = lineup_of()
        add_goal_runtime(lineup, runtime)
        added = {entry.name: entry for entry in lineup.engines[2:]}
        assert set(added) == {runtime, f"{runtime} teacher"}
        for entry in added.values():
            assert (entry.kind, entry.command, entry.optional, entry.baseline) == (runtime, command, True, False)
        assert (added[runtime].path, lineup.files[runtime].bytes) == ("student", 10)
        assert lineup.pairs == {runtime: f"{runtime} teacher"}
    for runtime in ("onnxruntime", "cuda"):
        lineup = lineup_of()
        add_goal_runtime(lineup, runtime)
        assert len(lineup.engines) == 2
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    for lineup, reason in ((lineup_of(), "there is no `node`"), (lineup_of("session"), "no ONNX file")):
        add_goal_runtime(lineup, "web")
        assert len(lineup.engines) == 2
        assert reason in lineup.notes[0]
