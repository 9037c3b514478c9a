"""The servable folder as `bundle.write` makes it, the library that opens it, and the layouts made of it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import spdtool
from spdtool import plugins
from spdtool.errors import DataError, DeviceError, ModelError, PluginError, RunError, StageMissing, UnknownName
from spdtool.export.bundle.card import render_card
from spdtool.export.bundle.layouts import write_layout, write_triton_layout
from spdtool.export.bundle.write import write_bundle
from spdtool.run.folder import Run
from spdtool.serving import classifier

Stage = tuple[Path, Path, Any, dict[str, Any]]


def test_what_lies_in_it(servable: Path, stage: Stage) -> None:
    files = sorted(file.relative_to(servable).as_posix() for file in servable.rglob("*") if file.is_file())
    kept = ["config.json", "golden.json", "manifest.json", "onnx/model.onnx", "onnx/model_fp16.onnx", "selftest.py"]
    assert files == sorted([*kept, "README.md", "tokenizer.json", "tokenizer_config.json"])
    assert not any(file.is_symlink() for file in servable.rglob("*"))
    manifest = json.loads((servable / "manifest.json").read_text())
    assert set(manifest["files"]) == {*files} - {"manifest.json", "README.md"}
    assert manifest["text"] == ["first", "second"]
    assert manifest["prefer"] == {"cpu": ["onnx"], "cuda": ["onnx"], "web": ["onnx"]}  # no GPU has run the fp16 one
    exact, rounded = (manifest["variants"][name] for name in ("onnx", "onnx-fp16"))
    assert (exact["flipped"], exact["rows"], exact["dev"]["accuracy"]) == (3, 12, 0.75)
    assert exact["tolerance"] < 2e-4 < 0.02 < rounded["tolerance"] < 0.03


def test_golden_logits_are_those_of_the_checkpoint(servable: Path, stage: Stage) -> None:
    golden = json.loads((servable / "golden.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(stage[1]).eval()
    assert len(golden["rows"]) == 20
    for row in golden["rows"]:
        columns = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.inference_mode():
            np.testing.assert_allclose(model(**columns).logits[0], row["logits"], atol=1e-5)
    assert all(row["pair"] for row in golden["rows"])
    texts, pairs = ([row[name] for row in golden["rows"]] for name in ("text", "pair"))
    logits = spdtool.load(servable).logits(texts, pairs)
    np.testing.assert_allclose(logits, [row["logits"] for row in golden["rows"]], atol=1e-5)


def test_the_card_is_one_that_the_hub_reads(servable: Path) -> None:
    from huggingface_hub import ModelCard

    told = ModelCard.load(servable / "README.md", ignore_metadata_errors=False)
    assert told.data.pipeline_tag == "text-classification"
    assert [(found.metric_type, found.metric_value) for found in told.data.eval_results] == [("accuracy", 0.75)]
    assert "| `onnx/model_fp16.onnx` | any | 1 | 50.00% | 0.7500 | +0.2500 | 3 of 12 |" in told.text


@pytest.mark.parametrize(
    ("flags", "base"),
    [
        ({}, "google-bert/bert-base-uncased"),
        ({"model": "FOLDER"}, None),
        ({"model": "./theirs/encoder"}, None),
        ({"given_teacher": "someone/bert-mrpc"}, "someone/bert-mrpc"),
        ({"given_teacher": "FOLDER"}, None),
        ({"given_teacher": "/gone/teacher"}, None),
        ({"given_teacher": "FOLDER", "student": "pretrained"}, "google-bert/bert-base-uncased"),
        ({"given_teacher": "FOLDER", "student": "someone/small"}, "someone/small"),
        ({"given_teacher": "someone/bert-mrpc", "student": "FOLDER"}, None),
        ({"smoke": True}, None),
        ({"task": "built"}, None),
        ({"task": "built", "given_teacher": "someone/bert-toy"}, "someone/bert-toy"),
    ],
)
def test_the_card_names_what_the_student_was_made_from(
    flags: dict[str, Any], base: str | None, tmp_path: Path, toys: ModuleType, toy_task: Any
) -> None:
    toy_task("plain", build=False)
    toy_task("built")
    student = {"student": flags["student"]} if "student" in flags else {}
    given = {name: value for name, value in flags.items() if name != "student"}
    recipe = toys.recipe(**{"task": "plain"} | given).model_copy(update=student)
    places = {name: str(tmp_path) for name in ("model", "given_teacher", "student") if flags.get(name) == "FOLDER"}
    text = render_card(recipe.model_copy(update=places), {"onnx": assembled()}, {})
    found = [line for line in text.splitlines() if line.startswith("base_model:")]
    assert found == ([] if base is None else [f'base_model: "{base}"'])
    assert str(tmp_path) not in text


def assembled() -> dict[str, Any]:
    return {"file": "onnx/model.onnx", "hardware": "any", "bytes": 1, "sparsity": 0.5}


def test_without_the_portable_target_or_a_fast_tokenizer_there_is_none(
    stage: Stage, tmp_path: Path, toys: ModuleType
) -> None:
    export, checkpoint, recipe, metrics = stage
    copied = shutil.copytree(export, tmp_path / "export")
    (copied / "student/tokenizer.json").unlink()
    assert "no tokenizer.json" in str(write_bundle(copied, checkpoint, recipe, metrics))
    other = toys.recipe('export.targets=["onnx-fp16"]', task="served")
    assert "'onnx' was not exported" in str(write_bundle(copied, checkpoint, other, metrics))


# Opening it ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def strange(servable: Path, tmp_path: Path) -> Path:
    """The bundle, as if its second variant needed a library and were preferred on a CPU."""
    copied = shutil.copytree(servable, tmp_path / "strange")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["variants"]["onnx-fp16"]["library"] = {"file": "lib/x.so", "version": "1", "platform": "any"}
    manifest["prefer"]["cpu"] = ["onnx-fp16", "onnx"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    return copied


def test_one_text_or_two_is_what_the_task_had(servable: Path, single: Path, either: Path) -> None:
    two, one, old = map(spdtool.load, (servable, single, either))
    assert (two.text, one.text, old.text) == (("first", "second"), ("sentence",), None)
    assert two("bad", "good") == old("bad", "good")
    assert one(["bad"]) == old(["bad"])
    with pytest.raises(DataError, match=r"the model takes one text \(sentence\), and two were given"):
        one("bad", "good")
    with pytest.raises(DataError, match=r"the model takes two texts \(first, second\), and one was given"):
        pickle.loads(pickle.dumps(two))(["bad"])
    assert two.logits([[2, 5, 3]]).shape == (1, 3)


@pytest.mark.parametrize("text", [[], ["a", "b", "c"], "ab", [1], None])
def test_a_manifest_with_other_than_one_or_two_texts_is_damaged(text: Any, strange: Path) -> None:
    manifest = json.loads((strange / "manifest.json").read_text())
    (strange / "manifest.json").write_text(json.dumps(manifest | {"text": text}))
    with pytest.raises(ModelError, match="is damaged"):
        spdtool.load(strange)


def opened(folder: Path, **how: Any) -> str:
    found = spdtool.load(folder, **how).bundle
    assert found is not None
    return found.model.name


@pytest.mark.parametrize("trouble", ["no plugin", "not compiled", "does not load"])
def test_where_the_library_is_not_to_be_had_the_portable_one_runs(
    trouble: str, strange: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def path() -> Path:
        if trouble == "not compiled":
            raise DeviceError("not compiled")
        (tmp_path / "x.so").write_bytes(b"no library")
        return tmp_path / "x.so"

    def library(target: str) -> plugins.Library:
        if trouble == "no plugin":
            raise PluginError("none")
        return plugins.Library("x", "1", SimpleNamespace(path=path))

    monkeypatch.setattr(plugins, "find_library", library)
    assert opened(strange) == "model.onnx"
    with pytest.raises((PluginError, DeviceError, ModelError)):
        spdtool.load(strange, variant="onnx-fp16")


def test_where_it_loads_the_preferred_one_runs(strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = classifier.runtime.open_session
    monkeypatch.setattr(
        plugins, "find_library", lambda _: plugins.Library("x", "1", SimpleNamespace(path=lambda: "x.so"))
    )
    monkeypatch.setattr(classifier.runtime, "open_session", lambda *words: real(*words[:3]))
    assert opened(strange) == "model_fp16.onnx"
    assert opened(strange, variant="onnx") == "model.onnx"


def test_a_damaged_file_is_refused_and_not_passed_over(strange: Path) -> None:
    (strange / "onnx/model_fp16.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="model_fp16.onnx has 0 bytes"):
        spdtool.load(strange)


def test_one_that_was_named_is_the_same_in_another_process(servable: Path) -> None:
    again = pickle.loads(pickle.dumps(spdtool.load(servable, variant="onnx-fp16")))
    assert again.bundle.model.name == "model_fp16.onnx"


def test_probabilities(servable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = spdtool.load(servable)
    logits = np.array([[0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0]], np.float32)
    np.testing.assert_allclose(loaded.probabilities(logits), [[1 / 3] * 3, [1, 0, 0]], atol=1e-6)
    monkeypatch.setattr(loaded, "multi_label", True)
    np.testing.assert_allclose(loaded.probabilities(logits), [[0.5] * 3, [1, 0.5, 0]], atol=1e-6)
    monkeypatch.setattr(loaded, "multi_label", False)
    monkeypatch.setattr(loaded, "regression", True)
    assert loaded.probabilities(logits) is None


# Layouts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(stage: Stage, tmp_path: Path) -> Run:
    """A run whose export holds the bundle."""
    made = Run.at(tmp_path / "run", stage[2])
    with made.stage("export") as work:
        shutil.copytree(stage[0] / "bundle", work.folder / "bundle")
    return made


def test_the_layout_of_the_hub(run: Run, tmp_path: Path, servable: Path) -> None:
    told = write_layout(run, "hub", tmp_path / "hub")
    names = {file.relative_to(servable).as_posix() for file in servable.rglob("*") if file.is_file()}
    assert set(told["files"]) == names | {".gitattributes"}
    assert "*.onnx filter=lfs" in (tmp_path / "hub/.gitattributes").read_text()


def test_the_layout_of_triton(run: Run, tmp_path: Path) -> None:
    told = write_layout(run, "triton", tmp_path / "my model")
    assert {name.split("/")[0] for name in told["files"]} == {"my_model", "my_model_tokenizer", "my_model_model"}
    config = (tmp_path / "my model/my_model_model/config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "KIND_CPU" in config
    assert "dims: [3]" in config


def test_the_tokenizer_step_gives_what_the_library_gives(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servable: Path
) -> None:
    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    stub: Any = ModuleType("triton_python_backend_utils")
    stub.Tensor = Tensor
    stub.InferenceResponse = lambda tensors=None, error=None: SimpleNamespace(tensors=tensors, error=error)
    stub.TritonError = str
    stub.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(__import__("sys").modules, "triton_python_backend_utils", stub)
    write_layout(run, "triton", tmp_path / "m")
    scope: dict[str, Any] = {}
    exec((tmp_path / "m/m_tokenizer/1/model.py").read_text(), scope)
    step = scope["TritonPythonModel"]()
    step.initialize({"model_repository": str(tmp_path / "m/m_tokenizer"), "model_version": "1"})
    texts, pairs = ["good film", "a meal and a book"], ["bad", "so cold it was"]
    given = {
        name: Tensor(name, np.array([[text.encode()] for text in column], object))
        for name, column in (("TEXT", texts), ("PAIR", pairs))
    }
    blank = Tensor("PAIR", np.array([b"", b"x"]))
    whole, alone, wrong, empty = step.execute(
        [given, {"TEXT": given["TEXT"]}, {"TEXT": Tensor("TEXT", np.array([b"\xff"]))}, given | {"PAIR": blank}]
    )
    classify = spdtool.load(servable)
    columns = {tensor.name: tensor.array for tensor in whole.tensors}
    assert columns["input_ids"].shape[1] in (4, 8, 16)
    np.testing.assert_allclose(classify.logits(columns), classify.logits(texts, pairs), atol=1e-5)
    assert "PAIR is missing" in alone.error
    assert "cannot be read" in wrong.error
    assert "PAIR has an empty text" in empty.error


def test_the_layout_of_triton_has_the_texts_of_the_task(run: Run, either: Path, single: Path) -> None:
    def inputs(bundle: Path, folder: Path) -> str:
        folder.mkdir()
        write_triton_layout(bundle, folder, "cpu", "m")
        configs = [(folder / name / "config.pbtxt").read_text() for name in ("m", "m_tokenizer")]
        taken = {text[text.index("input [") :].split("]\n")[0] for text in configs}
        assert len(taken) == 1
        assert ('key: "PAIR"' in configs[0]) == ("PAIR" in min(taken))
        return taken.pop()

    assert "PAIR" not in inputs(single, run.path / "single")
    assert 'name: "PAIR" data_type: TYPE_STRING dims: [1] optional: true' in inputs(either, run.path / "either")
    assert 'name: "PAIR" data_type: TYPE_STRING dims: [1] }' in inputs(run.path / "export/bundle", run.path / "pairs")


def test_a_layout_that_cannot_be_written(run: Run, tmp_path: Path, spdtool: Any) -> None:
    with pytest.raises(UnknownName, match="no layout 'tritn'"):
        write_layout(run, "tritn", tmp_path / "x")
    with pytest.raises(RunError, match="not an empty folder"):
        write_layout(run, "hub", run.path)
    with pytest.raises(StageMissing):
        write_layout(Run.at(tmp_path / "none", run.recipe), "hub", tmp_path / "x")
    for words in (("--layout", "hub", "--run", run.path), ("--layout", "hub", "--to", tmp_path / "x")):
        assert spdtool("export", *words).exit_code == 2
    called = spdtool("export", "--layout", "hub", "--run", run.path, "--to", tmp_path / "out", "--json")
    assert (called.exit_code, json.loads(called.stdout)["layout"]) == (0, "hub")
