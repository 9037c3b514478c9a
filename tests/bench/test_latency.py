"""Timing engines in interleaved rounds: real processes on a tiny graph, and their failures. No durations asserted."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from spdtool.bench import engines, latency
from spdtool.bench.engines import Engine, Shape
from spdtool.errors import SpdError
from spdtool.export.targets import Onnx
from spdtool.models.load import save_model

TIMED = {"batch": 2, "length": 3, "real": [], "turn": 0.001}


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    """Return `engine("name")`, which makes an engine of a graph that sums the unmasked tokens."""
    ints, names = TensorProto.INT64, ("input_ids", "attention_mask")
    inputs = [helper.make_tensor_value_info(name, ints, ["batch", "sequence"]) for name in names]
    nodes = [
        helper.make_node("Mul", list(names), ["kept"]),
        helper.make_node("ReduceSum", ["kept"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "sum", inputs, [helper.make_tensor_value_info("logits", ints, [])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")

    def make(name: str = "sum", **fields: Any) -> Engine:
        return Engine(
            **{"name": name, "kind": "onnxruntime", "path": str(tmp_path / "model.onnx"), "vocabulary": 50} | fields
        )

    return make


def test_every_engine_is_timed_at_every_shape_in_every_round(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shadow in ("numpy.py", "json.py", "spdtool.py"):  # what lies in the current folder is not imported
        (tmp_path / shadow).write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    shapes = [Shape(1, 4), Shape(3, 8), Shape(3, 8, (8, 2, 1))]
    race = latency.time_engines([engine("one"), engine("two")], shapes, threads=(1, 2), rounds=5, warmup=1)
    assert [(timing.engine.name, timing.engine.threads) for timing in race.timings] == [
        ("one", 1), ("two", 1), ("one", 2), ("two", 2),
    ]  # fmt: skip
    assert race.missing == {}
    for timing in race.timings:
        assert {shape: len(values) for shape, values in timing.rounds.items()} == dict.fromkeys(shapes, 5)
        assert all(0 < timing.least[shape] <= min(values) for shape, values in timing.rounds.items())
        assert timing.provider == "CPUExecutionProvider"
        assert timing.nodes == {"CPUExecutionProvider": {"Mul": 1, "ReduceSum": 1}}
        assert 0 < timing.resident <= timing.peak < 400 * 2**20  # no torch in there


class Fake:
    """A fake engine process, whose batches take a second each."""

    asked: ClassVar[list[str]] = []
    now: ClassVar[float] = 0.0

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "batch" in request:
            Fake.asked.append(self.name)
            Fake.now += 1
        if "open" in request and self.name == "absent":
            raise SpdError("absent cannot be timed: no compiler")
        return {"provider": "p", "nodes": None, "resident": 1, "peak": 2, "ms": 1.0, "least": 0.5}

    def kill(self) -> None:
        Fake.asked.append("end")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """Replace engine processes and their clock by fakes."""
    monkeypatch.setattr(Fake, "asked", [])
    monkeypatch.setattr(Fake, "now", 0.0)
    monkeypatch.setattr(engines, "EngineProcess", Fake)
    monkeypatch.setattr(latency, "PAUSE", 0)
    monkeypatch.setattr(latency.time, "monotonic", lambda: Fake.now)
    return Fake


def test_the_order_of_engines_rotates_with_each_round(engine: Callable[..., Engine], fake: type[Fake]) -> None:
    race = latency.time_engines([engine(name) for name in "abc"], [Shape(1, 2)], rounds=2, warmup=1)
    assert fake.asked == [*"cab", *"abc", *"bca", "end", "end", "end"]
    assert all(len(timing.rounds[Shape(1, 2)]) == 2 for timing in race.timings)


def test_rounds_fit_into_the_time_of_all_numbers_of_threads(engine: Callable[..., Engine], fake: type[Fake]) -> None:
    """A round takes a second, so 30 seconds give 10 rounds for each of three thread counts."""

    def counts(seconds: float, rounds: int) -> list[int]:
        race = latency.time_engines(
            [engine()], [Shape(1, 2)], threads=(1, 2, 4), rounds=rounds, warmup=0, seconds=seconds
        )
        return [len(timing.rounds[Shape(1, 2)]) for timing in race.timings]

    assert counts(30, 50) == [10, 10, 10]
    assert counts(1000, 8) == [8, 8, 8]
    assert counts(0, 50) == [latency.MIN_ROUNDS] * 3
    assert counts(0, 2) == [2, 2, 2]


def test_an_optional_engine_may_be_missing_and_the_reason_is_kept(
    engine: Callable[..., Engine], fake: type[Fake]
) -> None:
    timed_engines = [engine("here"), engine("absent", optional=True)]
    result = latency.time_engines(timed_engines, [Shape(1, 2)], threads=(1, 2), rounds=1, warmup=0)
    assert [timing.engine.name for timing in result.timings] == ["here", "here"]
    assert result.missing == {"absent": "absent cannot be timed: no compiler"}
    with pytest.raises(SpdError, match="no compiler"):
        latency.time_engines([engine("absent")], [Shape(1, 2)], rounds=1, warmup=0)


def test_a_turn_makes_as_many_calls_as_fit_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([3, 1, 9, 2, 50])  # milliseconds
    clock = 0

    def call() -> None:
        nonlocal clock
        clock += next(durations) * 10**6

    monkeypatch.setattr(engines.time, "perf_counter_ns", lambda: clock)
    assert engines.time_turn(call, 0.014) == {"ms": 2.5, "least": 1.0, "batches": 4}
    assert engines.time_turn(call, 0.014) == {"ms": 50.0, "least": 50.0, "batches": 1}


def test_a_model_that_does_not_open_is_a_clear_error(engine: Callable[..., Engine], tmp_path: Path) -> None:
    with pytest.raises(SpdError, match=r"broken cannot be timed: onnxruntime cannot open .*none.onnx"):
        latency.time_engines([engine("broken", path=str(tmp_path / "none.onnx"))], [Shape(1, 2)], rounds=1, warmup=0)


def test_a_dying_process_is_a_clear_error_and_all_processes_end(engine: Callable[..., Engine]) -> None:
    with engines.start_process("victim", 60) as worker:
        worker.ask({"open": engine().__dict__})
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(SpdError, match="the process that times victim died with signal 9"):
            worker.ask(TIMED)
    assert worker.process.poll() is not None


def test_the_last_output_of_a_dying_process_is_shown(engine: Callable[..., Engine]) -> None:
    with engines.start_process("victim", 60) as worker:
        worker.ask({"open": engine().__dict__})
        with pytest.raises(SpdError, match="died with exit 1: KeyError: 'length'"):
            worker.ask({"batch": 1})


def test_a_hanging_process_is_killed(engine: Callable[..., Engine]) -> None:
    with engines.start_process("sleeper", 60) as worker:
        worker.ask({"open": engine().__dict__})
        os.kill(worker.process.pid, signal.SIGSTOP)
        worker.timeout = 0.2
        with pytest.raises(SpdError, match=r"sleeper did not answer within 0.2 seconds"):
            worker.ask(TIMED)
    assert worker.process.poll() is not None


def answers(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the engine loop in this process; return its answers."""
    responses: list[dict[str, Any]] = []
    engines.run_engine([json.dumps(request) for request in requests], responses.append)
    return responses


