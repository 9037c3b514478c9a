"""From an exported folder back to a checkpoint that transformers opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from spdtool.errors import ModelError, RunError, UnknownName
from spdtool.export.bundle.unpack import unpack_checkpoint
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_tokenizer, save_model

Export = Callable[..., Path]
BIAS = "bert.pooler.dense.bias"


@pytest.fixture
def checkpoint(tmp_path: Path, toys: ModuleType) -> Path:
    """A checkpoint with zeros and label names."""
    model = toys.bert(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    for weight in find_prunable_weights(model).values():
        weight.data.view(-1)[np.arange(weight.numel()) % 4 > 0] = 0
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.linspace(0.1, 0.2, len(parameter))  # the exporter drops a bias of zeros
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def export(tmp_path: Path, toys: ModuleType, checkpoint: Path, rounded: Any) -> Export:
    """Return `export("fp32")`, which exports the checkpoint with the rounding target and returns the folder."""

    def make(values: str = "fp32") -> Path:
        folder: Path = tmp_path / "export" / "student"
        rounded().export(checkpoint, folder, toys.recipe(f"export.values={values}"))
        toys.seal(folder, target="rounded")
        return folder

    return make


def test_exactly_stored_weights_are_unpacked_to_the_last_bit(export: Export, checkpoint: Path, tmp_path: Path) -> None:
    folder = export()
    assert unpack_checkpoint(folder.parent, tmp_path / "out") == folder
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "export", "out"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "good", 1: "bad"}
    before, after = load_tokenizer(checkpoint), load_tokenizer(tmp_path / "out")
    assert dict(before("good film", "bad")) == dict(after("good film", "bad"))


def test_the_file_computes_with_its_rounded_weights(export: Export, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    unpack_checkpoint(export("fp16"), tmp_path / "out")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight.astype(np.float16).astype(np.float32), name)


def test_nothing_is_overwritten(export: Export, tmp_path: Path) -> None:
    folder = export()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(RunError, match="is not an empty folder"):
            unpack_checkpoint(folder, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_target_without_stored_weights_is_refused(checkpoint: Path, tmp_path: Path, toys: ModuleType) -> None:
    Onnx().export(checkpoint, tmp_path / "plain", toys.recipe())
    with pytest.raises(ModelError, match=r"has no manifest.json"):
        unpack_checkpoint(tmp_path / "plain", tmp_path / "out")
    toys.seal(tmp_path / "plain")
    with pytest.raises(ModelError, match="was written by the target 'onnx', which cannot be unpacked"):
        unpack_checkpoint(tmp_path / "plain", tmp_path / "out")


def test_a_target_that_is_not_installed_is_named(export: Export, tmp_path: Path, toys: ModuleType) -> None:
    folder = export()
    toys.seal(folder, target="nowhere")
    with pytest.raises(UnknownName, match="'nowhere'"):
        unpack_checkpoint(folder, tmp_path / "out")


def test_weights_that_do_not_fit_the_model_are_refused(export: Export, tmp_path: Path, rounded: Any) -> None:
    folder = export()
    weights = {stored.name: stored.array for stored in rounded().stored_weights(folder)}
    missing = {name: array for name, array in weights.items() if name != BIAS}
    faults = {
        f"lacks 1 of the weights .* among them {BIAS}": missing,
        f"{BIAS} of shape .* the model has shape": weights | {BIAS: weights[BIAS][:-1]},
        "bert.nothing .* the model has no such weight": weights | {"bert.nothing": weights[BIAS]},
    }
    for message, stored in faults.items():
        rounded.stored_weights = staticmethod(lambda _folder, stored=stored: iter(stored.items()))
        with pytest.raises(ModelError, match=message):
            unpack_checkpoint(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists(), message


def test_a_student_with_an_emptied_layer_is_refused_in_words(export: Export, tmp_path: Path, rounded: Any) -> None:
    """What a graph has no constant for cannot be told from what a damaged file lacks."""
    folder = export()
    emptied = "bert.encoder.layer.1.attention."
    stored = [weight for weight in rounded().stored_weights(folder) if not weight.name.startswith(emptied)]
    stored += [weight for weight in rounded().stored_weights(folder) if "attention.output.LayerNorm" in weight.name]
    rounded.stored_weights = staticmethod(lambda _: iter(stored))
    with pytest.raises(ModelError, match=r"a student with emptied layers: it stores nothing of 4 matrices") as error:
        unpack_checkpoint(folder, tmp_path / "out")
    assert error.value.hint == "the checkpoint of a run is in RUN/finetune"
