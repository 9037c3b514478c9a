"""The graph with onnxruntime's fused operators: attention, skip layer normalisation, GELU with its bias.

onnxscript's rules know the graph that torch writes today. onnxruntime's own optimiser of transformers does not find the
attention in it, and its mask for BERT takes all padding to be on the right. A CPU session fuses what it can by itself:
there, these files are no faster; they are for a runtime that does not, and for a GPU, where attention is one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir
from onnx import helper, numpy_helper

from spdtool.errors import ModelError, first_line
from spdtool.export.graph.weights import PACKED, Fingerprint, annotate, fingerprint, notes

DOMAIN = "com.microsoft"


def fuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with fused operators of the domain com.microsoft; constants keep their names and metadata.

    Raises:
        ModelError: onnxscript cannot rewrite it.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    known, parameters = notes(proto.graph.initializer), _fingerprints(proto)
    try:
        model, _ = optimize_for_ort(onnx_ir.serde.deserialize_model(proto))
    except Exception as error:  # its rules raise whatever they meet
        raise ModelError(
            f"onnxscript cannot fuse this graph: {first_line(error)}", "the target 'onnx' is not"
        ) from None
    found: onnx.ModelProto = onnx_ir.serde.serialize_model(model)
    annotate(found, known)
    fold(found)
    label(found, parameters)
    del found.graph.value_info[:]
    return found


def fold(proto: onnx.ModelProto) -> None:
    """Join constants that the graph concatenates along their last axis: the query, key and value of an attention."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in list(proto.graph.node):
        parts = [tensors[name] for name in node.input if name in tensors]
        if node.op_type != "Concat" or len(parts) < len(node.input):
            continue
        arrays = [numpy_helper.to_array(part) for part in parts]
        if node.attribute[0].i % arrays[0].ndim != arrays[0].ndim - 1:
            continue
        joined = numpy_helper.from_array(np.concatenate(arrays, axis=-1), node.output[0])
        proto.graph.initializer.append(joined)
        proto.graph.node.remove(node)
    _drop_unused(proto.graph)


def operators(proto: onnx.ModelProto, domain: str = DOMAIN) -> dict[str, int]:
    """How many nodes of each operator of a domain the graph has."""
    found: dict[str, int] = {}
    for node in proto.graph.node:
        if node.domain == domain:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def domains(proto: onnx.ModelProto) -> set[str]:
    """The domains of the operators in use; that of ONNX itself is empty."""
    found = {node.domain.replace("ai.onnx", "") for node in proto.graph.node}
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= domains(helper.make_model(attribute.g))
    return found


def label(proto: onnx.ModelProto, parameters: Mapping[Fingerprint, str]) -> None:
    """Note in each constant without a note which parameters stand side by side in it; recognised by their content."""
    widths = sorted({shape[-1] for _, shape, _ in parameters}, reverse=True)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.metadata_props or array.ndim not in (1, 2) or array.dtype != np.float32:
            continue
        entries, start = [], 0
        while start < array.shape[-1]:
            blocks = ((width, parameters.get(fingerprint(array[..., start : start + width]))) for width in widths)
            width, name = next(((width, name) for width, name in blocks if name), (0, None))
            if name is None:
                break
            entries.append(f"{name}={width}")
            start += width
        else:
            tensor.metadata_props.add(key=PACKED, value=" ".join(entries))


def _fingerprints(proto: onnx.ModelProto) -> dict[Fingerprint, str]:
    tensors = [tensor for tensor in proto.graph.initializer if tensor.metadata_props]
    return {fingerprint(numpy_helper.to_array(tensor)): tensor.name for tensor in tensors}


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
