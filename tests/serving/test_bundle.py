"""The bundle of a run: its files, how it is opened, and layouts for other servers."""

from __future__ import annotations

import json
import pickle
import re
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
from spdtool.export import onnx_session
from spdtool.export.bundle.card import render_card
from spdtool.export.bundle.layouts import write_layout, write_triton_layout
from spdtool.export.bundle.write import write_bundle
from spdtool.run.folder import Run
from spdtool.run.records import ExportResult, LibraryRecord, Quality, Variant
from spdtool.tasks.decision import OneNumber, SeveralLabels
from spdtool.tasks.sentence_settings import SentenceSettings

TEXT_INPUT = "data_type: TYPE_STRING dims: [1]"


def test_the_bundle_contains_the_variants_and_the_serving_files(servable: Path) -> None:
    files = sorted(file.relative_to(servable).as_posix() for file in servable.rglob("*") if file.is_file())
    assert files == [
        "README.md",
        "config.json",
        "golden.json",
        "manifest.json",
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "selftest.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(file.is_symlink() for file in servable.rglob("*"))
    manifest = json.loads((servable / "manifest.json").read_text())
    assert set(manifest["files"]) == {*files} - {"manifest.json", "README.md"}
    assert manifest["text"] == ["first", "second"]
    assert manifest["prefer"] == {"cpu": ["onnx"], "cuda": ["onnx"], "web": ["onnx"]}  # no GPU has run the fp16 one
    exact, rounded = (manifest["variants"][name] for name in ("onnx", "onnx-fp16"))
    assert (exact["flipped"], exact["rows"], exact["dev"]["accuracy"]) == (3, 12, 0.75)
    assert exact["tolerance"] < 2e-4 < 0.02 < rounded["tolerance"] < 0.03


def test_golden_logits_equal_those_of_the_checkpoint(servable: Path, exported: Any) -> None:
    golden = json.loads((servable / "golden.json").read_text())
    assert list(golden) == ["format", "max_length", "padding", "labels", "rows"]
    model = AutoModelForSequenceClassification.from_pretrained(exported.checkpoint).eval()
    assert len(golden["rows"]) == 20
    for row in golden["rows"]:
        columns = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.inference_mode():
            np.testing.assert_allclose(model(**columns).logits[0], row["logits"], atol=1e-5)
    assert all(row["pair"] for row in golden["rows"])
    texts, pairs = ([row[name] for row in golden["rows"]] for name in ("text", "pair"))
    logits = spdtool.load(servable).logits(texts, pairs)
    np.testing.assert_allclose(logits, [row["logits"] for row in golden["rows"]], atol=1e-5)


def test_the_model_card_is_valid_for_the_hub(servable: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(servable / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "text-classification"
    assert [(entry.metric_type, entry.metric_value) for entry in card.data.eval_results] == [("accuracy", 0.75)]
    assert "| `onnx/model_fp16.onnx` | any | 1 | 50.00% | 0.7500 | +0.2500 | 3 of 12 |" in card.text


def test_the_model_card_fits_the_kind_of_task(toys: ModuleType, toy_task: Any) -> None:
    """A transformers.js pipeline takes one text and turns logits into probabilities, so not every task fits."""
    variant = Variant(target="onnx", file="onnx/model.onnx", files=[], bytes=1, sparsity=0.5)
    measured = variant.model_copy(
        update={"dev": {"score": 0.5}, "checkpoint_dev": {"score": 0.5}, "rows": 9, "flipped": 1}
    )
    numbers = measured.model_copy(
        update={"flipped": None, "largest_change": 0.5, "mean_change": 0.25, "rank_correlation": 0.75}
    )
    classes, number = {"id2label": {"0": "bad", "1": "good"}}, {"id2label": {"0": "score"}}
    for pairs, labels, config in (
        (False, ("bad", "good"), classes),
        (True, ("bad", "good"), classes),
        (True, (), number),
    ):
        toy_task(pairs=pairs, labels=labels)
        card = render_card(toys.recipe(), {"onnx": measured if labels else numbers}, config, Quality())
        single_class = bool(labels) and not pairs
        assert ('pipeline("text-classification"' in card) == single_class
        assert ("text_pair" in card) == pairs
        name = "classify" if labels else "predict"
        assert (f'{name}("first text", "second text")' in card) == pairs
        assert ("| 1 of 9 |" in card) == bool(labels)
        assert ("largest change, mean change, rank correlation |" in card) == (not labels)
        assert ("| 5.0e-01, 2.5e-01, 0.750000 |" in card) == (not labels)
        assert "not that of the zeros alone" not in card
        assert "the dev rows both picked the checkpoint and report its score" in card
    native = measured.model_copy(update={"library": LibraryRecord(file="lib/ops.so", distribution="ops")})
    assert "not that of the zeros alone" in render_card(
        toys.recipe(), {"onnx": measured, "native": native}, classes, Quality()
    )


def python_snippets(card: str, folder: Path) -> list[str]:
    """Return the Python snippets of a model card, with `folder` in place of its placeholder."""
    return [block.replace("FOLDER", str(folder)) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]


def test_the_python_code_of_the_card_runs_and_agrees(servable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (servable / "README.md").read_text()
    answers = []
    for code in python_snippets(card, servable):
        exec(compile(code, "README.md", "exec"), {})
        answers.append(capsys.readouterr().out.strip())
    assert len(answers) == 2
    assert set(answers) == {spdtool.load(servable, variant="onnx")("first text", "second text")}


def test_the_python_code_of_every_kind_s_card_can_be_compiled(toys: ModuleType) -> None:
    variant = Variant(target="onnx", file="onnx/model.onnx", files=[], bytes=1, sparsity=0.5)
    for dataset, architecture in (
        (toys.tag_dataset(), "BertForTokenClassification"),
        (toys.question_dataset(), "BertForQuestionAnswering"),
        (toys.ranking_dataset(), "BertForSequenceClassification"),
    ):
        toys.register(dataset)
        config = {"architectures": [architecture], "id2label": dict(enumerate(dataset.labels)) or {"0": "score"}}
        card = render_card(toys.recipe(task=dataset.name), {"onnx": variant}, config, Quality())
        plugins.datasets.unregister(dataset.name)
        snippets = python_snippets(card, Path("folder"))
        assert len(snippets) >= 2, dataset.name
        for code in snippets:
            compile(code, f"README.md of {dataset.name}", "exec")


def test_the_card_of_a_sentence_encoder_names_its_pooling_and_prompt(toys: ModuleType, toy_task: Any) -> None:
    toy_task()
    variant = Variant(target="onnx", file="onnx/model.onnx", files=[], bytes=1, sparsity=0.5)
    for pooling, normalize, prompt, expected in (
        ("mean", True, "", 'embed("one text", { pooling: "mean", normalize: true })'),
        ("cls", False, "", 'embed("one text", { pooling: "cls", normalize: false })'),
        ("lasttoken", True, "query: ", 'embed("query: one text", { pooling: "last_token", normalize: true })'),
    ):
        settings = SentenceSettings(pooling, normalize, prompt=prompt)
        config = {"architectures": ["BertModel"], "hidden_size": 32}
        card = render_card(toys.recipe(), {"onnx": variant}, config, Quality(), settings)
        assert expected in card
        assert ("knows no prompt" in card) == bool(prompt)


def test_the_card_names_the_base_model_only_if_it_is_public(tmp_path: Path, toys: ModuleType, toy_task: Any) -> None:
    toy_task("plain", build=False)
    toy_task("built")
    folder = str(tmp_path)
    variant = Variant(target="onnx", file="onnx/model.onnx", files=[], bytes=1, sparsity=0.5)
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, "google-bert/bert-base-uncased"),
        ({"model": folder}, None),
        ({"model": "./theirs/encoder"}, None),
        ({"given_teacher": "someone/bert-mrpc"}, "someone/bert-mrpc"),
        ({"given_teacher": folder}, None),
        ({"given_teacher": "/gone/teacher"}, None),
        ({"given_teacher": folder, "student": "pretrained"}, "google-bert/bert-base-uncased"),
        ({"given_teacher": folder, "student": "someone/small"}, "someone/small"),
        ({"given_teacher": "someone/bert-mrpc", "student": folder}, None),
        ({"smoke": True}, None),
        ({"task": "built"}, None),
        ({"task": "built", "given_teacher": "someone/bert-toy"}, "someone/bert-toy"),
    ]
    for fields, base_model in cases:
        task = fields.get("task", "plain")
        recipe = toys.recipe(task=task).model_copy(update=fields)
        card = render_card(recipe, {"onnx": variant}, {}, Quality())
        lines = [line for line in card.splitlines() if line.startswith("base_model:")]
        expected = [] if base_model is None else [f'base_model: "{base_model}"']
        assert lines == expected, fields
        assert folder not in card, fields


def test_no_bundle_is_written_without_the_portable_target_or_a_fast_tokenizer(exported: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.folder, tmp_path / "export")
    (copy / "student/tokenizer.json").unlink()
    assert "no tokenizer.json" in str(write_bundle(copy, exported.checkpoint, exported.recipe, exported.result))
    fp16_only = ExportResult(first="onnx-fp16", targets={"onnx-fp16": exported.result.targets["onnx-fp16"]})
    assert "'onnx' was not exported" in str(write_bundle(copy, exported.checkpoint, exported.recipe, fp16_only))


# Opening it ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def library_bundle(servable: Path, tmp_path: Path, toys: ModuleType) -> Path:
    """The bundle with a second variant that needs an operator library and is preferred on a CPU."""
    copy = shutil.copytree(servable, tmp_path / "strange")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["variants"]["onnx-fp16"]["library"] = {"file": "lib/x.so", "version": "1", "platform": "any"}
    manifest["prefer"]["cpu"] = ["onnx-fp16", "onnx"]
    toys.seal(copy, variants=manifest["variants"], prefer=manifest["prefer"])
    return copy


def test_one_text_or_two_is_what_the_task_had(servable: Path, single: Path, older_bundle: Path) -> None:
    of_pairs, of_texts, of_either = map(spdtool.load, (servable, single, older_bundle))
    assert (of_pairs.text, of_texts.text, of_either.text) == (("first", "second"), ("sentence",), None)
    assert of_pairs("bad", "good") == of_either("bad", "good")
    assert of_texts(["bad"]) == of_either(["bad"])
    with pytest.raises(DataError, match=r"the model takes one text \(sentence\), and two were given"):
        of_texts("bad", "good")
    with pytest.raises(DataError, match=r"the model takes two texts \(first, second\), and one was given"):
        pickle.loads(pickle.dumps(of_pairs))(["bad"])
    assert of_pairs.logits([[2, 5, 3]]).shape == (1, 3)


def opened_model(folder: Path, variant: str | None = None) -> str:
    bundle = spdtool.load(folder, variant=variant).bundle
    assert bundle is not None
    return bundle.model.name


@pytest.mark.parametrize("problem", ["no plugin", "not compiled", "does not load"])
def test_the_portable_variant_runs_if_the_library_cannot_be_loaded(
    problem: str, library_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def path() -> Path:
        if problem == "not compiled":
            raise DeviceError("not compiled")
        (tmp_path / "x.so").write_bytes(b"no library")
        return tmp_path / "x.so"

    def library(target: str) -> plugins.Library:
        if problem == "no plugin":
            raise PluginError("none")
        return plugins.Library("x", "1", SimpleNamespace(path=path))

    monkeypatch.setattr(plugins, "find_library", library)
    assert opened_model(library_bundle) == "model.onnx"
    with pytest.raises((PluginError, DeviceError, ModelError)):
        spdtool.load(library_bundle, variant="onnx-fp16")


def test_the_preferred_variant_runs_if_its_library_loads(library_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session = onnx_session.open_session
    monkeypatch.setattr(
        plugins, "find_library", lambda _: plugins.Library("x", "1", SimpleNamespace(path=lambda: "x.so"))
    )
    monkeypatch.setattr(onnx_session, "open_session", lambda *arguments: open_session(*arguments[:3]))
    assert opened_model(library_bundle) == "model_fp16.onnx"
    assert opened_model(library_bundle, variant="onnx") == "model.onnx"


def test_a_damaged_file_is_refused_and_not_skipped(library_bundle: Path) -> None:
    (library_bundle / "onnx/model_fp16.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="model_fp16.onnx has 0 bytes"):
        spdtool.load(library_bundle)


def test_a_named_variant_survives_pickling(servable: Path) -> None:
    unpickled = pickle.loads(pickle.dumps(spdtool.load(servable, variant="onnx-fp16")))
    assert unpickled.bundle.model.name == "model_fp16.onnx"


def test_probabilities(servable: Path) -> None:
    loaded = spdtool.load(servable)
    logits = np.array([[0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0]], np.float32)
    np.testing.assert_allclose(loaded.probabilities(logits), [[1 / 3] * 3, [1, 0, 0]], atol=1e-6)
    loaded.decision = SeveralLabels(loaded.names)
    np.testing.assert_allclose(loaded.probabilities(logits), [[0.5] * 3, [1, 0.5, 0]], atol=1e-6)
    loaded.decision = OneNumber(loaded.names)
    assert loaded.probabilities(logits) is None


# Layouts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(exported: Any, tmp_path: Path) -> Run:
    """A run whose export stage contains the bundle."""
    run = Run.for_recipe(tmp_path / "run", exported.recipe)
    with run.stage("export") as stage:
        shutil.copytree(exported.folder / "bundle", stage.folder / "bundle")
    return run


def test_the_layout_of_the_hub(run: Run, tmp_path: Path, servable: Path) -> None:
    written = write_layout(run, "hub", tmp_path / "hub")
    names = {file.relative_to(servable).as_posix() for file in servable.rglob("*") if file.is_file()}
    assert set(written.files) == names | {".gitattributes"}
    assert "*.onnx filter=lfs" in (tmp_path / "hub/.gitattributes").read_text()


def test_the_layout_of_triton(run: Run, tmp_path: Path) -> None:
    written = write_layout(run, "triton", tmp_path / "my model")
    assert {name.split("/")[0] for name in written.files} == {"my_model", "my_model_tokenizer", "my_model_model"}
    config = (tmp_path / "my model/my_model_model/config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "KIND_CPU" in config
    assert "dims: [3]" in config


def test_the_tokenizer_step_of_triton_equals_the_library(
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
    request = {}
    for name, column in (("TEXT", texts), ("PAIR", pairs)):
        request[name] = Tensor(name, np.array([[text.encode()] for text in column], object))
    not_utf8 = Tensor("TEXT", np.array([b"\xff"]))
    blank = Tensor("PAIR", np.array([b"", b"x"]))
    pair_response, missing_pair, bad_encoding, empty_pair = step.execute(
        [request, {"TEXT": request["TEXT"]}, {"TEXT": not_utf8}, request | {"PAIR": blank}]
    )
    classify = spdtool.load(servable)
    columns = {tensor.name: tensor.array for tensor in pair_response.tensors}
    assert columns["input_ids"].shape[1] in (4, 8, 16)
    np.testing.assert_allclose(classify.logits(columns), classify.logits(texts, pairs), atol=1e-5)
    assert "PAIR is missing" in missing_pair.error
    assert "cannot be read" in bad_encoding.error
    assert "PAIR has an empty text" in empty_pair.error


def test_the_layout_of_triton_has_the_text_inputs_of_the_task(run: Run, older_bundle: Path, single: Path) -> None:
    def text_inputs(bundle: Path, folder: Path) -> str:
        """Write the Triton layout and return the inputs of its tokenizer, equal to those of the ensemble."""
        folder.mkdir()
        write_triton_layout(bundle, folder, "cpu", "m")
        ensemble, tokenizer = ((folder / name / "config.pbtxt").read_text() for name in ("m", "m_tokenizer"))
        inputs, tokenizer_inputs = (
            config[config.index("input [") :].split("]\n")[0] for config in (ensemble, tokenizer)
        )
        assert inputs == tokenizer_inputs
        assert ('key: "PAIR"' in ensemble) == ("PAIR" in inputs)
        return inputs

    assert "PAIR" not in text_inputs(single, run.path / "single")
    assert f'name: "PAIR" {TEXT_INPUT} optional: true' in text_inputs(older_bundle, run.path / "either")
    assert f'name: "PAIR" {TEXT_INPUT} }}' in text_inputs(run.path / "export/bundle", run.path / "pairs")


def test_the_layout_of_triton_gives_the_vectors_of_a_sentence_encoder(single: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(single, bundle)
    config = json.loads((bundle / "config.json").read_text())
    files = {
        "config.json": config | {"architectures": ["BertModel"]},
        "modules.json": [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}],
        "1_Pooling/config.json": {"pooling_mode": "mean"},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    }
    for name, content in files.items():
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text(json.dumps(content))
    (tmp_path / "triton").mkdir()
    write_triton_layout(bundle, tmp_path / "triton", "cpu", "m")
    for model in ("m", "m_model"):
        assert 'name: "sentence_embedding"' in (tmp_path / "triton" / model / "config.pbtxt").read_text()
    assert not (tmp_path / "triton/m/labels.txt").exists()
    assert json.loads((tmp_path / "triton/m_tokenizer/1/settings.json").read_text())["prompt"] == "query: "
    (bundle / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    with pytest.raises(ModelError, match="one output for a text, and this is a model that labels each token"):
        write_triton_layout(bundle, tmp_path / "other", "cpu", "m")


def test_impossible_layouts_are_refused(run: Run, tmp_path: Path, spdtool: Any) -> None:
    with pytest.raises(UnknownName, match="no layout 'tritn'"):
        write_layout(run, "tritn", tmp_path / "x")
    with pytest.raises(RunError, match="not an empty folder"):
        write_layout(run, "hub", run.path)
    with pytest.raises(StageMissing):
        write_layout(Run.for_recipe(tmp_path / "none", run.recipe), "hub", tmp_path / "x")
    for arguments in (("--layout", "hub", "--run", run.path), ("--layout", "hub", "--to", tmp_path / "x")):
        assert spdtool("export", *arguments).exit_code == 2
    result = spdtool("export", "--layout", "hub", "--run", run.path, "--to", tmp_path / "out", "--json")
    assert (result.exit_code, json.loads(result.stdout)["layout"]) == (0, "hub")
