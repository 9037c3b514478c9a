"""Convert a graph to fp16: half the bytes, and on a GPU the faster arithmetic.

Softmax and layer normalization take and give fp16 and compute in float32 inside, as the operators
are defined (the latter by `stash_type`) and onnxruntime's kernels do. Masks are added to scores as
a number that fp16 holds with room to spare: at its own limit, a negative score on top would be
minus infinity, and a row of them NaN. Logits stay float32.

So does everything that no weight enters: distances, the buckets that they fall into, the angles of
rotary positions, masks. Such numbers say where and not how much, and a rounded one is another
position: a distance whose rounded logarithm falls into the next bucket (DeBERTa, MPNet), an
angle of 513.3 whose sine is that of 513.5 (ModernBERT).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.data.tokens import Batch
from spdtool.errors import GateError, ModelError, first_line
from spdtool.export import onnx_session
from spdtool.export.graph.float32 import float32_copy
from spdtool.export.graph.protobuf import inputs_of, inputs_of_all, keep_constants, rename_inputs, replace_items
from spdtool.export.graph.weights import read_metadata, restore_metadata

MASK_VALUE = -1e4  # exp of it is 0 in fp16, and scores can be added to it
FLOAT32_SUFFIX = "_float32"  # of the name of a constant that is not converted
INPUT_CAST = "graph_input_cast"  # prefix of the casts that the converter puts behind the graph's inputs
CHECKED_BATCHES = 12  # every node of each is looked at, which takes a second or two a batch


def convert_to_fp16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Convert weights and arithmetic to fp16; inputs and logits keep their types.

    Raises:
        ModelError: onnxruntime's converter cannot do it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    metadata = read_metadata(proto.graph.initializer)
    clamp_masks(proto)
    try:
        unweighted = split_unweighted(proto)
        del proto.graph.value_info[:]  # the converter would trust the float32 types in it
        # The converter's own block list keeps operators in float32 that onnxruntime has in fp16.
        converted: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True, op_block_list=[])
        prepend_unweighted(unweighted, converted.graph)
    except Exception as error:  # its errors share no base of their own
        raise ModelError(f"onnxruntime cannot convert this graph to fp16: {first_line(error)}") from None
    restore_metadata(converted, metadata)
    del converted.graph.value_info[:]
    return converted


def split_unweighted(proto: onnx.ModelProto) -> onnx.GraphProto:
    """Move the nodes that compute without any weight out of the graph; their results become inputs of it.

    A weight is a constant that metadata says to be a parameter.

    Returns:
        The nodes that were moved, with their constants. Its outputs are the new inputs of the
        graph.
    """
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info
    weighted = set[str]()
    for tensor in proto.graph.initializer:
        if tensor.metadata_props:
            weighted.add(tensor.name)
    unweighted = onnx.GraphProto()
    weighted_nodes = []
    for node in proto.graph.node:  # each comes after what it reads
        if weighted.isdisjoint(inputs_of(node)):
            unweighted.node.append(node)
        else:
            weighted.update(node.output)
            weighted_nodes.append(node)
    needed = inputs_of_all(weighted_nodes).union(value.name for value in proto.graph.output)
    crossing = set[str]()
    for node in unweighted.node:
        crossing |= needed.intersection(node.output)
    unweighted.output.extend(value for value in inferred if value.name in crossing)
    assert len(unweighted.output) == len(crossing), "shape inference knows the type of each"
    _move_constants(proto.graph, unweighted)
    replace_items(proto.graph.node, weighted_nodes)
    keep_constants(proto.graph, needed)
    proto.graph.input.extend(unweighted.output)
    return unweighted


def prepend_unweighted(unweighted: onnx.GraphProto, graph: onnx.GraphProto) -> None:
    """Put the nodes that were split off before all others, followed by the casts of their results to fp16."""
    crossing = {value.name for value in unweighted.output}
    casts: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    for node in graph.node:
        is_input_cast = node.op_type == "Cast" and node.name.startswith(INPUT_CAST)
        (casts if is_input_cast else others).append(node)
    replace_items(graph.node, [*unweighted.node, *casts, *others])
    replace_items(graph.input, [value for value in graph.input if value.name not in crossing])
    graph.initializer.extend(unweighted.initializer)


def _move_constants(graph: onnx.GraphProto, unweighted: onnx.GraphProto) -> None:
    """Copy the constants of the split-off nodes under other names: the graph may need the same ones in fp16."""
    used = inputs_of_all(unweighted.node)
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name in used:
            names[tensor.name] = tensor.name + FLOAT32_SUFFIX
            unweighted.initializer.append(tensor)
            unweighted.initializer[-1].name = names[tensor.name]
    rename_inputs(unweighted.node, names)


def clamp_masks(proto: onnx.ModelProto) -> None:
    """Raise scalar constants that stand for minus infinity to a number that fp16 can add scores to."""
    tensors = list(proto.graph.initializer)
    for node in proto.graph.node:
        if node.op_type == "Constant":
            tensors += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
    for tensor in tensors:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) != 1:
            continue
        array = numpy_helper.to_array(tensor)
        if array.item() < MASK_VALUE:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, MASK_VALUE), tensor.name))


def check_overflow(file: Path, batches: list[tuple[str, Batch]], provider: str) -> None:
    """Refuse a file in which a node's fp16 result is not finite where it is in float32.

    A session on a CPU may keep float32 between two nodes, and hide what overflows on a GPU. Here
    every result is an output of the graph, and is therefore rounded.

    Args:
        batches: each with a description; the first few are run.

    Raises:
        GateError: names the first node whose result overflows.
    """
    proto = onnx.load(file)
    widened = float32_copy(proto)
    read = inputs_of_all(proto.graph.node)
    names = []
    for node in proto.graph.node:
        names += [name for name in node.output if name in read]
    # onnxruntime infers the types, also behind its own operators, of which onnx knows nothing
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnx_session.open_session(proto.SerializeToString(), provider)
    inputs = [value.name for value in session.get_inputs()]
    for description, batch in batches[:CHECKED_BATCHES]:
        feeds = {name: batch[name] for name in inputs}
        for name, result in zip(names, session.run(names, feeds), strict=True):
            if result.dtype == np.float16 and not np.isfinite(result).all():
                expected = _run_to_node(widened, name, feeds)
                _refuse_overflow(name, np.isfinite(result), expected, description)


def _run_to_node(proto: onnx.ModelProto, name: str, feeds: Batch) -> np.ndarray:
    """Compute the result called `name` in float32."""
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    extended.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return np.asarray(onnx_session.open_session(extended.SerializeToString()).run([name], feeds)[0])


def _refuse_overflow(name: str, is_finite: np.ndarray, expected: np.ndarray, description: str) -> None:
    """Raise GateError unless float32 is not finite there either, such as at a logarithm of 0."""
    overflowed = expected[np.isfinite(expected) & ~is_finite]
    if overflowed.size:
        raise GateError(
            f"in fp16, {name} is not finite on {description}: in float32 it is {overflowed.flat[0]:.6g} there, "
            f"and fp16 ends at {np.finfo(np.float16).max:g}",
            "ship another target: the model needs float32 there",
        )
