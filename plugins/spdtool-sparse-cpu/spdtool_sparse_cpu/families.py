"""The BERT family: encoders that one operator computes as a whole, and the names of their parameters by role.

They are all the same network: word, position and, for some, token-type embeddings, a layer norm, a projection in small
ELECTRA models; then layers of attention and feed-forward, each followed by a layer norm of the sum with its input. They
differ in names, in how positions are counted, and in whether there are token types. An encoder whose configuration asks
for more than that (a decoder, another activation, relative positions) is not described here, and keeps its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' name of an activation to the operator's."""


@dataclass(frozen=True)
class Names:
    """Modules under the base model, by role; `layers` is the list, and the roles after it are inside a layer."""

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

    def inside(self) -> tuple[str, ...]:
        """The modules of a layer, in the operator's order."""
        return (
            *(self.query, self.key, self.value, self.attention_output, self.attention_norm),
            *(self.intermediate, self.output, self.output_norm),
        )


_BERT: dict[str, Any] = {
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
    "token_types": "embeddings.token_type_embeddings",
}

FAMILIES = {
    "bert": Names(**_BERT),
    "electra": Names(**_BERT, projection="embeddings_project"),
    "roberta": Names(**_BERT, counts_tokens=True),
    "xlm-roberta": Names(**_BERT, counts_tokens=True),
    "distilbert": Names(
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
    ),
}
"""`config.model_type` to names."""


@dataclass(frozen=True)
class Encoder:
    """What the operator `SparseEncoder` has to know: its attributes, and its weights by name, in its order.

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
        """The weight of the layer norm that ends the encoder."""
        return self.layers[-2]


def describe(model: Any) -> Encoder | None:
    """The encoder of a classifier of the BERT family; None where it is of another, or has something unusual."""
    config, base = model.config, model.base_model
    names = FAMILIES.get(config.model_type)
    if names is None or not _is_plain(config):
        return None
    modules = dict(base.named_modules())
    projection = names.projection if names.projection in modules else ""
    tables = [names.word, names.position, names.token_types, names.norm, projection]
    depth = config.num_hidden_layers
    inside = [f"{names.layers}.{index}.{part}" for index in range(depth) for part in names.inside()]
    wanted = [name for name in (*tables, *inside) if name]
    activation = ACTIVATIONS.get(getattr(config, names.activation, None) or "")
    epsilons = {modules[name].eps for name in wanted if isinstance(modules.get(name), nn.LayerNorm)}
    heads, width = config.num_attention_heads, config.hidden_size
    known = set(dict(model.named_parameters(remove_duplicate=False)))
    of = {name: tuple(_parameters(model, name, modules)) for name in wanted if name in modules}
    complete = len(of) == len(wanted) and all(known.issuperset(found) for found in of.values())
    if not complete or activation is None or len(epsilons) != 1 or width % heads:
        return None
    return Encoder(
        heads=heads,
        depth=depth,
        epsilon=epsilons.pop(),
        activation=activation,
        padding_id=config.pad_token_id if names.counts_tokens else -1,
        token_types=bool(names.token_types),
        projection=bool(projection),
        tables=tuple(weight for name in tables if name for weight in of[name]),
        layers=tuple(weight for name in inside for weight in of[name]),
    )


def _is_plain(config: Any) -> bool:
    decodes = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
    return not decodes and positions == "absolute" and config.num_hidden_layers > 0


def _parameters(model: Any, name: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    """The weight of a module, and the bias of all but a table, under their state-dict names."""
    yield f"{model.base_model_prefix}.{name}.weight"
    if not isinstance(modules[name], nn.Embedding):
        yield f"{model.base_model_prefix}.{name}.bias"
