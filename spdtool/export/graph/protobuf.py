"""Read and change the lists inside ONNX protobufs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import onnx

Item_contra = TypeVar("Item_contra", contravariant=True)


class RepeatedField(Protocol[Item_contra]):
    """The methods of a protobuf's list that are used here."""

    def __delitem__(self, index: slice, /) -> None:
        """Remove items."""

    def extend(self, items: Iterable[Item_contra], /) -> None:
        """Append items."""


def replace_items(field: RepeatedField[Item_contra], items: Sequence[Item_contra]) -> None:
    """Set the items of a protobuf's list."""
    del field[:]
    field.extend(items)


def tensors_by_name(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Map the name of each constant to the constant."""
    return {tensor.name: tensor for tensor in graph.initializer}


def metadata_of(owner: onnx.TensorProto | onnx.ModelProto) -> dict[str, str]:
    """Read the metadata of a constant or a model."""
    return {entry.key: entry.value for entry in owner.metadata_props}


def inputs_of(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node reads, and of those that graphs inside it take from outside."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            names |= inputs_of_all(attribute.g.node)
    return names


def inputs_of_all(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of the tensors that any of the nodes reads."""
    names = set[str]()
    for node in nodes:
        names |= inputs_of(node)
    return names


def find_ancestors(graph: onnx.GraphProto, outputs: Iterable[str]) -> set[str]:
    """Names of the tensors from which some tensors of a graph are computed, these too."""
    producers = {name: node for node in graph.node for name in node.output}
    names = set[str]()
    pending = list(outputs)
    while pending:
        name = pending.pop()
        if name not in names:
            names.add(name)
            if name in producers:
                pending.extend(inputs_of(producers[name]))
    return names


def keep_constants(graph: onnx.GraphProto, names: Container[str]) -> None:
    """Remove the constants that have none of these names."""
    remaining = []
    for tensor in graph.initializer:
        if tensor.name in names:
            remaining.append(tensor)
    replace_items(graph.initializer, remaining)


def rename_inputs(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Let the nodes read other tensors: `names` maps the old name to the new one."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
