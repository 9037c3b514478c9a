"""The graph in fp16: half the bytes, and on a GPU the faster arithmetic.

Softmax and layer normalisation take and give fp16 and compute in float32 inside, as the operators are defined (the
latter by `stash_type`) and onnxruntime's kernels do. Masks are added to scores as a number that fp16 holds with room to
spare: at its own limit, a negative score on top would be minus infinity, and a row of them NaN. Logits stay float32.

So does what no weight has gone into: distances, the buckets that they fall into, the angles of rotary positions, masks.
Such numbers say where and not how much, and a rounded one is another place: a distance whose rounded logarithm falls
into the next bucket (DeBERTa, MPNet), an angle of 513.3 whose sine is that of 513.5 (ModernBERT).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.data.tokens import Batch
from spdtool.errors import GateError, ModelError, first_line
from spdtool.export import runtime
from spdtool.export.graph import float32 as twin
from spdtool.export.graph.weights import annotate, notes

MASK = -1e4
FLOAT32 = "_float32"  # ending of a constant's name that stays what it is
INPUT_CAST = "graph_input_cast"  # how the converter calls the nodes that it puts behind inputs
SCANNED = 12  # batches that are looked through, node by node


def halve(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with fp16 weights and arithmetic; inputs and logits keep their types.

    Raises:
        ModelError: onnxruntime's converter cannot do it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    known = notes(proto.graph.initializer)
    clamp_masks(proto)
    try:
        front = cut(proto)
        del proto.graph.value_info[:]
        found: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True, op_block_list=[])
        join(front, found.graph)
    except Exception as error:  # its errors share no base of their own
        raise ModelError(f"onnxruntime cannot convert this graph to fp16: {first_line(error)}") from None
    annotate(found, known)
    del found.graph.value_info[:]
    return found


def cut(proto: onnx.ModelProto) -> onnx.GraphProto:
    """Take the nodes out of the graph that compute without any weight; what they gave are inputs of it then.

    A weight is a constant that metadata says to be a parameter.

    Returns:
        these nodes and their constants; its outputs are the new inputs of the graph.
    """
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info
    weighted = {tensor.name for tensor in proto.graph.initializer if tensor.metadata_props}
    front, rest = onnx.GraphProto(), []
    for node in proto.graph.node:  # each comes after what it reads
        if weighted.isdisjoint(_reads(node)):
            front.node.append(node)
        else:
            weighted.update(node.output)
            rest.append(node)
    read = {name for node in rest for name in _reads(node)} | {value.name for value in proto.graph.output}
    given = {name for node in front.node for name in node.output} & read
    front.output.extend(value for value in inferred if value.name in given)
    assert len(front.output) == len(given), "the type of each is known"
    _copy_constants(proto.graph, front)
    _fill(proto.graph.node, rest)
    _fill(proto.graph.initializer, [tensor for tensor in proto.graph.initializer if tensor.name in read])
    proto.graph.input.extend(front.output)
    return front


def join(front: onnx.GraphProto, graph: onnx.GraphProto) -> None:
    """Put the nodes that `cut` took out before all others, and behind them what casts their results to fp16."""
    given = {value.name for value in front.output}
    casts = [node for node in graph.node if node.op_type == "Cast" and node.name.startswith(INPUT_CAST)]
    rest = [node for node in graph.node if node not in casts]
    _fill(graph.node, [*front.node, *casts, *rest])
    _fill(graph.input, [value for value in graph.input if value.name not in given])
    graph.initializer.extend(front.initializer)


def _copy_constants(graph: onnx.GraphProto, front: onnx.GraphProto) -> None:
    """Give the nodes in front their own constants, under names of their own: the graph may need the same ones."""
    taken = {name for node in front.node for name in _reads(node)}
    names = {tensor.name: tensor.name + FLOAT32 for tensor in graph.initializer if tensor.name in taken}
    for tensor in graph.initializer:
        if tensor.name in names:
            front.initializer.append(tensor)
            front.initializer[-1].name = names[tensor.name]
    for node in front.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _fill(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, the graphs inside of it as well."""
    inside = (part for attribute in node.attribute if attribute.HasField("g") for part in attribute.g.node)
    return {*node.input}.union(*map(_reads, inside))


def clamp_masks(proto: onnx.ModelProto) -> None:
    """Bring constants that stand for minus infinity to a number that fp16 can add scores to."""
    attributes = [
        a for node in proto.graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")
    ]
    for tensor in (*proto.graph.initializer, *(attribute.t for attribute in attributes)):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) != 1:
            continue
        array = numpy_helper.to_array(tensor)
        if array.item() < MASK:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, MASK), tensor.name))


def scan(file: Path, batches: list[tuple[str, Batch]], provider: str) -> None:
    """Look at what every node gives, in fp16, and refuse a number that is none, unless it is none in float32 either.

    A session on a CPU may keep float32 between two nodes, and hide what overflows on a GPU: here each result is asked
    for, and is therefore rounded.

    Raises:
        GateError: names the first node whose result is not finite, where that of the float32 twin is.
    """
    proto = onnx.load(file)
    names = _half_results(proto)
    wide = twin.twin(proto)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)
    session = runtime.open_session(proto.SerializeToString(), provider)
    inputs = [value.name for value in session.get_inputs()]
    for shown, batch in batches[:SCANNED]:
        given = {name: batch[name] for name in inputs}
        for name, result in zip(names, session.run(names, given), strict=True):
            if not np.isfinite(result).all():
                _refuse_overflow(name, np.isfinite(result), _in_float(wide, name, given), shown)


def _half_results(proto: onnx.ModelProto) -> list[str]:
    """Results of nodes that are fp16, in the graph's order."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
    return [
        value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    ]


def _in_float(wide: onnx.ModelProto, name: str, given: dict[str, Any]) -> np.ndarray:
    """What a node of the float32 twin gives."""
    asked = onnx.ModelProto()
    asked.CopyFrom(wide)
    asked.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return np.asarray(runtime.open_session(asked.SerializeToString()).run([name], given)[0])


def _refuse_overflow(name: str, finite: np.ndarray, wide: np.ndarray, shown: str) -> None:
    """Raise GateError unless what is not finite in fp16 is not in float32 either, such as a logarithm of 0."""
    lost = wide[np.isfinite(wide) & ~finite]
    if lost.size:
        raise GateError(
            f"in fp16, {name} is not finite on {shown}: in float32 it is {lost.flat[0]:.6g} there, "
            f"and fp16 ends at {np.finfo(np.float16).max:g}",
            "ship another target: the model needs float32 there",
        )
