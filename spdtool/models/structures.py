"""Attention heads and feed-forward neurons: which rows and columns of a layer's matrices go together.

A head owns rows of the query, key and value matrices, and columns of the output projection. A
neuron owns a row of the up-projection (in a gated feed-forward one of either half), and a column of
the down-projection. Without its columns a structure changes no output, so all of it can be removed,
and the result is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from spdtool.errors import ModelError
from spdtool.models.layers import find_layer_stack

WIDTH_STEP = 32  # neurons; the vectors of every runtime's kernels divide it


@dataclass(frozen=True)
class StructureNames:
    """Names of the modules of a layer, relative to the layer.

    Attributes:
        attention: module that computes the heads from the hidden states.
        head_inputs: linear layers whose outputs are made of heads; those that a layer lacks are skipped.
        neuron_inputs: the same of neurons.
        feed_forward: module between the hidden states and `neuron_output`.
    """

    attention: str
    head_inputs: tuple[str, ...]
    head_output: str
    feed_forward: str
    neuron_inputs: tuple[str, ...]
    neuron_output: str


# Read in transformers' modelling files; a wrong name is refused when the layer is looked at.
BERT = StructureNames(
    attention="attention.self",
    head_inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
    head_output="attention.output.dense",
    feed_forward="intermediate",
    neuron_inputs=("intermediate.dense",),
    neuron_output="output.dense",
)
FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "distilbert": StructureNames(
        attention="attention",
        head_inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        head_output="attention.out_lin",
        feed_forward="ffn",
        neuron_inputs=("ffn.lin1",),
        neuron_output="ffn.lin2",
    ),
    "mpnet": replace(
        BERT,
        attention="attention.attn",
        head_inputs=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        head_output="attention.attn.o",
    ),
    "deberta-v2": replace(
        BERT,
        head_inputs=(
            *("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
            *("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
        ),
    ),
    "modernbert": StructureNames(
        attention="attn",
        # Queries, keys and values in one matrix, so a head has three groups of rows in it.
        head_inputs=("attn.Wqkv",),
        head_output="attn.Wo",
        feed_forward="mlp",
        # Gated: Wi makes both halves, so a neuron has two rows in it.
        neuron_inputs=("mlp.Wi",),
        neuron_output="mlp.Wo",
    ),
}
"""Maps `config.model_type` to the names of modules."""


@dataclass(frozen=True)
class Structures:
    """All heads, or all neurons, of one layer.

    Attributes:
        inputs: module name in the model to the linear layer whose rows make the structures. Where
            matrices are fused, all structures come several times: queries, keys and values, or both
            halves of a gated feed-forward.
        output_name, output: the linear layer whose columns read the structures.
        size: columns of one structure.
    """

    inputs: Mapping[str, nn.Linear]
    output_name: str
    output: nn.Linear
    size: int

    @property
    def count(self) -> int:
        """Number of structures of the layer as it is."""
        return self.output.in_features // self.size

    def find_live(self) -> Tensor:
        """Flag the structures that have any weight or bias that is not zero: [count]."""
        # A structure with a bias alone still feeds a constant to the layer's output.
        live = (self.output.weight != 0).any(0).view(self.count, self.size).any(1)
        for linear in self.inputs.values():
            rows = (linear.weight != 0).any(1)
            if linear.bias is not None:
                rows = rows | (linear.bias != 0)
            live = live | rows.view(-1, self.count, self.size).any(2).any(0)
        return live

    def columns(self, flags: Tensor) -> Tensor:
        """Repeat a flag of each structure, [count], for the columns of `output`."""
        return flags.repeat_interleave(self.size)

    def rows(self, flags: Tensor, linear: nn.Linear) -> Tensor:
        """Repeat a flag of each structure, [count], for the rows of one of `inputs`."""
        return self.columns(flags).repeat(linear.out_features // self.output.in_features)


@dataclass(frozen=True)
class LayerStructures:
    """The structures of one layer of an encoder."""

    heads: Structures
    neurons: Structures


def find_structures(model: PreTrainedModel) -> list[LayerStructures]:
    """Find heads and neurons of each layer, first to last.

    Raises:
        ModelError: the family is not among `FAMILIES`, or a layer is not built as its family's layers are.
    """
    names = structure_names(model)
    module_names = {id(module): name for name, module in model.named_modules()}
    heads = model.config.num_attention_heads
    layers = []
    for layer in find_layer_stack(model):
        # of the projection, not of the configuration: heads need not add up to the hidden width
        width = _linear(layer, names.head_output, model).in_features
        layers.append(
            LayerStructures(
                _structures(
                    model, layer, module_names[id(layer)], names.head_inputs, names.head_output, width // heads
                ),
                _structures(model, layer, module_names[id(layer)], names.neuron_inputs, names.neuron_output, 1),
            )
        )
    return layers


def structure_names(model: PreTrainedModel) -> StructureNames:
    """Look up the names of a layer's modules; raises ModelError for a family that nobody has described."""
    names = FAMILIES.get(model.config.model_type)
    if names is None:
        raise ModelError(
            f"heads and neurons of {model.config.model_type!r} cannot be removed: its layers are not described",
            f"families that can be made smaller: {', '.join(FAMILIES)}",
        )
    return names


def _structures(
    model: PreTrainedModel, layer: nn.Module, prefix: str, inputs: tuple[str, ...], output: str, size: int
) -> Structures:
    linears = {}
    present = dict(layer.named_modules())
    for name in inputs:
        # a DeBERTa that shares its keys has no projections of positions
        if name in present:
            linears[f"{prefix}.{name}"] = _linear(layer, name, model)
    return Structures(linears, f"{prefix}.{output}", _linear(layer, output, model), size)


def _linear(layer: nn.Module, name: str, model: PreTrainedModel) -> nn.Linear:
    module = dict(layer.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{model.config.model_type!r} has no linear layer {name} in {type(layer).__name__}")
    return module
