"""Leave out what a structured student does not use: dead attention heads and feed-forward neurons.

A student of whose matrices whole heads and neurons are zero computes the same without them.
`shrink` returns such a model, which is faster in every runtime. Stock classes cannot express its
shape, so it is traced or timed, never saved as a checkpoint: that is the student at full width.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spdtool.errors import ModelError
from spdtool.models.layers import find_layer_stack
from spdtool.models.structures import (
    FAMILIES,
    WIDTH_STEP,
    LayerStructures,
    StructureNames,
    Structures,
    find_structures,
    structure_names,
)

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")  # attributes of attention modules
HEAD_WIDTHS = ("all_head_size", "dim")
WIDTH_FIELDS = ("hidden_dim", "intermediate_size")  # of a configuration; DistilBERT has the first
POSITION_BIAS = "position_bias"  # argument of an attention


@dataclass(frozen=True)
class Axis:
    """Positions along one axis of a parameter.

    Attributes:
        size: of the axis in the full model.
        live: positions that the smaller model has, rising.
    """

    size: int
    live: tuple[int, ...]


Positions = tuple[Axis, ...]
"""One for each axis of a parameter."""


@dataclass(frozen=True)
class LiveStructures:
    """What a shrunk layer keeps: flags of its heads and of its neurons, [count] each."""

    heads: Tensor
    neurons: Tensor

    @property
    def is_full(self) -> bool:
        """Whether nothing of the layer can be left out."""
        return bool(self.heads.all()) and bool(self.neurons.all())


def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model without its dead heads and neurons; its outputs are the same up to rounding.

    A model without any, or of a family whose heads and neurons are not described, is returned as it is.
    """
    live = [_choose_live(layer) for layer in _describe(model)]
    # The same object: a student pruned weight by weight is traced as it is.
    if all(layer.is_full for layer in live):
        return model
    small = copy.deepcopy(model)
    names = structure_names(small)
    for layer, structures, flags in zip(find_layer_stack(small), find_structures(small), live, strict=True):
        _shrink_heads(layer, structures.heads, flags.heads, names)
        _shrink_neurons(layer, structures.neurons, flags.neurons, names)
    return small


def find_live_positions(model: PreTrainedModel) -> dict[str, Positions]:
    """Map each parameter that is smaller in `shrink(model)` to the positions that it has there."""
    positions: dict[str, Positions] = {}
    for layer in _describe(model):
        live = _choose_live(layer)
        for structures, flags in ((layer.heads, live.heads), (layer.neurons, live.neurons)):
            if not bool(flags.all()):
                positions |= _cut_positions(structures, flags)
    return positions


