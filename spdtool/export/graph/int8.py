"""The graph in int8: weights rounded once, activations as they come or by ranges seen beforehand.

Weights are symmetric, with one scale for each column of a matrix product, so that a zero is the integer 0 exactly.
Without VNNI an x86 CPU adds pairs of products in 16 bits, which saturate: there, weights get 7 bits.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spdtool.data.tokens import Batch
from spdtool.errors import ModelError, first_line
from spdtool.export.graph.weights import TRANSPOSED, annotate, notes

PRODUCTS = ("MatMul",)
TABLES = ("Gather",)
LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.")


def quantise(proto: onnx.ModelProto, keep: Sequence[str] = (), *, reduce_range: bool = False) -> onnx.ModelProto:
    """Weights of matrix products and embeddings in int8; activations are rounded as they come.

    Args:
        keep: parts of the model that stay in float32; see `parts`.
        reduce_range: 7 bits.

    Raises:
        ModelError: onnxruntime cannot quantise it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def write(file: Path, options: dict[str, Any]) -> None:
        quantize_dynamic(proto, file, weight_type=QuantType.QInt8, **options)

    return _quantised(proto, keep, write, {"per_channel": True, "reduce_range": reduce_range})


def calibrate(
    proto: onnx.ModelProto, batches: Iterable[Batch], keep: Sequence[str] = (), *, reduce_range: bool = False
) -> onnx.ModelProto:
    """Weights in int8, and activations by their least and largest value on `batches`; else as `quantise`.

    What goes into a product with a weight is rounded, as in `quantise`. Left to itself the quantiser also rounds what
    comes out of each product, logits included, and both sides of the attention's own.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    names = [value.name for value in proto.graph.input]
    rows = iter([{name: batch[name] for name in names} for batch in batches])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(rows, None)

    def write(file: Path, options: dict[str, Any]) -> None:
        quantize_dynamic(proto, file, op_types_to_quantize=list(TABLES), weight_type=QuantType.QInt8, **options)
        with_tables = onnx.load(file)  # with static ranges the quantiser passes over embeddings
        options["nodes_to_exclude"] += _unweighted(proto)
        quantize_static(
            with_tables,
            file,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
            **options,
        )

    return _quantised(proto, keep, write, {"per_channel": True, "reduce_range": reduce_range})


def parts(proto: onnx.ModelProto) -> list[str]:
    """What may stay in float32 alone: each layer, and each module outside the layers that has a matrix."""
    return list(dict.fromkeys(_part(name) for _, name in _weighted(proto)))


def saturates() -> bool:
    """Whether this CPU adds int8 products in 16 bits, so that weights should have 7; True where it cannot be told."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return not (cpuinfo.exists() and "_vnni" in cpuinfo.read_text())


def _quantised(proto: onnx.ModelProto, keep: Sequence[str], write: Any, options: dict[str, Any]) -> onnx.ModelProto:
    unfold(proto)
    known = notes(proto.graph.initializer)
    del proto.graph.value_info[:]  # shapes that were inferred for the weights as they were
    options["nodes_to_exclude"] = [node for node, name in _weighted(proto) if _part(name) in keep]
    with tempfile.TemporaryDirectory() as scratch, quiet():
        file = Path(scratch) / "model.onnx"
        try:
            write(file, options)
        except Exception as error:  # its errors share no base of their own
            raise ModelError(f"onnxruntime cannot quantise this graph: {first_line(error)}") from None
        found = onnx.load(file)
    annotate(found, known)
    del found.graph.value_info[:]
    return found


def unfold(proto: onnx.ModelProto) -> None:
    """Write each Gemm with a weight as MatMul and Add: the quantiser does so too, and turns the weight over unsaid."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        facts = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = facts.get("alpha", 1.0) == facts.get("beta", 1.0) == 1.0 and not facts.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in tensors or not plain:
            nodes.append(node)
            continue
        weight = _upright(proto, tensors, node.input[1]) if facts.get("transB", 0) else node.input[1]
        biased = len(node.input) > 2
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _upright(proto: onnx.ModelProto, tensors: dict[str, onnx.TensorProto], name: str) -> str:
    """The name of the transposed weight, which is added to the graph unless it is there."""
    turned = name.removesuffix(TRANSPOSED) if name.endswith(TRANSPOSED) else name + TRANSPOSED
    if turned not in tensors:
        array = numpy_helper.to_array(tensors[name]).T
        tensors[turned] = numpy_helper.from_array(np.ascontiguousarray(array), turned)
        tensors[turned].metadata_props.extend(tensors[name].metadata_props)
        proto.graph.initializer.append(tensors[turned])
    return turned


def _weighted(proto: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """`(node, matrix)` of the nodes that the quantiser may take up."""
    matrices = {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 2 and tensor.metadata_props}
    for node in proto.graph.node:
        if node.op_type in (*PRODUCTS, "Gemm", *TABLES):
            yield from ((node.name, name) for name in node.input if name in matrices)


def _unweighted(proto: onnx.ModelProto) -> list[str]:
    """Products of two activations."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return [node.name for node in proto.graph.node if node.op_type in PRODUCTS and not constants & {*node.input}]


def _part(matrix: str) -> str:
    layer = LAYER.match(matrix)
    return layer["layer"] if layer else matrix.rpartition(".weight")[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantiser's advice about pre-processing from the user's terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
