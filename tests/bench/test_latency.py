"""The race: real processes on a tiny graph, and everything that can befall them. No assertion on a duration."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from spdtool import encoders
from spdtool.bench import latency
from spdtool.bench.latency import Engine
from spdtool.errors import SpdError


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    """`engine("name")`: a graph that sums the tokens that the mask leaves."""
    ints, names = TensorProto.INT64, ("input_ids", "attention_mask")
    inputs = [helper.make_tensor_value_info(name, ints, ["batch", "sequence"]) for name in names]
    nodes = [
        helper.make_node("Mul", list(names), ["kept"]),
        helper.make_node("ReduceSum", ["kept"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "sum", inputs, [helper.make_tensor_value_info("logits", ints, [])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")

    def make(name: str = "sum", **how: Any) -> Engine:
        return Engine(
            **{"name": name, "kind": "onnxruntime", "path": str(tmp_path / "model.onnx"), "vocabulary": 50} | how
        )

    return make


def test_every_engine_is_timed_at_every_shape_in_every_round(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shadow in ("numpy.py", "json.py", "spdtool.py"):  # what lies in the current folder is not imported
        (tmp_path / shadow).write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    shapes = [(1, 4), (3, 8)]
    timings = latency.race([engine("one"), engine("two")], shapes, rounds=5, warmup=1)
    assert [timing.engine.name for timing in timings] == ["one", "two"]
    for timing in timings:
        assert {shape: len(values) for shape, values in timing.rounds.items()} == dict.fromkeys(shapes, 5)
        assert all(value > 0 for values in timing.rounds.values() for value in values)
        assert timing.provider == "CPUExecutionProvider"
        assert timing.nodes == {"CPUExecutionProvider": {"Mul": 1, "ReduceSum": 1}}
        assert 0 < timing.resident <= timing.peak < 400 * 2**20  # no torch in there


def test_the_order_turns_with_each_round(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Fake:
        def __init__(self, name: str, _timeout: float) -> None:
            self.name = name

        def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            if "batch" in request:
                asked.append(self.name)
            return {"provider": "p", "nodes": None, "resident": 1, "peak": 2, "ms": 1.0}

        def end(self) -> None:
            asked.append("end")

    monkeypatch.setattr(latency, "_Worker", Fake)
    monkeypatch.setattr(latency, "PAUSE", 0)
    timings = latency.race([engine(name) for name in "abc"], [(1, 2)], rounds=2, warmup=1)
    assert asked == [*"cab", *"abc", *"bca", "end", "end", "end"]
    assert all(len(timing.rounds[1, 2]) == 2 for timing in timings)


def test_a_model_that_does_not_open_is_a_clear_error(engine: Callable[..., Engine], tmp_path: Path) -> None:
    with pytest.raises(SpdError, match=r"broken cannot be timed: onnxruntime cannot open .*none.onnx"):
        latency.race([engine("broken", path=str(tmp_path / "none.onnx"))], [(1, 2)], rounds=1, warmup=0)


def test_a_process_that_dies_is_a_clear_error_and_none_is_left(engine: Callable[..., Engine]) -> None:
    with latency._worker("victim", 60) as worker:
        worker.ask({"open": engine().__dict__})
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(SpdError, match="the process that times victim died with signal 9"):
            worker.ask({"batch": 1, "length": 2})
    assert worker.process.poll() is not None


def test_what_a_dying_process_said_last_is_shown(engine: Callable[..., Engine]) -> None:
    with latency._worker("victim", 60) as worker:
        worker.ask({"open": engine().__dict__})
        with pytest.raises(SpdError, match="died with exit 1: KeyError: 'length'"):
            worker.ask({"batch": 1})


def test_a_process_that_hangs_is_given_up(engine: Callable[..., Engine]) -> None:
    with latency._worker("sleeper", 60) as worker:
        worker.ask({"open": engine().__dict__})
        os.kill(worker.process.pid, signal.SIGSTOP)
        worker.timeout = 0.2
        with pytest.raises(SpdError, match=r"sleeper did not answer within 0.2 seconds"):
            worker.ask({"batch": 1, "length": 2})
    assert worker.process.poll() is not None


def answers(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What the other side answers, in this process."""
    given: list[dict[str, Any]] = []
    latency.work([json.dumps(request) for request in requests], given.append)
    return given


def test_the_protocol(engine: Callable[..., Engine]) -> None:
    opened, timed, closed = answers({"open": engine().__dict__}, {"batch": 2, "length": 3}, {"close": True})
    assert set(opened) == {"provider", "nodes", "resident"}
    assert timed["ms"] > 0
    assert closed["peak"] >= opened["resident"]


def test_torch_runs_a_checkpoint(tmp_path: Path, toys: ModuleType) -> None:
    encoders.save(toys.bert(), toys.tokenizer(), tmp_path)
    engine = Engine("torch", "torch", str(tmp_path), vocabulary=len(toys.WORDS), threads=1)
    opened, timed = answers({"open": engine.__dict__}, {"batch": 2, "length": 64})
    assert opened["provider"] == "torch cpu"
    assert opened["nodes"] is None
    assert timed["ms"] > 0


def test_errors_are_answered(tmp_path: Path) -> None:
    (answer,) = answers({"open": Engine("x", "torch", str(tmp_path / "none"), vocabulary=9).__dict__})
    assert "cannot load the model" in answer["error"]
    assert answer["hint"]


def test_tokens_are_full_rows_without_padding() -> None:
    engine = Engine("x", "onnxruntime", "", vocabulary=10, pad=3)
    batch = latency._batch((20, 30), engine)
    assert batch["attention_mask"].all()
    assert not batch["token_type_ids"].any()
    assert set(batch["input_ids"].flat) == set(range(10)) - {3}
    assert (batch["input_ids"] == latency._batch((20, 30), engine)["input_ids"]).all()


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.Path, "exists", lambda _path: False)
    assert latency.memory("VmHWM") > 2**20