def test_the_protocol(engine: Callable[..., Engine]) -> None:
    open_response, timing_response, closed = answers({"open": engine().__dict__}, TIMED, {"close": True})
    assert set(open_response) == {"provider", "nodes", "resident"}
    assert timing_response["ms"] >= timing_response["least"] > 0
    assert timing_response["batches"] >= 1
    assert closed["peak"] >= open_response["resident"]


def test_torch_runs_a_checkpoint(tmp_path: Path, toys: ModuleType) -> None:
    save_model(toys.bert(), toys.tokenizer(), tmp_path)
    engine = Engine("torch", "torch", str(tmp_path), vocabulary=len(toys.WORDS), threads=1)
    open_response, timing_response = answers({"open": engine.__dict__}, TIMED | {"length": 64})
    assert open_response["provider"] == "torch cpu"
    assert open_response["nodes"] is None
    assert timing_response["ms"] > 0


def test_errors_are_answered(tmp_path: Path) -> None:
    (answer,) = answers({"open": Engine("x", "torch", str(tmp_path / "none"), vocabulary=9).__dict__})
    assert "cannot load the model" in answer["error"]
    assert answer["hint"]


def test_another_program_may_serve_as_an_engine(engine: Callable[..., Engine], tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'provider': 'other', 'nodes': None, 'resident': 1, 'peak': 2, 'ms': 3, 'least': 1}),"
        " flush=True)\n"
    )
    timed_engines = [engine("other", command=(sys.executable, str(script)))]
    (timing,) = latency.time_engines(timed_engines, [Shape(1, 2)], rounds=2, warmup=0).timings
    assert (timing.provider, timing.rounds, timing.peak) == ("other", {Shape(1, 2): [3, 3]}, 2)


