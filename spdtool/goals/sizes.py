"""Bytes of an encoder at every shape, for a goal of so many megabytes."""

from __future__ import annotations

from transformers import PreTrainedModel

from spdtool.models.structures import Structures, find_structures
from spdtool.pruning.structure import possible_widths
from spdtool.run.records import LayerCosts

MEGABYTE = 1_000_000  # bytes
FLOAT = 4  # bytes
GRAPH_BYTES = 100_000  # nodes and names of an exported file, which do not depend on the shape


def count_bytes(model: PreTrainedModel) -> LayerCosts:
    """Count the bytes of a portable float32 file of an encoder at every shape.

    Args:
        model: the dense one, with or without weights.

    Raises:
        ModelError: heads and neurons of its family cannot be removed.
    """
    layers = find_structures(model)
    heads, neurons = layers[0].heads, layers[0].neurons
    widths = possible_widths(neurons.count)
    per_head, per_neuron = _bytes_of_one(heads), _bytes_of_one(neurons)
    costs = LayerCosts(
        unit="bytes",
        heads=[per_head * count for count in range(heads.count + 1)],
        neurons={width: per_neuron * width for width in widths},
        outside=0,
    )
    whole = FLOAT * model.num_parameters() + GRAPH_BYTES
    return costs.model_copy(update={"outside": whole - costs.of_dense(len(layers))})


def _bytes_of_one(structures: Structures) -> int:
    """Bytes of the rows and columns that belong to one head, or to one neuron."""
    weights = structures.output.weight.numel()
    for linear in structures.inputs.values():
        weights += sum(parameter.numel() for parameter in linear.parameters())
    return FLOAT * weights // structures.count
