"""Which rows a bench has on a GPU, and which of them may be the 1x."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from spdtool.bench.engines import Engine
from spdtool.bench.gpu import rows
from spdtool.bench.gpu.scores import TorchScore, score_precisions
from spdtool.bench.lineup import Lineup
from spdtool.bench.ratios import ModelFile
from spdtool.errors import SpdError
from spdtool.models.load import save_model

FUSED = "onnx-ort-fp16 teacher"


@pytest.fixture
def lineup(tmp_path: Path) -> Lineup:
    """Plain and fused fp16 files of both roles, of which only the graph without row lengths is there."""
    engines_and_files = Lineup(pairs={"onnx-ort-fp16": FUSED})
    file = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), file)
    for name in ("teacher", "student", "onnx-ort-fp16", FUSED):
        engines_and_files.engines.append(Engine(name, "onnxruntime", str(file), vocabulary=9, provider="cuda"))
        engines_and_files.files[name] = ModelFile(100, size=10, sparsity=0.0, score=0.9)
    return engines_and_files


def scores_of(passing: tuple[str, ...]) -> Callable[..., dict[str, TorchScore]]:
    def score(_: Path, precisions: Any, recipe: Any, *, device: str) -> dict[str, TorchScore]:
        assert device == "cuda"
        return {name: TorchScore(0.9 if name in passing else 0.5, 0.9, passes=name in passing) for name in precisions}

    return score


def add(lineup: Lineup, recipe: Any, scratch: Path) -> dict[str, Engine]:
    rows.add_gpu_rows(lineup, {"teacher": scratch, "student": scratch}, scratch, recipe)
    return {engine.name: engine for engine in lineup.engines}


def test_a_dense_row_is_the_1x_only_if_its_score_passes(
    lineup: Lineup, toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "score_precisions", scores_of(("fp32", "tf32", "fp16")))
    engines = add(lineup, toys.recipe(), tmp_path)
    dense = {"torch fp32", "torch tf32", "torch fp16", "torch fp16 graph", "torch fp16 compiled"}
    dense |= {"teacher", FUSED, f"{FUSED} bound", f"{FUSED} graph"}
    assert {name for name, engine in engines.items() if engine.baseline} == set(lineup.dense) == dense
    assert any("torch bf16 is no 1x: its dev score is 0.5000" in note for note in lineup.notes)
    assert any(note.startswith("Not timed: packed") for note in lineup.notes)
    assert engines["torch tf32"].precision == "tf32"
    assert engines["torch fp16 graph"].graph
    assert engines["torch 2:4"].semi_structured
    assert engines[f"{FUSED} bound"].bound
    assert lineup.engines[0].name == "teacher"
    students = {"student in torch fp16 graph", f"student in {FUSED} graph", "onnx-ort-fp16"}
    assert set(lineup.students) == students <= engines.keys()
    assert engines["student in torch fp16 graph"].shrinks
    assert lineup.files["student in torch fp16 graph"].score == 0.9


def test_without_a_dev_set_only_float32_and_exported_rows_are_the_1x(
    lineup: Lineup, toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise SpdError("the file train.csv is missing")

    monkeypatch.setattr(rows, "score_precisions", refuse)
    add(lineup, toys.recipe("bench.compiled=false"), tmp_path)
    assert [name for name in lineup.dense if name.startswith("torch")] == ["torch fp32"]
    assert any("train.csv is missing" in note for note in lineup.notes)
    assert any("torch fp16 graph is no 1x: its dev score is not measured" in note for note in lineup.notes)


def test_torch_alone_is_timed_where_onnxruntime_does_not_run_on_the_gpu(
    lineup: Lineup, toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "score_precisions", scores_of(("fp32", "fp16")))
    rows.use_torch_only(lineup, {"teacher": tmp_path, "student": tmp_path}, "it has no CUDA")
    engines = add(lineup, toys.recipe(), tmp_path)
    assert {engine.kind for engine in engines.values()} == {"torch"}
    assert [engine.name for engine in lineup.engines][:2] == ["teacher", "student"]
    assert engines["teacher"].baseline
    assert lineup.students == ["student in torch fp16 graph"]


def test_engines_are_opened_as_the_memory_of_the_card_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    for free, expected in ((None, None), (2**20, 2), (10 * 2**30, 9)):
        monkeypatch.setattr(rows, "free_gpu_memory", lambda free=free: free)
        assert rows.engines_at_once(tmp_path) == expected


def test_a_precision_that_changes_predictions_does_not_pass(
    tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Any]
) -> None:
    toy_task(dev=12)
    names = {0: "bad", 1: "good"}
    save_model(toys.bert(id2label=names, label2id={"bad": 0, "good": 1}), toys.tokenizer(), tmp_path)
    scores = score_precisions(tmp_path, ("fp32", "tf32", "bf16"), toys.recipe("export.budget=1"), device="cpu")
    assert scores["fp32"] == scores["tf32"]
    assert scores["fp32"].score == scores["fp32"].checkpoint_score
    assert all(score.passes for score in scores.values())
