"""onnxruntime with bound buffers, on a CPU; what a GPU needs besides is looked at in the options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spdtool.bench.engines import Engine, Shape, make_batch, open_onnxruntime
from spdtool.bench.gpu import onnx_forms
from spdtool.errors import ModelError
from spdtool.export import onnx_session


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A graph that sums the tokens of each row that its mask leaves."""
    names = ("input_ids", "attention_mask")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    nodes = [
        helper.make_node("Mul", list(names), ["real"]),
        helper.make_node("ReduceSum", ["real", "axes"], ["rows"], keepdims=1),
        helper.make_node("Cast", ["rows"], ["logits"], to=TensorProto.FLOAT),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])]
    graph = helper.make_graph(nodes, "sum", inputs, outputs, [numpy_helper.from_array(np.array([1]), "axes")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")
    return Engine("sum", "onnxruntime", str(tmp_path / "model.onnx"), vocabulary=50, threads=1, bound=True)


def test_buffers_hold_each_batch_of_their_shape(engine: Engine) -> None:
    opened = open_onnxruntime(engine)
    assert opened.measure_device is None  # a CPU has no events
    for shape in (Shape(3, 8), Shape(3, 8, (8, 2, 5)), Shape(1, 4), Shape(3, 8)):
        batch = make_batch(shape, engine)
        expected = (batch["input_ids"] * batch["attention_mask"]).sum(1, keepdims=True)
        assert np.array_equal(np.asarray(opened.run(batch)), expected), shape


def test_a_cuda_graph_has_its_provider_option_and_a_number_for_each_shape(engine: Engine, monkeypatch: Any) -> None:
    sessions: list[Any] = []
    open_session = onnx_session.open_session

    def open_on_cpu(path: Path, provider: str, *arguments: Any, **how: Any) -> Any:
        sessions.append((provider, how["provider_options"]))
        return open_session(path, "cpu", *arguments)

    stream = type("Stream", (), {"cuda_stream": 1234})()
    monkeypatch.setattr(onnx_forms.onnx_session, "open_session", open_on_cpu)
    monkeypatch.setattr(onnx_forms, "torch_stream", lambda: stream)
    opened = onnx_forms.open_bound(replace(engine, provider="cuda", graph=True))
    assert sessions == [("cuda", {"enable_cuda_graph": "1", "user_compute_stream": "1234"})]
    assert opened.measure_device is not None
    bound = onnx_forms.BoundSession(open_session(Path(engine.path)), "cpu", graphed=True)
    for shape, number in ((Shape(2, 4), "1"), (Shape(3, 4), "2"), (Shape(2, 4), "1")):
        buffers = bound.buffers_of(make_batch(shape, engine))
        for options in (buffers.waiting, buffers.queued):
            assert options.get_run_config_entry(onnx_forms.GRAPH_ID) == number
        assert buffers.queued.get_run_config_entry(onnx_forms.NO_WAIT) == "1"


def test_axes_get_their_sizes_by_name() -> None:
    assert onnx_forms.resolve_axes(["batch", "sequence", 5], {"batch": 2, "sequence": 7}) == [2, 7, 5]
    for axis in ("spans", None):
        with pytest.raises(ModelError, match="not known before it is computed"):
            onnx_forms.resolve_axes([axis], {"batch": 2})
