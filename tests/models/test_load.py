"""Encoders: loaded from safetensors only, saved as stock checkpoints, filled from arrays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForMaskedLM

from spdtool.errors import ModelError
from spdtool.models.layers import (
    find_layer_stack,
    find_prunable_weights,
)
from spdtool.models.load import (
    build_empty_model,
    build_empty_teacher,
    fill_weights,
    label_names,
    load_model,
    load_tokenizer,
    save_model,
)
from spdtool.recipe.fields import Recipe
from spdtool.tasks.task import Task


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_bert: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    save_model(tiny_bert(3, dropout=0.1), tiny_tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def headless(tmp_path: Path, tiny_bert: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A pretrained encoder with the head of masked language modelling."""
    BertForMaskedLM(tiny_bert(3).config).save_pretrained(tmp_path / "headless")
    tiny_tokenizer.save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def have_same_weights(model: nn.Module, reference: nn.Module) -> bool:
    weights, expected = model.state_dict(), reference.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_saved_model_loads_equally_here_and_in_stock_transformers(
    checkpoint: Path, tiny_bert: Callable[..., Any]
) -> None:
    model = load_model(checkpoint)
    assert have_same_weights(model, tiny_bert(3))
    assert have_same_weights(model, AutoModelForSequenceClassification.from_pretrained(checkpoint))
    assert not model.training
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(checkpoint)("a good film")["input_ids"][0] == 2


def test_a_new_head_carries_the_labels(headless: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    for names, problem in ((["no", "yes", "both"], "single_label_classification"), (["score"], "regression")):
        model = load_model(headless, labels=names, problem_type=problem)
        assert label_names(model) == names
        assert model.config.problem_type == problem
        assert model.classifier.out_features == len(names)
        saved = tmp_path / problem
        save_model(model, tiny_tokenizer, saved)
        config = json.loads((saved / "config.json").read_text("utf-8"))
        assert config["id2label"] == {str(index): name for index, name in enumerate(names)}
        assert label_names(load_model(saved)) == names


def test_a_new_head_may_replace_one_of_another_size(checkpoint: Path) -> None:
    assert load_model(checkpoint, labels=("a", "b", "c")).classifier.out_features == 3


def test_a_pretrained_encoder_is_refused_as_a_teacher(headless: Path) -> None:
    with pytest.raises(ModelError, match="no fine-tuned classifier: its config names BertForMaskedLM") as error:
        load_model(headless)
    assert "--model" in str(error.value.hint)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text("utf-8")[:40])


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "brandnew"}))


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "brandnew", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('ran.txt', 'w')\nclass Evil: pass\n")


HINTS: dict[Callable[[Path], None], str] = {
    remove_weights: "config.json, model.safetensors",
    pickle_weights: "only safetensors are read",
    cut_weights: "copy them again",
    cut_config: "config.json",
    unknown_type: "config.json",
    remote_code: "config.json",
}


def test_a_checkpoint_that_cannot_be_read_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for damage, hint in HINTS.items():
        folder = shutil.copytree(checkpoint, tmp_path / damage.__name__)
        monkeypatch.chdir(folder)
        damage(folder)
        with pytest.raises(ModelError) as error:
            load_model(folder)
        assert str(folder) in error.value.message, damage.__name__
        assert hint in str(error.value.hint), damage.__name__
        assert not (folder / "ran.txt").exists(), damage.__name__


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path / "gone")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(checkpoint)


def test_dropout_is_replaced_while_training_and_restored_in_the_checkpoint(
    checkpoint: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = load_model(checkpoint, dropout=0.4)
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.4}
    save_model(model, tiny_tokenizer, tmp_path / "again")
    before, after = (json.loads((f / "config.json").read_text("utf-8")) for f in (checkpoint, tmp_path / "again"))
    assert after == before
    assert {module.p for module in load_model(tmp_path / "again").modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_smoke_is_two_random_layers_of_the_same_family(checkpoint: Path) -> None:
    torch.manual_seed(0)
    model = load_model(checkpoint, smoke=True)
    assert len(find_layer_stack(model)) == 2
    assert not torch.equal(next(model.parameters()), next(load_model(checkpoint).parameters()))


def test_eager_attention_can_be_asked_for(checkpoint: Path) -> None:
    assert load_model(checkpoint, eager=True).config._attn_implementation == "eager"


def test_an_empty_teacher_has_the_shapes_and_no_weights(checkpoint: Path, toy_task: Callable[..., Task]) -> None:
    model = build_empty_teacher(Recipe(task="toy", model=str(checkpoint)), toy_task(build=False))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(find_prunable_weights(model)) == 18
    with pytest.raises(ModelError):
        build_empty_teacher(Recipe(task="toy", model=str(checkpoint / "gone")), toy_task(build=False))


class TestFill:
    """`fill_weights` copies named arrays into the parameters of a model."""

    def test_every_weight_comes_back(self, tmp_path: Path, toys: ModuleType) -> None:
        model = toys.bert(seed=1)
        save_model(model, toys.tokenizer(), tmp_path)
        empty = build_empty_model(tmp_path, finetuned=True, device="cpu")
        arrays = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        assert fill_weights(empty, arrays.items()) == []
        for name, weight in empty.named_parameters():
            np.testing.assert_array_equal(weight.detach().numpy(), arrays[name])

    def test_what_was_not_there_is_named(self, toys: ModuleType) -> None:
        arrays = [("classifier.bias", np.ones(2, np.float16))]
        model = toys.bert()
        missing = fill_weights(model, arrays)
        assert "classifier.weight" in missing
        assert "classifier.bias" not in missing
        assert model.classifier.bias.tolist() == [1, 1]

    def test_a_tied_weight_needs_one_of_its_names(self, toys: ModuleType) -> None:
        model = toys.bert()
        first, second = (model.bert.encoder.layer[layer].output.dense for layer in (0, 1))
        second.weight = first.weight
        arrays = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        assert "bert.encoder.layer.1.output.dense.weight" not in arrays
        assert fill_weights(model, arrays.items()) == []

    def test_what_does_not_fit_is_refused(self, toys: ModuleType) -> None:
        for name, shape, message in (
            ("classifier.bias", 3, r"the model has shape \(2,\)"),
            ("nothing", 2, "the model has no such weight"),
        ):
            with pytest.raises(ModelError, match=message):
                fill_weights(toys.bert(), [(name, np.ones(shape, np.float32))])

    def test_an_encoder_without_a_head_is_refused(self, toys: ModuleType, tmp_path: Path) -> None:
        toys.bert().bert.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="is no fine-tuned classifier"):
            build_empty_model(tmp_path, finetuned=True, device="cpu")
