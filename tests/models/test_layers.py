"""The encoder's layers: finding the stack, prunable weights, trained parameters, and zeros of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from spdtool import plugins
from spdtool.errors import ModelError
from spdtool.models.layers import (
    count_zeros,
    find_layer_stack,
    find_prunable_weights,
    max_positions,
    select_trained_parameters,
)
from spdtool.models.load import save_model


def test_a_plugin_may_name_the_stack(tiny_bert: Callable[..., Any], clean_plugins: None) -> None:
    plugins.stacks.register("bert")(lambda model: model.bert.encoder.layer[:1])
    assert len(find_layer_stack(tiny_bert(3))) == 1
    assert len(find_prunable_weights(tiny_bert(3))) == 6


def test_the_trained_parameters_and_the_frozen_others(tiny_bert: Callable[..., Any]) -> None:
    model = tiny_bert(2)
    for train, prefixes in {
        "layers": ("bert.encoder.layer.",),
        "layers+head": ("bert.encoder.layer.", "bert.pooler.", "classifier."),
        "all": ("",),
    }.items():
        trained = select_trained_parameters(model, train)
        assert set(trained) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name in trained)


def test_zeros_are_counted_in_the_file(tmp_path: Path, tiny_bert: Callable[..., Any], tiny_tokenizer: Any) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_model(tiny_bert(3), tiny_tokenizer, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    weights[name][0, :5] = 0.0
    weights[name][1, 0] = -0.0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert count_zeros(checkpoint, [name]) == {name: (6, 32 * 64)}
    with pytest.raises(ModelError, match="no weight 'gone'"):
        count_zeros(checkpoint, ["gone"])


def test_positions_are_those_that_a_token_can_have() -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=7,
    )  # fmt: skip
    assert max_positions(BertForSequenceClassification(config)) == 7
