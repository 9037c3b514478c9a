"""torch as the bench runs it on a GPU, with doubles of CUDA on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.bench.engines import Engine, Shape, make_batch
from spdtool.bench.gpu import torch_forms
from spdtool.bench.gpu.torch_forms import GraphedForward, keep_two_of_four, load_form, open_torch
from spdtool.errors import SpdError
from spdtool.models.load import save_model
from spdtool.models.predict import torch_forward


@pytest.fixture
def engine(tmp_path: Path, toys: ModuleType) -> Iterator[Engine]:
    """A toy checkpoint in torch, on a CPU."""
    save_model(toys.bert(), toys.tokenizer(), tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield Engine("torch", "torch", str(tmp_path), vocabulary=len(toys.WORDS), threads=1)
    torch.set_float32_matmul_precision(precision)


def test_each_precision_is_that_of_weights_or_products(engine: Engine) -> None:
    types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    batch = make_batch(Shape(2, 6), engine)
    expected = np.asarray(open_torch(engine).run(batch))
    for precision, dtype in types.items():
        form = replace(engine, precision=precision)
        assert next(load_form(form).parameters()).dtype == dtype
        logits = np.asarray(open_torch(form).run(batch))
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).max() < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has a device")
def test_a_torch_without_the_device_is_a_clear_error(engine: Engine) -> None:
    with pytest.raises(SpdError, match="torch cannot hold the model so"):
        open_torch(replace(engine, provider="cuda"))


def test_the_two_largest_of_four_stay() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    sparse = keep_two_of_four(weight).reshape(-1, 4)
    assert ((sparse != 0).sum(1) == 2).all()
    largest = weight.reshape(-1, 4).abs().topk(2, dim=1).values
    assert torch.equal(sparse.abs().topk(2, dim=1).values, largest)


def test_every_linear_layer_of_the_encoder_is_stored_in_two_of_four(engine: Engine, monkeypatch: Any) -> None:
    converted: list[torch.Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: converted.append(weight) or weight)
    model = load_form(replace(engine, semi_structured=True))
    assert len(converted) == 6 * len(model.bert.encoder.layer)
    assert all(((weight.reshape(-1, 4) != 0).sum(1) == 2).all() for weight in converted)


def fake_capture(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture nothing: compute again at each replay, into the same tensor."""
    result = compute()
    return lambda: result.copy_(compute()), result


def test_replays_give_the_answer_of_each_batch_from_one_graph_a_shape(engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_forms, "capture_graph", fake_capture)
    model = load_form(engine)
    graphed, forward = GraphedForward(model, "cpu"), torch_forward(model)
    for shape in (Shape(3, 8), Shape(3, 8, (8, 2, 5)), Shape(3, 8, (1, 8, 8)), Shape(2, 8)):
        batch = {name: make_batch(shape, engine)[name] for name in torch_forms.TAKEN_INPUTS}
        assert np.allclose(graphed(batch), forward(batch), atol=1e-6), shape
    assert len(graphed.captures) == 3  # with and without padding at 3 x 8, and 2 x 8
    opened = open_torch(replace(engine, graph=True))
    monkeypatch.setattr(torch_forms, "time_on_device", lambda replay: 7.0)
    assert opened.measure_device is not None
    assert opened.measure_device(make_batch(Shape(2, 8), engine)) == 7.0


def test_a_graph_is_warmed_up_on_a_stream_of_its_own_before_the_capture(monkeypatch: Any) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def inside(name: str) -> Iterator[None]:
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    def stream_of(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda waited_stream: events.append(f"{name} waits"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream_of("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream_of("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside(stream.name))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: inside("capture"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: events.append("replay")))

    def compute() -> torch.Tensor:
        events.append("compute")
        return torch.ones(1)

    replay, result = torch_forms.capture_graph(compute)
    replay()
    assert result.item() == 1
    warmup = ["side waits", "enter side", *torch_forms.CAPTURE_WARMUP * ["compute"], "leave side", "main waits"]
    assert events == [*warmup, "enter main", "enter capture", "compute", "leave capture", "leave main", "replay"]


def test_a_model_that_cannot_be_captured_is_a_clear_error(engine: Engine, monkeypatch: Any) -> None:
    def refuse(_: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch_forms, "capture_graph", refuse)
    with pytest.raises(SpdError, match="cannot be captured in a CUDA graph: operation not permitted when stream"):
        open_torch(replace(engine, graph=True)).run(make_batch(Shape(2, 8), engine))


def test_device_time_is_the_mean_of_several_calls_between_two_events(monkeypatch: Any) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "stream"

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 10.0 * torch_forms.DEVICE_CALLS

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert torch_forms.time_on_device(lambda: calls.append("call"), "stream") == 10
    assert calls == [*torch_forms.DEVICE_CALLS * ["call"], "wait"]
