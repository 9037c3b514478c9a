"""Describe encoders of the BERT family, which one operator computes as a whole, by the names of their parameters.

They are all the same network: word, position and, for some, token-type embeddings, a layer norm, a
projection in small ELECTRA models; then layers of attention and feed-forward, each followed by
a layer norm of the sum with its input. They differ in names, in how positions are counted, and
in whether there are token types. An encoder whose configuration asks for more than that (a
decoder, another activation, relative positions) is not described here, and keeps its graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Maps transformers' name of an activation to the operator's."""


@dataclass(frozen=True)
class ModuleNames:
    """Names of modules under the base model, by role; `layers` is the list, the roles after it are inside a layer."""

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str
    token_types: str = ""  # "": the family has none
    projection: str = ""  # a linear layer between embeddings and layers, in models that have it
    word: str = "embeddings.word_embeddings"
    position: str = "embeddings.position_embeddings"
    norm: str = "embeddings.LayerNorm"
    activation: str = "hidden_act"  # field of the configuration
    counts_tokens: bool = False  # positions count real tokens, from padding_id + 1

    def layer_modules(self) -> tuple[str, ...]:
        """List the modules of a layer, in the operator's order."""
        return (
            *(self.query, self.key, self.value, self.attention_output, self.attention_norm),
            *(self.intermediate, self.output, self.output_norm),
        )


BERT = ModuleNames(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
    token_types="embeddings.token_type_embeddings",
)
DISTILBERT = ModuleNames(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    output="ffn.lin2",
    output_norm="output_layer_norm",
    activation="activation",
)
FAMILIES = {
    "bert": BERT,
    "electra": replace(BERT, projection="embeddings_project"),
    "roberta": replace(BERT, counts_tokens=True),
    "xlm-roberta": replace(BERT, counts_tokens=True),
    "distilbert": DISTILBERT,
}
"""Maps `config.model_type` to the names of modules."""


@dataclass(frozen=True)
class Encoder:
    """Attributes of the operator `SparseEncoder`, and the names of its weights, in its order.

    `tables` are the weights that belong to the embeddings, `layers` those of the layers.
    """

    heads: int
    depth: int
    epsilon: float
    activation: str
    padding_id: int
    token_types: bool
    projection: bool
    tables: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def last_norm(self) -> str:
        """Name of the weight of the layer norm that ends the encoder."""
        return self.layers[-2]


def describe_encoder(model: PreTrainedModel) -> Encoder | None:
    """Describe the encoder of a classifier of the BERT family.

    Returns:
        None where it is of another family, or its configuration asks for something unusual.
    """
    config, base = model.config, model.base_model
    names = FAMILIES.get(config.model_type)
    if names is None or not _is_plain(config):
        return None
    modules = dict(base.named_modules())
    projection = ""
    if names.projection in modules:
        projection = names.projection
    depth = config.num_hidden_layers
    tables = [name for name in (names.word, names.position, names.token_types, names.norm, projection) if name]
    layers = []
    for index in range(depth):
        layers += [f"{names.layers}.{index}.{module}" for module in names.layer_modules()]
    all_parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    parameters: dict[str, list[str]] = {}
    epsilons = set()
    for name in (*tables, *layers):
        module = modules.get(name)
        if module is None:
            return None
        parameters[name] = _parameter_names(model, name, module)
        if not all_parameters.issuperset(parameters[name]):  # a layer without bias, for example
            return None
        if isinstance(module, nn.LayerNorm):
            epsilons.add(module.eps)
    activation = ACTIVATIONS.get(getattr(config, names.activation, None) or "")
    heads = config.num_attention_heads
    # The operator has one epsilon for all layer norms, and heads of equal width.
    if activation is None or len(epsilons) != 1 or config.hidden_size % heads:
        return None
    if not math.isfinite(epsilon := epsilons.pop()) or epsilon < 0:  # the operator refuses such a number
        return None
    return Encoder(
        heads=heads,
        depth=depth,
        epsilon=epsilon,
        activation=activation,
        padding_id=config.pad_token_id if names.counts_tokens else -1,
        token_types=bool(names.token_types),
        projection=bool(projection),
        tables=tuple(chain.from_iterable(parameters[name] for name in tables)),
        layers=tuple(chain.from_iterable(parameters[name] for name in layers)),
    )


def _is_plain(config: PretrainedConfig) -> bool:
    decodes = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
    return not decodes and positions == "absolute" and config.num_hidden_layers > 0


def _parameter_names(model: PreTrainedModel, name: str, module: nn.Module) -> list[str]:
    """List the state-dict names of a module's weight and bias; an embedding table has no bias."""
    weight = f"{model.base_model_prefix}.{name}.weight"
    if isinstance(module, nn.Embedding):
        return [weight]
    return [weight, f"{model.base_model_prefix}.{name}.bias"]
