"""The row of OpenVINO, with doubles of openvino and nncf: the checkpoint runs in torch instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spdtool.bench import lineup, openvino_int8
from spdtool.bench.engines import Engine
from spdtool.bench.lineup import Lineup
from spdtool.bench.ratios import ModelFile
from spdtool.errors import ModelError
from spdtool.models.load import load_model, save_model
from spdtool.models.predict import torch_forward


class Compiled:
    """A compiled model: a checkpoint in torch, whose logits may be turned around."""

    def __init__(self, checkpoint: str, sign: float) -> None:
        self.forward, self.sign = torch_forward(load_model(Path(checkpoint))), sign
        names = ("input_ids", "attention_mask", "token_type_ids")
        self.inputs = [SimpleNamespace(get_any_name=lambda name=name: name) for name in names]

    def __call__(self, inputs: dict[str, Any]) -> list[Any]:
        return [self.sign * self.forward(inputs)]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for both packages; `rows` are those of the calibration, `sign` that of logits of what was quantized."""
    state: dict[str, Any] = {"sign": 1.0}

    class Core:
        def read_model(self, path: str) -> Any:
            return Compiled(state["checkpoint"], state["sign"] if path.endswith(".xml") else 1.0)

        def compile_model(self, model: Any, device: str) -> Any:
            assert device == "CPU"
            return model

    def save_quantized(model: str, path: str, *, compress_to_fp16: bool) -> None:
        assert (model, compress_to_fp16) == ("quantized", False)
        for file in (Path(path), Path(path).with_suffix(".bin")):
            file.write_bytes(bytes(100))

    def quantize(model: Any, rows: Any, *, model_type: str, subset_size: int) -> str:
        assert len(rows) == subset_size
        state["rows"] = rows
        return "quantized"

    openvino = SimpleNamespace(Core=Core, save_model=save_quantized)
    nncf = SimpleNamespace(quantize=quantize, Dataset=list, ModelType=SimpleNamespace(TRANSFORMER="transformer"))
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    return state


def test_it_is_a_rival_only_if_its_score_passes(
    doubles: dict[str, Any], tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Any]
) -> None:
    toy_task(dev=12)
    names = {0: "bad", 1: "good"}
    save_model(toys.bert(id2label=names, label2id={"bad": 0, "good": 1}), toys.tokenizer(), tmp_path / "checkpoint")
    recipe = toys.recipe("export.calibration=8")
    doubles["checkpoint"] = str(tmp_path / "checkpoint")
    for sign, passes in ((1.0, True), (-1.0, False)):
        doubles["sign"] = sign
        engine = Engine("teacher", "onnxruntime", "model.onnx", vocabulary=9, baseline=True)
        rows = Lineup(engines=[engine], files={"teacher": ModelFile(9)})
        lineup.add_openvino_int8(rows, tmp_path / "checkpoint", tmp_path, recipe)
        assert ("openvino int8" in rows.dense) is passes
        assert any("is no rival: its dev score is" in note for note in rows.notes) is not passes
        added = rows.engine("openvino int8")
        assert (added.kind, added.baseline, added.optional) == ("openvino", False, True)
        assert added.precision == "bf16"  # a rival is timed at its best
        assert rows.files["openvino int8"].bytes == 200
    assert len(doubles["rows"]) == 8
    assert all(row["attention_mask"].all() for row in doubles["rows"])


def test_what_nncf_cannot_quantize_is_a_note(
    doubles: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ModelError("NNCF cannot quantize model.onnx: an operator")

    monkeypatch.setattr(openvino_int8, "quantize_static_int8", refuse)
    rows = Lineup(engines=[Engine("teacher", "onnxruntime", "x", vocabulary=9)])
    lineup.add_openvino_int8(rows, tmp_path, tmp_path, None)  # type: ignore[arg-type]
    assert rows.notes == ["Not timed: openvino int8: NNCF cannot quantize model.onnx: an operator."]


def test_both_packages_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in (({"openvino", "nncf"}, True), ({"openvino"}, False)):
        monkeypatch.setattr(
            openvino_int8.importlib.util, "find_spec", lambda name, installed=installed: name in installed or None
        )
        assert openvino_int8.is_installed() is expected
