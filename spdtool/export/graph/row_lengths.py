"""Give fused attention the length of each row in place of an additive mask, for input that is padded on the right.

onnxruntime's Attention takes a bias [rows, 1, tokens, tokens], or a mask index. With the index its
flash kernels (memory-efficient attention) run at every length, and padding can be removed before
the first layer. The index has 3 * rows + 2 entries: the length of each row, then twice the start of
each row among all tokens and their end. This form runs on every GPU; the shorter one, lengths
alone, has no fused kernel from Hopper on. A CPU reads the lengths. The plain CUDA kernel would take
the starts for something else, so heads must have a width that the flash kernels have.

The nodes compute from the mask itself, without Shape: a node on the CPU would forbid CUDA graphs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.export import onnx_session
from spdtool.export.graph.fuse import FUSED_DOMAIN
from spdtool.export.graph.protobuf import inputs_of, inputs_of_all, keep_constants, replace_items, tensors_by_name

MASK = "attention_mask"
ROW_LENGTHS = "row_lengths"  # int32 [rows]: what removing padding needs
MASK_INDEX = "mask_index"  # int32 [3 * rows + 2]
MASK_INPUT, BIAS_INPUT = 3, 5  # of the operator Attention
OPTIONAL_OUTPUTS = ("SkipLayerNormalization",)  # operators whose outputs behind the first may be left out
HEAD_STEP = 8  # widths of a head that the flash kernels have are its multiples
SMALLEST_PENALTY = -1e4  # exp of it is 0: what a padding mask adds to the score of padding, at most


def use_row_lengths(proto: onnx.ModelProto) -> bool:
    """Let all attentions read row lengths instead of a bias that hides padding and nothing else.

    Returns:
        Whether the graph was changed; it stays as it is without fused attention, where the bias
        holds more than padding (relative positions, windows), where attentions differ in it, and
        where heads have an odd width.
    """
    attentions = [node for node in proto.graph.node if (node.domain, node.op_type) == (FUSED_DOMAIN, "Attention")]
    biases = set[str]()
    for node in attentions:
        has_other_mask = any(node.input[MASK_INPUT:BIAS_INPUT])
        biases.add("" if has_other_mask or len(node.input) <= BIAS_INPUT else node.input[BIAS_INPUT])
    if len(biases) != 1 or "" in biases or any(width % HEAD_STEP for width in _head_widths(proto, attentions)):
        return False
    if not _hides_padding_only(proto, biases.pop()):
        return False
    for node in attentions:
        node.input[:] = [*node.input[:MASK_INPUT], MASK_INDEX]
    nodes, constants = _row_length_nodes()
    replace_items(proto.graph.node, [*nodes, *proto.graph.node])
    proto.graph.initializer.extend(constants)
    remove_dead_nodes(proto.graph)
    return True


def remove_dead_nodes(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output depends on, and optional outputs that nothing reads.

    An output that is named is computed: SkipLayerNormalization would write its sum to memory for nobody.
    """
    needed = {value.name for value in graph.output}
    alive: list[onnx.NodeProto] = []
    for node in reversed(graph.node):  # each comes after what it reads
        if needed.isdisjoint(node.output):
            continue
        if node.op_type in OPTIONAL_OUTPUTS:
            outputs = [name if name in needed else "" for name in node.output]
            while not outputs[-1]:
                outputs.pop()
            node.output[:] = outputs
        needed |= inputs_of(node)
        alive.append(node)
    replace_items(graph.node, alive[::-1])
    keep_constants(graph, inputs_of_all(graph.node))


def _head_widths(proto: onnx.ModelProto, attentions: list[onnx.NodeProto]) -> list[int]:
    """Width of a head of each attention, from its joined weights [hidden, query + key + value]."""
    tensors = tensors_by_name(proto.graph)
    widths = []
    for node in attentions:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        query = tensors[node.input[1]].dims[1] // 3
        if attributes.get("qkv_hidden_sizes"):
            query = attributes["qkv_hidden_sizes"][0]
        widths.append(query // attributes["num_heads"])
    return widths


def _row_length_nodes() -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Build the nodes that turn the mask into row lengths and the mask index, with their constants."""

    def constant(name: str, value: int | list[int], dtype: type = np.int32) -> TensorProto:
        return numpy_helper.from_array(np.array(value, dtype), f"{MASK_INDEX}/{name}")

    zero, one, first = constant("zero", 0), constant("one", 1), constant("first", [0])
    axis, axes = constant("axis", 0, np.int64), constant("axes", [1], np.int64)
    ends = f"{MASK_INDEX}/ends"
    nodes = [
        helper.make_node("Cast", [MASK], [f"{MASK_INDEX}/mask"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", [f"{MASK_INDEX}/mask", axes.name], [ROW_LENGTHS], keepdims=0),
        # ones of the mask's shape, whose sums are the padded length: there is no Shape, for CUDA graphs
        helper.make_node("Mul", [f"{MASK_INDEX}/mask", zero.name], [f"{MASK_INDEX}/zeros"]),
        helper.make_node("Add", [f"{MASK_INDEX}/zeros", one.name], [f"{MASK_INDEX}/ones"]),
        helper.make_node("ReduceSum", [f"{MASK_INDEX}/ones", axes.name], [f"{MASK_INDEX}/widths"], keepdims=0),
        helper.make_node("CumSum", [f"{MASK_INDEX}/widths", axis.name], [ends]),
        helper.make_node("Concat", [ROW_LENGTHS, first.name, ends, first.name, ends], [MASK_INDEX], axis=0),
    ]
    return nodes, [zero, one, first, axis, axes]


def _hides_padding_only(proto: onnx.ModelProto, bias: str) -> bool:
    """Compute a bias from a mask; return whether it is 0 for every token and a large penalty for all padding."""
    mask_graph = _upstream_graph(proto, bias)
    if mask_graph is None:
        return False
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 1]], np.int64)
    feeds = {}
    for value in mask_graph.graph.input:
        feeds[value.name] = mask if value.name == MASK else np.zeros_like(mask)
    (values,) = onnx_session.open_session(mask_graph.SerializeToString(), threads=1).run([bias], feeds)
    rows, tokens = mask.shape
    if values.ndim != 4 or values.shape[1] != 1:
        return False
    is_hidden = np.broadcast_to(mask[:, None, None, :] == 0, (rows, 1, tokens, tokens))
    values = np.broadcast_to(values, is_hidden.shape)
    return bool((values[~is_hidden] == 0).all() and (values[is_hidden] <= SMALLEST_PENALTY).all())


def _upstream_graph(proto: onnx.ModelProto, name: str) -> onnx.ModelProto | None:
    """Cut out what computes a tensor; None where it is computed from a parameter."""
    needed, nodes = {name}, list[onnx.NodeProto]()
    for node in reversed(proto.graph.node):
        if not needed.isdisjoint(node.output):
            needed |= inputs_of(node)
            nodes.append(node)
    constants = [tensor for tensor in proto.graph.initializer if tensor.name in needed]
    if any(tensor.metadata_props for tensor in constants):
        return None
    inputs = [value for value in proto.graph.input if value.name in needed]
    if MASK not in {value.name for value in inputs}:
        return None
    outputs = [onnx.ValueInfoProto(name=name)]  # onnxruntime infers its type
    graph = helper.make_graph(nodes[::-1], "mask", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
