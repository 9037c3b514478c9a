"""Opening a checkpoint requires complete, finite, floating-point weights that match its config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdtool.errors import ModelError
from spdtool.models.checks.checkpoint import open_checkpoint
from spdtool.models.load import build_empty_model, load_model, save_model

QUERY = "bert.encoder.layer.1.attention.self.query.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    save_model(toys.bert(layers=2), toys.tokenizer(), folder)
    return folder


def rewrite(folder: Path, change: Callable[[Weights], Weights | None]) -> None:
    """Apply `change` to the weights of a folder and save them; it edits in place or returns new ones."""
    file = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    save_file(change(weights) or weights, file, metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields))


def add_layer(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {QUERY.replace("layer.1", "layer.2"): weights[QUERY].clone()})


def add_head(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"second_classifier.weight": torch.zeros(2, 32)})


def remove_layer(folder: Path) -> None:
    configure(folder, num_hidden_layers=3)


def spoil(value: float) -> Callable[[Path], None]:
    def change(weights: Weights) -> None:
        weights[QUERY][3, 4] = value

    return lambda folder: rewrite(folder, change)


def shrink(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {QUERY: weights[QUERY][:16].clone()})


def prune_heads(folder: Path) -> None:
    shrink(folder)
    configure(folder, pruned_heads={"1": [0]})


def widen_head(folder: Path) -> None:
    configure(folder, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})


def other_vocabulary(folder: Path) -> None:
    configure(folder, vocab_size=99)


def quantize(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {QUERY: weights[QUERY].to(torch.int8)})


def declare_quantized(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "bitsandbytes"})


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')


def keep_only_adapter(folder: Path) -> None:
    add_adapter(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def mix_adapter_in(folder: Path) -> None:
    name = QUERY.replace("query", "query.lora_A")
    rewrite(folder, lambda weights: weights | {name: torch.ones(2)})


def other_prefix(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"net.{name}": weight for name, weight in weights.items()})


def decoder(folder: Path) -> None:
    configure(folder, is_decoder=True)


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def double_name(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {f"_orig_mod.{QUERY}": weights[QUERY].clone()})


def name_other_weights(folder: Path) -> None:
    configure(folder, transformers_weights="other.safetensors")


REFUSED: list[tuple[str, Callable[[Path], None], tuple[str, ...], str]] = [
    ("a layer too many", add_layer, ("model.safetensors has 1 weights", "encoder.layer.2"), "says 2 layers"),
    ("a second head", add_head, ("no use for", "second_classifier.weight"), "belong together"),
    ("a layer too few", remove_layer, ("model.safetensors lacks 16 weights", "layer.2"), "copy the folder again"),
    ("not a number", spoil(float("nan")), (QUERY, "1 of the 1,024 values", "nan"), "earlier checkpoint"),
    ("infinite", spoil(float("-inf")), (QUERY, "-inf"), "earlier checkpoint"),
    ("a smaller matrix", shrink, (QUERY, "[16, 32]", "[32, 32]"), "rows or heads were removed"),
    ("pruned heads", prune_heads, ("pruned_heads", "[16, 32]", "[32, 32]"), "heads were removed"),
    ("a larger head", widen_head, ("classifier", "[2]", "[3]"), "one output for each label"),
    ("a larger vocabulary", other_vocabulary, ("word_embeddings", "[99, 32]"), '"vocab_size": 25'),
    ("whole numbers", quantize, (QUERY, "I8"), "quantized"),
    ("quantized by config", declare_quantized, ("bitsandbytes",), "before it was quantized"),
    ("an adapter beside its base", add_adapter, ("LORA", "some/base", "weights without it"), "merge_and_unload"),
    ("an adapter alone", keep_only_adapter, ("LORA", "some/base"), "merge_and_unload"),
    ("an adapter inside", mix_adapter_in, ("adapter", "lora_A"), "merge_and_unload"),
    ("an unknown prefix", other_prefix, ("lacks",), "begins with 'net'"),
    ("a decoder", decoder, ("is_decoder",), "encoder"),
    ("a pointer", pointer, ("only a pointer of git-lfs",), "git lfs pull"),
    ("one weight twice", double_name, (QUERY, "_orig_mod"), "without a wrapper"),
    (
        "weights of another name",
        name_other_weights,
        ("names the weights 'other.safetensors'",),
        "rename the right file",
    ),
]


def test_incomplete_models_are_refused_when_planned_and_when_loaded(checkpoint: Path, tmp_path: Path) -> None:
    for number, (case, change, message, hint) in enumerate(REFUSED):
        folder = shutil.copytree(checkpoint, tmp_path / str(number))
        change(folder)
        for open_it in (lambda: build_empty_model(folder, finetuned=True), lambda: load_model(folder)):  # noqa: B023
            with pytest.raises(ModelError) as error:
                open_it()
            for words in (*message, str(folder)):
                assert words in error.value.message, (case, error.value.message)
            assert hint in str(error.value.hint), (case, error.value.hint)


def wrap(prefix: str, segment: str = "") -> Callable[[Path], None]:
    """Prefix every weight name, or insert the prefix before `segment`."""

    def change(weights: Weights) -> Weights:
        return {
            name.replace(segment, f"{prefix}{segment}") if segment else prefix + name: weights[name] for name in weights
        }

    return lambda folder: rewrite(folder, change)


def test_wrapper_prefixes_are_removed_and_the_weights_stay_the_same(checkpoint: Path, tmp_path: Path) -> None:
    expected = load_model(checkpoint).state_dict()
    wrappers = [
        wrap("_orig_mod."),
        wrap("module."),
        wrap("module._orig_mod."),
        wrap("_orig_mod.", segment="attention."),
    ]
    wrappers += [wrap("_fsdp_wrapped_module._checkpoint_wrapped_module.", segment="output."), wrap("_orig_mod.module.")]
    for number, change in enumerate(wrappers):
        folder = shutil.copytree(checkpoint, tmp_path / str(number))
        change(folder)
        state = load_model(folder).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), number
        assert next(iter(build_empty_model(folder).parameters())).device.type == "meta"


HARMLESS: dict[str, tuple[int, ...]] = {
    "bert.embeddings.position_ids": (1, 64),
    "bert.pooler.extra.weight": (32, 32),
    "cls.predictions.bias": (25,),
    "cls.predictions.decoder.weight": (25, 32),
    "loss_fct.weight": (2,),
}


def test_leftover_weights_of_older_versions_and_pretraining_are_accepted(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    rewrite(folder, lambda weights: weights | {name: torch.ones(shape) for name, shape in HARMLESS.items()})
    assert open_checkpoint(folder, finetuned=True).files
    spoiled = {name: torch.full(shape, float("nan")) for name, shape in HARMLESS.items()}
    rewrite(folder, lambda weights: weights | spoiled)
    load_model(folder)  # these weights are not used


def test_a_pretrained_encoder_may_lack_head_and_pooler_and_no_layer(tmp_path: Path, toys: ModuleType) -> None:
    toys.bert().bert.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {name: weights[name] for name in weights if "pooler" not in name})
    assert load_model(tmp_path, labels=("a", "b", "c")).num_labels == 3
    build_empty_model(tmp_path)
    rewrite(tmp_path, lambda weights: {name: weights[name] for name in weights if "layer.1.output" not in name})
    with pytest.raises(ModelError, match="lacks 4 weights"):
        build_empty_model(tmp_path)
    configure(tmp_path, num_hidden_layers=1)
    with pytest.raises(ModelError, match="no use for"):
        load_model(tmp_path, labels=("a", "b"))


def test_a_file_that_changes_is_checked_again(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "changing")
    load_model(folder)
    spoil(float("inf"))(folder)
    with pytest.raises(ModelError, match="inf"):
        load_model(folder)


def test_several_files_are_one_checkpoint_and_none_may_be_missing(tmp_path: Path, toys: ModuleType) -> None:
    model = toys.bert(layers=3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = open_checkpoint(tmp_path, finetuned=True).files
    assert len(files) > 1
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    key = next(key for key, name in content["weight_map"].items() if name == files[0].name)

    def refuse(weight_map: dict[str, str], message: str) -> None:
        index.write_text(json.dumps(content | {"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path)

    others = {name: file for name, file in content["weight_map"].items() if name != key}
    refuse(others | {key: files[1].name}, f"{key} is in .*{files[0].name}, and .* says that it is in {files[1].name}")
    refuse(others, f"{key} is in .*{files[0].name}, and model.safetensors.index.json does not name it")
    index.write_text(json.dumps(content))
    whole = files[1].read_bytes()
    save_file(load_file(files[1]) | {key: load_file(files[0])[key] + 1}, files[1], metadata={"format": "pt"})
    refuse(content["weight_map"], f"{key} is in .*{files[0].name} and in .*{files[1].name}")
    files[1].write_bytes(whole)
    files[0].unlink()
    with pytest.raises(ModelError, match=f"names {files[0].name}, which is not there"):
        load_model(tmp_path)
