"""Fuse a graph with onnxruntime's operators: attention, skip layer normalization, GELU with its bias.

onnxscript's rules know the graph that torch writes today. onnxruntime's own optimizer of
transformers does not recognize the attention in it, and its mask for BERT assumes that all padding
is on the right. A CPU session fuses by itself: these files are no faster there. They are for a
runtime that does not, and for a GPU, where attention is one kernel.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir
from onnx import helper, numpy_helper

from spdtool.errors import ModelError, first_line
from spdtool.export.graph.protobuf import inputs_of_all, keep_constants, tensors_by_name
from spdtool.export.graph.weights import (
    NAME_SEPARATOR,
    PARAMETERS,
    POSITIONS,
    SIDE_BY_SIDE,
    TRANSPOSED,
    Fingerprint,
    fingerprint,
    read_metadata,
    restore_metadata,
)

FUSED_DOMAIN = "com.microsoft"


def fuse_operators(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite the graph with fused operators of the domain com.microsoft; constants keep their names and metadata.

    Raises:
        ModelError: onnxscript cannot rewrite it.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    metadata = read_metadata(proto.graph.initializer)
    parameters: dict[Fingerprint, str] = {}
    for tensor in proto.graph.initializer:
        if tensor.metadata_props:
            parameters[fingerprint(numpy_helper.to_array(tensor))] = tensor.name
    try:
        model, _ = optimize_for_ort(onnx_ir.serde.deserialize_model(proto))
    except Exception as error:  # its rules raise whatever they meet
        reason = first_line(error)
        raise ModelError(f"onnxscript cannot fuse this graph: {reason}", "the target 'onnx' is not fused") from None
    fused: onnx.ModelProto = onnx_ir.serde.serialize_model(model)
    restore_metadata(fused, metadata)
    join_concatenated(fused)
    label_joined(fused, name_columns(fused, parameters, metadata), metadata)
    del fused.graph.value_info[:]  # shapes of tensors that fused operators no longer produce
    return fused


def join_concatenated(proto: onnx.ModelProto) -> None:
    """Join constants that the graph concatenates along their last axis: query, key and value of an attention."""
    tensors = tensors_by_name(proto.graph)
    for node in list(proto.graph.node):
        if node.op_type != "Concat" or not all(name in tensors for name in node.input):
            continue
        arrays = [numpy_helper.to_array(tensors[name]) for name in node.input]
        axis = node.attribute[0].i % arrays[0].ndim
        if axis == arrays[0].ndim - 1:
            joined = numpy_helper.from_array(np.concatenate(arrays, axis=-1), node.output[0])
            proto.graph.initializer.append(joined)
            proto.graph.node.remove(node)
    keep_constants(proto.graph, inputs_of_all(proto.graph.node))


def name_columns(
    proto: onnx.ModelProto, parameters: Mapping[Fingerprint, str], metadata: Mapping[str, Mapping[str, str]]
) -> dict[Fingerprint, str]:
    """Name what a joined constant may hold: after its constant; after all its parameters where that one is gone.

    Equal parameters share one constant. Once it only stands side by side with others, the layout
    must name each.
    """
    remaining = tensors_by_name(proto.graph)
    names = {}
    for content, name in parameters.items():
        names[content] = name
        if name not in remaining:
            suffix = TRANSPOSED if name.endswith(TRANSPOSED) else ""
            sharing = metadata[name].get(PARAMETERS, "").split()
            names[content] = NAME_SEPARATOR.join(parameter + suffix for parameter in sharing) or name
    return names


def label_joined(
    proto: onnx.ModelProto, parameters: Mapping[Fingerprint, str], metadata: Mapping[str, Mapping[str, str]]
) -> None:
    """Note in each constant without metadata which parameters stand side by side in it, recognized by content.

    Args:
        parameters: content to the name of the constant that had it.
        metadata: of these constants, by name.
    """
    # The widest first: a narrow parameter may equal the first columns of a wide one.
    widths = sorted({shape[-1] for _, shape, _ in parameters}, reverse=True)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.metadata_props or array.ndim not in (1, 2) or array.dtype != np.float32:
            continue
        layout = _column_layout(array, parameters, widths)
        if layout:
            tensor.metadata_props.add(key=SIDE_BY_SIDE, value=layout)
            _join_positions(tensor, layout, metadata)


def _join_positions(tensor: onnx.TensorProto, layout: str, metadata: Mapping[str, Mapping[str, str]]) -> None:
    """Note the positions of every parameter of a joined constant."""
    joined: dict[str, object] = {}
    for entry in layout.split():
        names, _, _ = entry.rpartition("=")
        for name in names.split(NAME_SEPARATOR):
            joined |= json.loads(metadata.get(name, {}).get(POSITIONS, "{}"))
    if joined:
        tensor.metadata_props.add(key=POSITIONS, value=json.dumps(joined))


def _column_layout(array: np.ndarray, parameters: Mapping[Fingerprint, str], widths: Sequence[int]) -> str:
    """Describe the columns as `name=columns name=columns ...`; empty where some belong to no parameter."""
    entries: list[str] = []
    start = 0
    while start < array.shape[-1]:
        for width in widths:
            name = parameters.get(fingerprint(array[..., start : start + width]))
            if name:
                entries.append(f"{name}={width}")
                start += width
                break
        else:
            return ""
    return " ".join(entries)


def count_operators(proto: onnx.ModelProto, domain: str = FUSED_DOMAIN) -> dict[str, int]:
    """Count the nodes of each operator of a domain."""
    counts: Counter[str] = Counter()
    for node in proto.graph.node:
        if node.domain == domain:
            counts[node.op_type] += 1
    return dict(sorted(counts.items()))


def operator_domains(proto: onnx.ModelProto) -> set[str]:
    """Collect the domains of the operators in use; that of ONNX itself is empty."""
    domains = set[str]()
    for node in proto.graph.node:
        domains.add(node.domain.replace("ai.onnx", ""))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                domains |= operator_domains(helper.make_model(attribute.g))
    return domains