def test_compiled_torch_answers_or_gives_the_reason(tmp_path: Path, toys: ModuleType, monkeypatch: Any) -> None:
    """A stub replaces torch.compile, because compiling takes too long for a test."""
    import torch

    save_model(toys.bert(), toys.tokenizer(), tmp_path)
    engine = Engine("compiled", "torch", str(tmp_path), vocabulary=len(toys.WORDS), threads=1, compiled=True)
    compile_options: list[Any] = []

    def compile_nothing(model: Any, **options: Any) -> Any:
        compile_options.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    open_response, timing_response = answers({"open": engine.__dict__}, TIMED)
    assert compile_options == [{"dynamic": True}]
    assert open_response["provider"] == "torch cpu"
    assert timing_response["ms"] > 0

    class Broken(torch.nn.Module):
        def forward(self, **_: Any) -> None:
            raise RuntimeError("no g++ found\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda _model, **_how: Broken())
    (answer,) = answers({"open": engine.__dict__})
    assert answer["error"] == "torch.compile does not work here: no g++ found"


def test_without_fusions_the_answer_is_the_same(tmp_path: Path, toys: ModuleType) -> None:
    save_model(toys.bert(), toys.tokenizer(), tmp_path / "checkpoint")
    Onnx().export(tmp_path / "checkpoint", tmp_path, toys.recipe())
    fused = Engine("x", "onnxruntime", str(tmp_path / "onnx/model.onnx"), vocabulary=len(toys.WORDS), threads=1)
    inputs = engines.make_batch(Shape(3, 9), fused)
    (forward, *fused_details), (raw, *raw_details) = (
        engines.open_onnxruntime(replace(fused, fused=is_fused)) for is_fused in (True, False)
    )
    assert fused_details == raw_details
    np.testing.assert_allclose(forward(inputs)[0], raw(inputs)[0], atol=1e-5)
    session = engines.onnx_session.open_session(Path(fused.path), fused=False)
    level = session.get_session_options().graph_optimization_level
    assert level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC


def test_tokens_are_full_rows_without_padding() -> None:
    engine = Engine("x", "onnxruntime", "", vocabulary=10, pad=3)
    batch = engines.make_batch(Shape(20, 30), engine)
    assert batch["attention_mask"].all()
    assert not batch["token_type_ids"].any()
    assert set(batch["input_ids"].flat) == set(range(10)) - {3}
    assert (batch["input_ids"] == engines.make_batch(Shape(20, 30), engine)["input_ids"]).all()


def test_a_padded_batch_has_the_same_tokens_up_to_each_real_length() -> None:
    engine = Engine("x", "onnxruntime", "", vocabulary=10, pad=3)
    full, padded = engines.make_batch(Shape(2, 4), engine), engines.make_batch(Shape(2, 4, (4, 1)), engine)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert padded["input_ids"][1, 1:].tolist() == [3, 3, 3]
    is_token = padded["attention_mask"] == 1
    assert (padded["input_ids"] == full["input_ids"])[is_token].all()
    assert (str(Shape(2, 4)), str(Shape(2, 4, (4, 1)))) == ("2x4", "2x4 padded")


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.Path, "exists", lambda _path: False)
    assert engines.memory_bytes("VmHWM") > 2**20


