"""Graphs of an encoder at any number of heads, or any width, from the exported graphs of two.

An export takes seconds, and a table needs dozens of shapes. But two exports that differ in one size
have the same nodes: dimensions of weights, and the few whole numbers in reshapes, are linear in
that size. So two of them are exported as any checkpoint is, and the others are written down. Their
weights are random: only times are measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from spdtool.errors import ModelError

DEVIATION = 0.02  # of random weights, as encoders are initialised


class GraphFamily:
    """The graphs of one encoder by one size.

    Args:
        large, small: exported at the sizes `sizes`.

    Raises:
        ModelError: they differ in more than dimensions and whole numbers that are linear in the size.
    """

    def __init__(self, large: onnx.ModelProto, small: onnx.ModelProto, sizes: tuple[int, int]) -> None:
        self.large, self.sizes = large, sizes
        self.pairs = dict(_pair_constants(large, small))

    def graph_at(self, size: int) -> onnx.ModelProto:
        """Return the graph at one size, with random weights where it differs from the large one.

        Raises:
            ModelError: a whole number of the graph is not linear in the size.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.large)
        del proto.graph.value_info[:]  # shapes between the nodes, which onnxruntime finds by itself
        generator = np.random.default_rng(size)
        constants = _constants(proto)
        for name, (first, second) in self.pairs.items():
            if first.data_type == onnx.TensorProto.INT64:
                array = self._at(numpy_helper.to_array(first), numpy_helper.to_array(second), size)
            elif first.dims != second.dims:
                dims = self._at(np.asarray(first.dims), np.asarray(second.dims), size)
                array = (DEVIATION * generator.standard_normal(dims)).astype(np.float32)
            else:
                continue
            constants[name].CopyFrom(numpy_helper.from_array(array, constants[name].name))
        return proto

    def _at(self, large: np.ndarray, small: np.ndarray, size: int) -> np.ndarray:
        """Extend two arrays of whole numbers to another size."""
        steps, remainder = np.divmod((large - small) * (size - self.sizes[0]), self.sizes[0] - self.sizes[1])
        if np.any(remainder):
            raise ModelError("whole numbers of the exported graph are not linear in the size")
        return np.asarray(large + steps, dtype=np.int64)


def _pair_constants(
    large: onnx.ModelProto, small: onnx.ModelProto
) -> Iterator[tuple[str, tuple[onnx.TensorProto, onnx.TensorProto]]]:
    """Yield each constant of one graph by its name, with the one that stands in its place in the other.

    Names differ: exporters number what they have not named.

    Raises:
        ModelError: the graphs have other nodes, or constants of other types.
    """
    first_constants, second_constants = _constants(large), _constants(small)
    partners: dict[str, str] = {}
    if len(large.graph.node) != len(small.graph.node):
        raise ModelError("the graphs of two shapes have different numbers of nodes")
    for first, second in zip(large.graph.node, small.graph.node, strict=True):
        if (first.op_type, len(first.input), len(first.output)) != (
            second.op_type,
            len(second.input),
            len(second.output),
        ):
            raise ModelError(f"{first.op_type} of one shape is {second.op_type} in the graph of another")
        names = zip([*first.input, *first.output], [*second.input, *second.output], strict=True)
        for name, other in names:
            if partners.setdefault(name, other) != other:
                raise ModelError(f"{name} has two partners in the graph of another shape")
    for name, first_constant in first_constants.items():
        second_constant = second_constants.get(partners.get(name, ""))
        if second_constant is None:
            continue  # nothing reads it
        types = (first_constant.data_type, len(first_constant.dims))
        if types != (second_constant.data_type, len(second_constant.dims)):
            raise ModelError(f"{name} is another tensor in the graph of another shape")
        if first_constant.data_type == onnx.TensorProto.INT64 and first_constant.dims != second_constant.dims:
            raise ModelError(f"{name} has other whole numbers in the graph of another shape")
        yield name, (first_constant, second_constant)


def _constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return every constant of a graph by the name of its value."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                constants[node.output[0]] = attribute.t
    return constants
