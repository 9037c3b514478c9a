"""Faults planted into the files of every built-in target: the gates detect each one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults import FILE_FAULTS, WEIGHT_FAULTS, edit_json
from onnx import numpy_helper

from spdtool.data.dataset import Dataset, Rows
from spdtool.errors import GateError
from spdtool.export.bundle.manifest import digest_files, write_manifest
from spdtool.export.gates.checked_export import ExportAttempt
from spdtool.export.gates.files import check_manifest
from spdtool.export.gates.folder import (
    check_classifier,
    check_folder,
    open_classifier,
    predict_from_texts,
)
from spdtool.export.gates.logits import check_logits
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.gates.score import check_score
from spdtool.export.gates.weights import check_weights
from spdtool.export.target import MODEL_FILE, Target, get_target
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_tokenizer, save_model
from spdtool.tasks.decision import SeveralLabels

TARGETS = ("onnx", "onnx-ort", "onnx-fp16", "onnx-int8", "onnx-int8-static")


@pytest.fixture
def reference(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Any]) -> Reference:
    """A BERT with zeros and named labels, and dev rows as texts."""
    toy_task(dev=12)
    names = {0: "bad", 1: "good"}
    model = toys.bert(id2label=names, label2id={"bad": 0, "good": 1})
    for weight in find_prunable_weights(model).values():
        weight.data.view(-1)[np.arange(weight.numel()) % 4 > 1] = 0
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # the exporter leaves out a bias of zeros, and equal ones share a constant
            parameter.data += 0.1 * torch.rand(len(parameter), generator=generator)
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    recipe = toys.recipe("export.sentences=4", "export.budget=1", "export.calibration=8")
    return Reference(tmp_path / "checkpoint", prepare_dev_sets(tmp_path / "checkpoint", recipe), recipe)


def pass_gates(target: Target, reference: Reference, folder: Path) -> None:
    """Seal the folder as the export does, and open it; the gate on logits would find no more faults here."""
    write_manifest(folder, ExportAttempt(target, reference, folder, ["cpu"]).describe_folder(folder / MODEL_FILE))
    check_weights(target, reference, folder)
    check_folder(target, reference, folder, "cpu")
    check_score(target, reference, folder, "cpu")


def change_weight(folder: Path, parameter: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the stored numbers of a parameter, in any type and orientation."""
    proto = onnx.load(folder / MODEL_FILE)
    names = {parameter + suffix for suffix in ("", ".T", "_quantized", ".T_quantized")}
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    array = numpy_helper.to_array(tensor)
    faulty = np.ascontiguousarray(change(array), array.dtype)
    assert not np.array_equal(faulty, array)
    tensor.raw_data = faulty.tobytes()
    onnx.save(proto, folder / MODEL_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_planted_fault_is_detected(name: str, reference: Reference, tmp_path: Path) -> None:
    target = get_target(name)
    intact = tmp_path / "sound"
    ExportAttempt(target, reference, intact, ["cpu"]).write()
    pass_gates(target, reference, intact)
    passed = []
    for title, plant in FILE_FAULTS.items():
        folder = shutil.copytree(intact, tmp_path / "faulty")
        plant(folder)
        if not is_refused(target, reference, folder):
            passed.append(title)
        shutil.rmtree(folder)
    for title, (parameter, change) in WEIGHT_FAULTS.items():
        folder = shutil.copytree(intact, tmp_path / "faulty")
        change_weight(folder, parameter, change)
        if not is_refused(target, reference, folder):
            passed.append(title)
        shutil.rmtree(folder)
    assert passed == []


def is_refused(target: Target, reference: Reference, folder: Path) -> bool:
    """Tell whether a gate finds the fault; errors other than GateError propagate."""
    try:
        pass_gates(target, reference, folder)
    except GateError:
        return True
    return False


def test_a_foreign_model_in_the_folder_is_detected_by_its_answers(reference: Reference, tmp_path: Path) -> None:
    """The session of a target might open a file that its manifest does not name."""
    target = get_target("onnx")
    attempt = ExportAttempt(target, reference, tmp_path / "out", ["cpu"])
    attempt.write()
    shutil.copy(tmp_path / "out" / MODEL_FILE, tmp_path / "out/onnx/other.onnx")
    change_weight(tmp_path / "out", "classifier.bias", lambda array: array + np.float32(1))
    shutil.move(tmp_path / "out" / MODEL_FILE, tmp_path / "out/onnx/wrong.onnx")
    shutil.move(tmp_path / "out/onnx/other.onnx", tmp_path / "out" / MODEL_FILE)
    manifest = attempt.describe_folder(tmp_path / "out/onnx/wrong.onnx")
    write_manifest(tmp_path / "out", manifest.model_copy(update={"files": digest_files(tmp_path / "out")}))
    with pytest.raises(GateError, match="spdtool.load gives logits that differ by 1"):
        check_folder(target, reference, tmp_path / "out", "cpu")


def test_an_attribute_that_only_fusions_pass_over_is_detected(reference: Reference, tmp_path: Path) -> None:
    """onnxruntime fuses an addition and a normalization over whatever axis; others normalize over that axis."""
    target = get_target("onnx")
    folder = tmp_path / "out"
    ExportAttempt(target, reference, folder, ["cpu"]).write()
    check_logits(target, reference, folder, ["cpu"])
    proto = onnx.load(folder / MODEL_FILE)
    node = [node for node in proto.graph.node if node.op_type == "LayerNormalization"][-1]
    (axis,) = (attribute for attribute in node.attribute if attribute.name == "axis")
    axis.i = 1
    onnx.save(proto, folder / MODEL_FILE)
    with pytest.raises(GateError, match="without fusions of onnxruntime"):
        check_logits(target, reference, folder, ["cpu"])


def test_list_answers_are_refused_for_single_label_tasks(reference: Reference, tmp_path: Path) -> None:
    attempt = ExportAttempt(get_target("onnx"), reference, tmp_path / "out", ["cpu"])
    attempt.write()
    classifier = open_classifier(tmp_path / "out", "cpu")
    tokenizer = load_tokenizer(reference.checkpoint)
    check_classifier(classifier, reference, tokenizer)
    classifier.decision = SeveralLabels(classifier.names)
    with pytest.raises(GateError, match="SeveralLabels instead of OneLabel"):
        check_classifier(classifier, reference, tokenizer)
    with pytest.raises(GateError, match=r"answers \['"):
        predict_from_texts(classifier, reference.dev, 32, reference.label_names)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_plugins")
def test_faults_in_multi_label_settings_are_detected(tmp_path: Path, toys: ModuleType) -> None:
    words_by_label, names = (set(toys.GOOD), set(toys.BAD), {"very"}), ("kind", "unkind", "loud")

    def load(_data: str | None, _seed: int) -> dict[str, Rows]:
        splits = {}
        for split, seed in (("train", 1), ("dev", 2)):
            texts = list(toys.rows(24, seed).first)
            labels = np.array(
                [[bool(label_words & set(text.split())) for label_words in words_by_label] for text in texts], np.uint8
            )
            splits[split] = Rows(texts, None, labels)
        return splits

    toys.register(Dataset("several", "multilabel", ("text",), names, ("f1_micro", "f1_macro", "map"), load))
    model = toys.bert(labels=3, id2label=dict(enumerate(names)), problem_type="multi_label_classification")
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    recipe = toys.recipe("export.sentences=4", task="several")
    several = Reference(tmp_path / "checkpoint", prepare_dev_sets(tmp_path / "checkpoint", recipe), recipe)
    target, intact = get_target("onnx"), tmp_path / "sound"
    attempt = ExportAttempt(target, several, intact, ["cpu"])
    attempt.write()
    pass_gates(target, several, intact)
    settings = attempt.describe_folder(intact / MODEL_FILE).settings
    assert settings is not None
    thresholds = settings["thresholds"]
    assert isinstance(thresholds, list)
    shifted = [float(str(thresholds[0])) + 1.0, *thresholds[1:]]
    faults: dict[str, dict[str, Any]] = {
        "thresholds lost": {"temperature": settings["temperature"]},
        "all settings lost": {},
        "a threshold moved": settings | {"thresholds": shifted},
        "thresholds of other labels": settings | {"thresholds": thresholds[::-1]},
        "another temperature": settings | {"temperature": 1.5 * float(str(settings["temperature"]))},
    }
    for title, faulty_settings in faults.items():
        manifest = attempt.describe_folder(intact / MODEL_FILE).model_copy(update={"settings": faulty_settings})
        write_manifest(intact, manifest)
        with pytest.raises(GateError, match=r"spdtool\.load (answers|gives other probabilities)"):
            check_score(target, several, intact, "cpu")
        assert title
    nearly = {"thresholds": [float(str(thresholds[0])) + 1e-9, *thresholds[1:]]}  # decides no dev row otherwise
    for fields, message in (
        ({"settings": settings | nearly}, "has the settings"),
        ({"kind": None}, "has the kind None"),
        ({"text": ["review"]}, r"has the text \['review'\]"),
    ):
        write_manifest(intact, attempt.describe_folder(intact / MODEL_FILE).model_copy(update=fields))
        with pytest.raises(GateError, match=message):
            check_manifest(target, several, intact, [intact / MODEL_FILE], "cpu")
    for title in ("labels swapped", "a label renamed"):
        folder = shutil.copytree(intact, tmp_path / "faulty")
        FILE_FAULTS[title](folder)
        assert is_refused(target, several, folder), title
        shutil.rmtree(folder)
    folder = shutil.copytree(intact, tmp_path / "faulty")
    edit_json("config.json", lambda config: config.update(problem_type="single_label_classification"))(folder)
    assert is_refused(target, several, folder)