def test_engines_that_do_not_fit_together_are_timed_in_groups_with_the_first_one(
    engine: Callable[..., Engine], fake: type[Fake]
) -> None:
    names = "abcde"
    groups = latency.group_engines([engine(name) for name in names], 3)
    assert ["".join(member.name for member in group) for group in groups] == ["abc", "ade"]
    assert len(latency.group_engines([engine(name) for name in names], 5)) == 1
    result = latency.time_engines([engine(name) for name in names], [Shape(1, 2)], rounds=2, warmup=0, together=3)
    assert [timing.engine.name for timing in result.timings] == list(names)
    assert fake.asked == [*"abc", *"bca", *3 * ["end"], *"ade", *"dea", *3 * ["end"]]


def test_an_optional_engine_that_cannot_run_a_shape_is_left_out(
    engine: Callable[..., Engine], fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Fake.ask

    def refuse(self: Fake, request: dict[str, Any]) -> dict[str, Any]:
        if self.name == "weak" and request.get("length") == 9:
            raise SpdError("weak cannot be timed: out of memory")
        return ask(self, request)

    monkeypatch.setattr(Fake, "ask", refuse)
    shapes = [Shape(1, 2), Shape(1, 9)]
    members = [engine("here"), engine("weak", optional=True)]
    result = latency.time_engines(members, shapes, rounds=2, warmup=0)
    assert [timing.engine.name for timing in result.timings] == ["here"]
    assert result.missing == {"weak": "weak cannot be timed: out of memory"}
    assert fake.asked.count("weak") == 1
    with pytest.raises(SpdError, match="out of memory"):
        latency.time_engines([engine("weak")], shapes, rounds=2, warmup=0)


def test_rounds_of_groups_are_cut_to_those_that_all_have() -> None:
    shape = Shape(1, 2)
    timings = []
    for name, count in (("a", 3), ("b", 2)):
        engine = Engine(name, "torch", "somewhere", vocabulary=9)
        rounds = {shape: [float(value) for value in range(count)]}
        timings.append(latency.Timing(engine, "p", None, 1, 2, rounds, {shape: 0.0}, device=dict(rounds)))
    assert [timing.rounds[shape] for timing in latency.equal_rounds(timings)] == 2 * [[0.0, 1.0]]
    assert latency.equal_rounds(timings)[0].device[shape] == [0.0, 1.0]


def test_a_gpu_tells_its_own_time_and_memory(engine: Callable[..., Engine], monkeypatch: Any) -> None:
    used = iter([100, 130, 130, 170])  # bytes before and after opening, before and after the first batch

    def open_on_gpu(opened: Engine) -> engines.OpenEngine:
        return engines.OpenEngine(lambda batch: None, "CUDA", None, lambda batch: 5.0)

    monkeypatch.setattr("spdtool.bench.gpu.hardware.used_gpu_memory", lambda: next(used))
    monkeypatch.setattr("spdtool.bench.gpu.hardware.used_by_driver", lambda: None)
    monkeypatch.setitem(engines.OPENERS, "onnxruntime", open_on_gpu)
    requests = [{"open": engine(provider="cuda").__dict__}, TIMED, TIMED, {"close": True}]
    opened, first, second, closed = answers(*requests)
    assert (opened["resident"], closed["peak"]) == (30, 70)
    assert first["device_ms"] == second["device_ms"] == 5.0
