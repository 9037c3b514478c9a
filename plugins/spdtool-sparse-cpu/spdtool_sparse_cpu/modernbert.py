"""Describe the encoder of ModernBERT, as `families.py` does those of other families."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from spdtool_sparse_cpu.families import ACTIVATIONS, Encoder, EncoderInput, common_epsilon, read_modules

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the kinds of attention
LETTERS = {FULL: "g", SLIDING: "l"}  # the operator's


def describe_modernbert(model: PreTrainedModel) -> Encoder | None:
    """Describe the encoder of a ModernBERT.

    Returns:
        None where it is no ModernBERT, or its configuration asks for something unusual.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None)  # older versions of transformers say it in other words
    if config.model_type != "modernbert" or not kinds or not set(kinds) <= set(LETTERS):
        return None
    frequencies = _read_frequencies(model.base_model, set(kinds))
    names = ["embeddings.tok_embeddings", "embeddings.norm"]
    layers = []
    for index in range(config.num_hidden_layers):
        modules = ["attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"]
        layers += [f"layers.{index}.{module}" for module in modules[index == 0 :]]  # the first layer has no first norm
    layers.append("final_norm")
    table_inputs = read_modules(model, names, biases=False)
    layer_inputs = read_modules(model, layers, biases=False)
    epsilon = common_epsilon(model, [*names, *layers])
    activation = ACTIVATIONS.get(config.hidden_activation)
    if frequencies is None or table_inputs is None or layer_inputs is None or epsilon is None or activation is None:
        return None
    return Encoder(
        heads=config.num_attention_heads,
        depth=config.num_hidden_layers,
        epsilon=epsilon,
        activation=activation,
        inputs=(*table_inputs, *frequencies, *layer_inputs),
        last_norm=layer_inputs[-2].name,
        kind="modernbert",
        further={
            "attention": "".join(LETTERS[kind] for kind in kinds),
            "window": int(config.sliding_window),
        },
    )


def _read_frequencies(base: nn.Module, kinds: set[str]) -> list[EncoderInput] | None:
    """List the frequencies of rotary positions, of global and of local layers; None where they are scaled by length."""
    rotary = getattr(base, "rotary_emb", None)
    types = getattr(rotary, "rope_type", None)
    frequencies: dict[str, np.ndarray] = {}
    for kind in kinds:
        numbers, scaling = getattr(rotary, f"{kind}_inv_freq", None), getattr(rotary, f"{kind}_attention_scaling", 0)
        is_default = isinstance(types, dict) and types.get(kind) == "default"
        if not is_default or not isinstance(numbers, Tensor) or scaling != 1:
            return None
        frequencies[kind] = numbers.float().numpy()
    some = next(iter(frequencies.values()))  # for a kind that no layer is of
    return [EncoderInput(f"encoder.{kind}_frequencies", frequencies.get(kind, some)) for kind in (FULL, SLIDING)]
