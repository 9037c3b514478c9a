"""Describe encoders that one operator computes as a whole, by the names of their parameters.

Of the BERT family all are the same network: word, position and, for some, token-type embeddings, a layer norm, a
projection in small ELECTRA models; then layers of attention and feed-forward, each followed by
a layer norm of the sum with its input. They differ in names, in how positions are counted, and
in whether there are token types. MPNet and DeBERTa-v2 are like them, but for what distances add to
the attention's scores. ModernBERT is described in `modernbert.py`. An encoder whose configuration
asks for more (a decoder, another activation) is not described here, and keeps its graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mpnet import modeling_mpnet

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
    padding_id: int | None = None  # of these positions; None: that of the configuration
    kind: str = "bert"  # of layer, as the operator calls it
    relative: str = ""  # the table of relative positions
    relative_norm: str = ""

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
MPNET = replace(
    BERT,
    kind="mpnet",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    token_types="",
    counts_tokens=True,
    padding_id=1,
    relative="encoder.relative_attention_bias",
)
DEBERTA = replace(
    BERT,
    kind="deberta-v2",
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    position="",
    relative="encoder.rel_embeddings",
    relative_norm="encoder.LayerNorm",
)
FAMILIES = {
    "bert": BERT,
    "mpnet": MPNET,
    "deberta-v2": DEBERTA,
    "electra": replace(BERT, projection="embeddings_project"),
    "roberta": replace(BERT, counts_tokens=True),
    "xlm-roberta": replace(BERT, counts_tokens=True),
    "distilbert": DISTILBERT,
}
"""Maps `config.model_type` to the names of modules."""


LONGEST_DISTANCE = 2**15  # tokens; buckets of distances end long before


class EncoderInput(NamedTuple):
    """A packed constant that the operator reads.

    Attributes:
        name: of the parameter, or of the constant.
        numbers: what is packed, where it is no parameter.
        is_table: whether rows of it are looked up.
    """

    name: str
    numbers: np.ndarray | None = None
    is_table: bool = False


@dataclass(frozen=True)
class Encoder:
    """Attributes of the operator `SparseEncoder`, and its constants, in its order.

    Attributes:
        last_norm: the parameter with the weight of the layer norm that ends the encoder.
        further: attributes that only its kind of layer has.
    """

    heads: int
    depth: int
    epsilon: float
    activation: str
    inputs: tuple[EncoderInput, ...]
    last_norm: str
    padding_id: int = -1
    token_types: bool = False
    projection: bool = False
    kind: str = "bert"
    further: dict[str, str | int] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters among its constants."""
        return [constant.name for constant in self.inputs if constant.numbers is None]


def describe_post_norm(model: PreTrainedModel) -> Encoder | None:
    """Describe an encoder with a layer norm after each sum.

    Returns:
        None where it is of another family, or its configuration asks for something unusual.
    """
    config = model.config
    names = FAMILIES.get(config.model_type)
    if names is None or not _is_plain(config) or not _is_usual(config, names):
        return None
    modules = dict(model.base_model.named_modules())
    modules.pop("")  # the model itself
    has_types = names.token_types in modules
    has_projection = names.projection in modules
    tables = [names.word, names.position, names.token_types if has_types else "", names.norm]
    tables += [names.projection if has_projection else "", names.relative, names.relative_norm]
    buckets: list[EncoderInput] = []
    if names.kind != "bert":
        buckets.append(EncoderInput("encoder.buckets", _buckets_of_distances(model)))
    layers = []
    for index in range(config.num_hidden_layers):
        layers += [f"{names.layers}.{index}.{module}" for module in names.layer_modules()]
    table_inputs = read_modules(model, filter(None, tables))
    layer_inputs = read_modules(model, layers)
    epsilon = common_epsilon(model, [*filter(None, tables), *layers])
    activation = ACTIVATIONS.get(getattr(config, names.activation, None) or "")
    heads = config.num_attention_heads
    if (
        table_inputs is None
        or layer_inputs is None
        or epsilon is None
        or activation is None
        or config.hidden_size % heads
    ):
        return None
    padding_id = -1
    if names.counts_tokens:
        padding_id = config.pad_token_id if names.padding_id is None else names.padding_id
    return Encoder(
        heads=heads,
        depth=config.num_hidden_layers,
        epsilon=epsilon,
        activation=activation,
        inputs=(*table_inputs, *buckets, *layer_inputs),
        last_norm=layer_inputs[-2].name,
        padding_id=padding_id,
        token_types=has_types,
        projection=has_projection,
        kind=names.kind,
    )


