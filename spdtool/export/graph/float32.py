"""The float32 twin of a graph whose arithmetic is coarse: the same nodes and the same stored weights, nothing rounded.

What fp16 and int8 arithmetic does to a logit hides faults: a lost mask may move it less. So the twin is held against
the checkpoint with the stored weights in it, as tightly as any float32 file; it has every node, mask and weight of the
file that is shipped, and differs only in that activations are not rounded.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.export.graph.weights import annotate, notes

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def twin(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph without roundings of activations; weights are float32 with the values that are stored."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    del found.graph.value_info[:]
    known = notes(found.graph.initializer)
    _in_float(found.graph)
    _without_integers(found.graph)
    annotate(found, known)
    return found


def _in_float(graph: onnx.GraphProto) -> None:
    """Everything that is fp16, as float32."""
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == HALF:
                attribute.i = FLOAT
            if attribute.HasField("t"):
                _widen(attribute.t)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _without_integers(graph: onnx.GraphProto) -> None:
    """Each node that rounds an activation becomes one that passes it on; integer products become float ones."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rounded = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            nodes += _passed_on(node)
        elif node.op_type == "MatMulInteger":
            nodes.append(_product(node, tensors))
        elif node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            graph.initializer.append(_dequantised(node, tensors))  # onnxruntime would choose an int8 kernel of its own
        elif node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in rounded):
            nodes.append(helper.make_node("Identity", node.input[:1], node.output[:1]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _passed_on(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """In place of (rounded, scale, zero point): the activation itself, 1 and 0."""
    rounded, scale, zero = node.output
    one, none = (numpy_helper.from_array(np.array(value, np.float32)) for value in (1, 0))
    return [
        helper.make_node("Identity", node.input, [rounded]),
        helper.make_node("Constant", [], [scale], value=one),
        helper.make_node("Constant", [], [zero], value=none),
    ]


def _dequantised(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> TensorProto:
    """A weight in float32; one scale, or one for each column."""
    weight, scale, zero = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input)
    return numpy_helper.from_array((weight - zero) * scale, node.output[0])


def _product(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> onnx.NodeProto:
    """A float product with the integers of the weight; the scales are multiplied in by the nodes behind it."""
    weight, zero = tensors[node.input[1]], tensors.get(node.input[3]) if len(node.input) > 3 else None
    if weight.data_type != FLOAT:
        array = numpy_helper.to_array(weight).astype(np.float32)
        if zero is not None:
            array = array - numpy_helper.to_array(zero).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return helper.make_node("MatMul", node.input[:2], node.output, name=node.name)
