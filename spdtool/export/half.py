"""The graph in fp16: half the bytes, and on a GPU the faster arithmetic.

Softmax and layer normalisation take and give fp16 and compute in float32 inside, as the operators are defined (the
latter by `stash_type`) and onnxruntime's kernels do. Masks are added to scores as a number that fp16 holds with room to
spare: at its own limit, a negative score on top would be minus infinity, and a row of them NaN. Logits stay float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.data import Batch
from spdtool.errors import GateError, ModelError, first_line
from spdtool.export import runtime
from spdtool.export.stored import annotate, notes

MASK = -1e4
SCANNED = 12  # batches that are looked through, node by node


def halve(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with fp16 weights and arithmetic; inputs and logits keep their types.

    Raises:
        ModelError: onnxruntime's converter cannot do it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    known = notes(proto.graph.initializer)
    clamp_masks(proto)
    del proto.graph.value_info[:]
    try:
        found: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True, op_block_list=[])
    except Exception as error:  # its errors share no base of their own
        raise ModelError(f"onnxruntime cannot convert this graph to fp16: {first_line(error)}") from None
    annotate(found, known)
    del found.graph.value_info[:]
    return found


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
    """Look at what every node gives, in fp16, and refuse a number that is none.

    A session on a CPU may keep float32 between two nodes, and hide what overflows on a GPU: here each result is asked
    for, and is therefore rounded.

    Raises:
        GateError: names the first node whose result is not finite.
    """
    proto = onnx.load(file)
    names = _half_results(proto)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)
    session = runtime.open_session(proto.SerializeToString(), provider)
    inputs = [value.name for value in session.get_inputs()]
    for shown, batch in batches[:SCANNED]:
        _refuse_infinite(names, session.run(names, {name: batch[name] for name in inputs}), shown)


def _half_results(proto: onnx.ModelProto) -> list[str]:
    """Results of nodes that are fp16, in the graph's order."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
    return [
        value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    ]


def _refuse_infinite(names: list[str], results: list[Any], shown: str) -> None:
    for name, result in zip(names, results, strict=True):
        if not np.isfinite(result).all():
            raise GateError(
                f"in fp16, {name} is not finite on {shown}: a number is larger than {np.finfo(np.float16).max:g}",
                "ship another target: the model needs float32 there",
            )