def read_modules(model: PreTrainedModel, names: Iterable[str], biases: bool = True) -> list[EncoderInput] | None:
    """List weight and bias of each of some modules of the base model; an embedding table has no bias.

    Args:
        biases: whether each other module has to have a bias; False puts zeros where there is none.

    Returns:
        None where a module or a bias is missing.
    """
    modules = dict(model.base_model.named_modules())
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inputs: list[EncoderInput] = []
    for name in names:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or weight is None:
            return None
        is_table = isinstance(module, nn.Embedding)
        inputs.append(EncoderInput(f"{prefix}{name}.weight", is_table=is_table))
        if is_table:
            continue
        if getattr(module, "bias", None) is not None:
            inputs.append(EncoderInput(f"{prefix}{name}.bias"))
        elif biases:
            return None
        else:
            inputs.append(EncoderInput(f"encoder.zeros_{len(weight)}", np.zeros(len(weight), np.float32)))
    return inputs


def common_epsilon(model: PreTrainedModel, names: Iterable[str]) -> float | None:
    """Return the epsilon that all layer norms among some modules of the base model have; None where they differ."""
    modules = dict(model.base_model.named_modules())
    epsilons = {module.eps for name in names if isinstance(module := modules.get(name), nn.LayerNorm)}
    if len(epsilons) != 1:  # the operator has one for all
        return None
    epsilon = float(epsilons.pop())
    return epsilon if math.isfinite(epsilon) and epsilon >= 0 else None  # the operator refuses any other


def _is_plain(config: PretrainedConfig) -> bool:
    decodes = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
    return not decodes and positions == "absolute" and config.num_hidden_layers > 0


def _is_usual(config: PretrainedConfig, names: ModuleNames) -> bool:
    """Whether a DeBERTa is one of version 3, whose buckets share the matrices of the content; True for any other."""
    if names.kind != "deberta-v2":
        return True
    terms = set(config.pos_att_type or ())
    convolves = getattr(config, "conv_kernel_size", 0) > 0
    projects = getattr(config, "embedding_size", config.hidden_size) != config.hidden_size
    shares = getattr(config, "share_att_key", False) and terms == {"c2p", "p2c"}
    is_relative = getattr(config, "relative_attention", False) and not config.position_biased_input
    norms = "layer_norm" in getattr(config, "norm_rel_ebd", "none")
    return bool(shares and is_relative and norms and not convolves and not projects)


def _buckets_of_distances(model: PreTrainedModel) -> np.ndarray:
    """Compute the bucket of each distance from query to key, as float32 [2n + 1] for -n to n; the ends stand for more.

    The model's own function is called, since the logarithm in it decides by its last bit.
    """
    distances = torch.arange(-LONGEST_DISTANCE, LONGEST_DISTANCE + 1)
    encoder = model.base_model.encoder
    if isinstance(encoder, modeling_mpnet.MPNetEncoder):
        buckets = encoder.relative_position_bucket(-distances)  # type: ignore[no-untyped-call]
    else:
        assert isinstance(encoder, modeling_deberta_v2.DebertaV2Encoder)
        buckets = distances
        size, longest = encoder.position_buckets, encoder.max_relative_positions
        if size > 0:
            buckets = modeling_deberta_v2.make_log_bucket_position(distances, size, longest).long()
        span = size if size > 0 else longest
        buckets = (buckets + span).clamp(0, 2 * span - 1)
    differs = (buckets != buckets[-1]) & (distances > 0) | (buckets != buckets[0]) & (distances < 0)
    limit = int(distances[differs].abs().max()) + 1
    numbers: np.ndarray = buckets[(distances.abs() <= limit)].numpy().astype(np.float32)
    return numbers