def narrow(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Positions]]:
    """Build the narrowest model of a stock class that computes the same: one feed-forward width for all layers.

    Stock classes have as many heads in every layer as the hidden width asks for, so dead heads
    stay, as zeros.

    Returns:
        The model, and each parameter that is smaller there, with its positions.
    """
    layers = _describe(model)
    field = next((name for name in WIDTH_FIELDS if hasattr(model.config, name)), None)
    if not layers or field is None:
        return model, {}
    live = [layer.neurons.find_live() for layer in layers]
    width = max(WIDTH_STEP, *(-(-int(flags.sum()) // WIDTH_STEP) * WIDTH_STEP for flags in live))
    if width >= layers[0].neurons.count:
        return model, {}
    config = copy.deepcopy(model.config)
    setattr(config, field, width)
    with torch.random.fork_rng(devices=[]):  # its weights are replaced
        small = type(model)(config)
    weights, positions = model.state_dict(), {}
    for layer, flags in zip(layers, live, strict=True):
        # dead neurons fill the layer up to the common width
        flags[(~flags).nonzero().flatten()[: width - int(flags.sum())]] = True
        for name, axes in _cut_positions(layer.neurons, flags).items():
            positions[name] = axes
            for index, axis in enumerate(axes):
                weights[name] = weights[name].index_select(index, torch.tensor(axis.live))
    small.load_state_dict(weights)
    small.train(model.training)
    return small, positions


def _describe(model: PreTrainedModel) -> Sequence[LayerStructures]:
    """Find the structures of each layer; none where the family is not described, or a layer is another than its."""
    if model.config.model_type in FAMILIES:
        with contextlib.suppress(ModelError):
            return find_structures(model)
    return ()


def _cut_positions(structures: Structures, live: Tensor) -> dict[str, Positions]:
    """Return the positions that remain of the parameters of a layer's heads or neurons, by their flags."""
    positions: dict[str, Positions] = {}
    for name, linear in structures.inputs.items():
        rows = _axis(structures.rows(live, linear))
        positions[f"{name}.weight"] = (rows, _whole_axis(linear.in_features))
        if linear.bias is not None:
            positions[f"{name}.bias"] = (rows,)
    all_rows = _whole_axis(structures.output.out_features)
    positions[f"{structures.output_name}.weight"] = (all_rows, _axis(structures.columns(live)))
    return positions


def _choose_live(layer: LayerStructures) -> LiveStructures:
    """Flag the structures to keep: those that live, and dead neurons that fill up the width."""
    neurons = layer.neurons.find_live()
    # Widths in whole steps: a kernel computes a started vector in full anyway.
    missing = -int(neurons.sum()) % WIDTH_STEP
    filling = (~neurons).nonzero().flatten()[:missing]
    neurons[filling] = True
    return LiveStructures(layer.heads.find_live(), neurons)


def _axis(flags: Tensor) -> Axis:
    return Axis(len(flags), tuple(flags.nonzero().flatten().tolist()))


def _whole_axis(size: int) -> Axis:
    return Axis(size, tuple(range(size)))


def _shrink_heads(layer: nn.Module, heads: Structures, live: Tensor, names: StructureNames) -> None:
    if bool(live.all()):
        return
    if not bool(live.any()):
        _skip(layer, names.attention, names.head_output, heads.output, SkippedAttention)
        return
    _cut(heads, live)
    attention = layer.get_submodule(names.attention)
    count = int(live.sum())
    # Attention modules reshape by these numbers, so they change with the weights.
    for attribute in HEAD_COUNTS:
        if hasattr(attention, attribute):
            setattr(attention, attribute, count)
    for attribute in HEAD_WIDTHS:
        if hasattr(attention, attribute):
            setattr(attention, attribute, count * heads.size)
    if POSITION_BIAS in inspect.signature(attention.forward).parameters:  # MPNet: all layers get that of all heads
        attention.register_buffer("live_heads", live.nonzero().flatten(), persistent=False)
        attention.register_forward_pre_hook(_select_position_bias, with_kwargs=True)


def _shrink_neurons(layer: nn.Module, neurons: Structures, live: Tensor, names: StructureNames) -> None:
    if bool(live.all()):
        return
    if bool(live.any()):
        _cut(neurons, live)
    else:
        _skip(layer, names.feed_forward, names.neuron_output, neurons.output, SkippedFeedForward)


@torch.no_grad()
def _cut(structures: Structures, live: Tensor) -> None:
    """Cut rows and columns out of the matrices of a layer."""
    for linear in structures.inputs.values():
        rows = structures.rows(live, linear)
        linear.weight = nn.Parameter(linear.weight[rows].contiguous())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows].contiguous())
        # Exporters and `repr` read it, and torch does not follow the weight.
        linear.out_features = len(linear.weight)
    output = structures.output
    output.weight = nn.Parameter(output.weight[:, structures.columns(live)].contiguous())
    output.in_features = output.weight.shape[1]


def _select_position_bias(
    attention: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Select the position biases of the live heads, [rows, heads, tokens, tokens], before an attention reads them."""
    live = attention.live_heads
    assert isinstance(live, Tensor)
    bound = inspect.signature(attention.forward).bind(*arguments, **keywords)
    bias = bound.arguments.get(POSITION_BIAS)
    if isinstance(bias, Tensor):
        bound.arguments[POSITION_BIAS] = bias.index_select(1, live)
    return bound.args, bound.kwargs


class OutputBias(nn.Module):
    """Stand in for an output layer without columns: its result is its bias, whatever comes in."""

    bias: nn.Parameter | None
    zeros: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("bias", linear.bias)
        self.register_buffer("zeros", torch.zeros(linear.out_features), persistent=False)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return the bias, [outputs], which the residual connection adds to every token."""
        return self.zeros if self.bias is None else self.bias


class SkippedAttention(nn.Module):
    """Stand in for an attention without heads.

    Args:
        output: name and module of its output layer, where the attention applies it itself.
    """

    def __init__(self, output: tuple[str, OutputBias] | None) -> None:
        super().__init__()
        self.output_name = output[0] if output else ""
        if output:
            self.add_module(*output)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return the output and no attention maps."""
        if not self.output_name:
            return hidden_states, None  # an output layer that ignores it comes next
        return self.get_submodule(self.output_name)(hidden_states), None


class SkippedFeedForward(SkippedAttention):
    """Stand in for a feed-forward without neurons."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:  # type: ignore[override]
        """Return the output."""
        return super().forward(hidden_states)[0]


def _skip(layer: nn.Module, module: str, output_name: str, output: nn.Linear, kind: type[SkippedAttention]) -> None:
    """Put modules that compute nothing in the place of `module` and of the output layer."""
    inner = output_name.removeprefix(f"{module}.")
    if inner != output_name:  # DistilBERT, MPNet, ModernBERT: the module holds its output layer
        layer.set_submodule(module, kind((inner, OutputBias(output))))
        return
    layer.set_submodule(module, kind(None))
    layer.set_submodule(output_name, OutputBias(output))
