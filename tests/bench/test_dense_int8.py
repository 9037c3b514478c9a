"""The teacher in dynamic int8: smaller file, nearly equal logits, and a clear error if it cannot be quantised."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spdtool.bench import dense_int8
from spdtool.bench.engines import Engine, Shape, make_batch, open_onnxruntime
from spdtool.errors import ModelError
from spdtool.export.targets import Onnx
from spdtool.models.load import save_model


def test_the_file_is_smaller_and_answers_nearly_the_same(
    tmp_path: Path, toys: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(toys.bert(layers=1, hidden=64), toys.tokenizer(), tmp_path / "checkpoint")
    Onnx().export(tmp_path / "checkpoint", tmp_path, toys.recipe())
    model, file = tmp_path / "onnx/model.onnx", tmp_path / "int8.onnx"
    before = model.read_bytes()
    caplog.clear()
    level = logging.getLogger().level
    dense_int8.quantize_dynamic_int8(model, file)
    assert logging.getLogger().level == level
    assert not caplog.records
    assert model.read_bytes() == before
    assert file.stat().st_size < len(before) / 2
    dense = Engine("x", "onnxruntime", str(model), vocabulary=len(toys.WORDS), threads=1)
    inputs = make_batch(Shape(8, 9), dense)
    expected = open_onnxruntime(dense)[0](inputs)[0]
    forward, _, nodes, _ = open_onnxruntime(Engine("y", "onnxruntime", str(file), len(toys.WORDS), threads=1))
    actual = forward(inputs)[0]
    assert "MatMulInteger" in str(nodes)
    assert 0 < np.abs(actual - expected).max() < 0.2 * np.abs(expected).max()


def test_a_model_that_cannot_be_quantised_gives_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime.quantization as quantization
    from onnx import helper, save

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no\nand a long story")

    save(helper.make_model(helper.make_graph([], "empty", [], [])), tmp_path / "model.onnx")
    monkeypatch.setattr(quantization, "quantize_dynamic", refuse)
    with pytest.raises(ModelError, match="cannot quantise model.onnx: no$"):
        dense_int8.quantize_dynamic_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
