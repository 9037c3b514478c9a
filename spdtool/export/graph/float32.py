"""Make a float32 copy of a graph whose arithmetic is rounded: the same nodes and stored weights, nothing else rounded.

fp16 and int8 arithmetic moves the logits, which hides faults: a missing mask may move them less. So
the float32 copy is compared with the checkpoint, which is filled with the stored weights, as
tightly as any float32 file. It has every node, mask and weight of the file that is shipped, and
differs only in that activations are not rounded.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.export.graph.protobuf import replace_items, tensors_by_name
from spdtool.export.graph.weights import read_metadata, restore_metadata

FLOAT16, FLOAT32 = TensorProto.FLOAT16, TensorProto.FLOAT


def float32_copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the graph without rounding of activations; weights are float32 with the values that are stored."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]  # types of tensors that are float32 from now on
    metadata = read_metadata(copy.graph.initializer)
    _widen_fp16(copy.graph)
    _remove_int8(copy.graph)
    restore_metadata(copy, metadata)
    return copy


def _widen_fp16(graph: onnx.GraphProto) -> None:
    """Turn every fp16 constant, and every cast to fp16, into float32."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == FLOAT16:
                attribute.i = FLOAT32
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == FLOAT16:
            widened = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(widened, tensor.name))


def _remove_int8(graph: onnx.GraphProto) -> None:
    """Replace nodes that round an activation by nodes that pass it on, and integer products by float products."""
    tensors = tensors_by_name(graph)
    # A DequantizeLinear of such an output belongs to an activation, any other to a weight.
    rounded = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            nodes += _pass_through(node)
        elif node.op_type == "MatMulInteger":
            nodes.append(_float_product(node, tensors))
        elif node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            # Dequantized beforehand: onnxruntime would replace the node and its product by an int8
            # kernel.
            graph.initializer.append(_dequantize(node, tensors))
        elif node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in rounded):
            nodes.append(helper.make_node("Identity", node.input[:1], node.output[:1]))
        else:
            nodes.append(node)
    replace_items(graph.node, nodes)


def _pass_through(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Give the activation itself, 1 and 0, where the node gave a rounded one, its scale and its zero point."""
    rounded, scale, zero_point = node.output
    one = numpy_helper.from_array(np.array(1, np.float32))
    zero = numpy_helper.from_array(np.array(0, np.float32))
    return [
        helper.make_node("Identity", node.input, [rounded]),
        helper.make_node("Constant", [], [scale], value=one),
        helper.make_node("Constant", [], [zero_point], value=zero),
    ]


def _dequantize(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> TensorProto:
    """Compute a weight in float32; there is one scale, or one for each column."""
    weight, scale, zero_point = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input)
    return numpy_helper.from_array((weight - zero_point) * scale, node.output[0])


def _float_product(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> onnx.NodeProto:
    """Multiply with the integers of the weight in float32; the nodes behind it multiply the scales in."""
    weight = tensors[node.input[1]]
    if weight.data_type != FLOAT32:  # two products may share a weight, which the first one has converted
        array = numpy_helper.to_array(weight).astype(np.float32)
        if len(node.input) > 3 and node.input[3] in tensors:
            array = array - numpy_helper.to_array(tensors[node.input[3]]).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return helper.make_node("MatMul", node.input[:2], node.output, name=node.name)
