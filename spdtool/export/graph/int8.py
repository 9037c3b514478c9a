"""Quantize a graph to int8: weights once, activations as they come or by ranges seen beforehand.

Weights are symmetric, with one scale for each column of a matrix product, so that a zero is the
integer 0 exactly. Without VNNI an x86 CPU adds pairs of products in 16 bits, which saturate: there,
weights get 7 bits ("reduce range").
"""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spdtool.data.tokens import Batch
from spdtool.errors import ModelError, first_line
from spdtool.export.graph.protobuf import inputs_of_all, keep_constants, replace_items, tensors_by_name
from spdtool.export.graph.weights import TRANSPOSED, read_metadata, restore_metadata

PRODUCTS = ("MatMul",)
LOOKUPS = ("Gather",)
# The name of a weight up to its first number: `bert.encoder.layer.3`.
LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.")


def quantize_dynamically(
    proto: onnx.ModelProto, float32_modules: Sequence[str] = (), *, reduce_range: bool = False
) -> onnx.ModelProto:
    """Quantize weights of matrix products and embeddings; activations are rounded as they come.

    Args:
        float32_modules: modules that stay in float32; see `quantizable_modules`.
        reduce_range: 7 bits for weights.

    Raises:
        ModelError: onnxruntime cannot quantize it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def write(file: Path, excluded_nodes: list[str]) -> None:
        quantize_dynamic(
            proto,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            nodes_to_exclude=excluded_nodes,
        )

    return _quantize(proto, float32_modules, write)


def quantize_statically(
    proto: onnx.ModelProto,
    batches: Iterable[Batch],
    float32_modules: Sequence[str] = (),
    *,
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """Quantize weights as `quantize_dynamically`, and activations by their smallest and largest value on `batches`.

    Only the inputs of products with a weight are rounded. The quantizer's default also rounds what
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
    remaining = iter(batches)

    class BatchReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> Batch | None:
            batch = next(remaining, None)
            if batch is None:
                return None
            return {name: batch[name] for name in names}

    def write(file: Path, excluded_nodes: list[str]) -> None:
        # With static ranges the quantizer passes over embeddings, so they are quantized first.
        quantize_dynamic(
            proto,
            file,
            op_types_to_quantize=list(LOOKUPS),
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            nodes_to_exclude=excluded_nodes,
        )
        quantize_static(
            onnx.load(file),
            file,
            BatchReader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            nodes_to_exclude=[*excluded_nodes, *_products_of_activations(proto)],
            # Else logits would be rounded too.
            extra_options={"OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
        )

    return _quantize(proto, float32_modules, write)


def quantizable_modules(proto: onnx.ModelProto) -> list[str]:
    """List what may stay in float32 alone: each layer, and each module outside the layers that has a matrix."""
    modules: dict[str, None] = {}  # as a set that is in order
    for _, matrix in _nodes_with_matrix(proto):
        modules[_module_of(matrix)] = None
    return list(modules)


def saturates() -> bool:
    """Whether this CPU adds int8 products in 16 bits, so that weights need 7; True where it cannot be told."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return False
    cpuinfo = Path("/proc/cpuinfo")  # lists avx512_vnni or avx_vnni
    # Unknown: 7 bits lose a little on any CPU, 8 bits much on the wrong one.
    return not (cpuinfo.exists() and "_vnni" in cpuinfo.read_text())


def _quantize(
    proto: onnx.ModelProto, float32_modules: Sequence[str], write: Callable[[Path, list[str]], None]
) -> onnx.ModelProto:
    """Let `write(file, excluded_nodes)` quantize the graph, and give the constants their metadata back."""
    split_gemms(proto)
    metadata = read_metadata(proto.graph.initializer)
    del proto.graph.value_info[:]  # shapes that were inferred for the weights as they were
    excluded_nodes = []
    for node, matrix in _nodes_with_matrix(proto):
        if _module_of(matrix) in float32_modules:
            excluded_nodes.append(node)
    with tempfile.TemporaryDirectory() as scratch, quiet_quantizer():
        file = Path(scratch) / "model.onnx"
        try:
            write(file, excluded_nodes)
        except Exception as error:  # its errors share no base of their own
            raise ModelError(f"onnxruntime cannot quantise this graph: {first_line(error)}") from None
        quantized = onnx.load(file)
    restore_metadata(quantized, metadata)
    del quantized.graph.value_info[:]
    return quantized


def split_gemms(proto: onnx.ModelProto) -> None:
    """Write each Gemm with a weight as MatMul and Add.

    The quantizer does so too, but transposes the weight without renaming it.
    """
    tensors = tensors_by_name(proto.graph)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        is_plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in tensors or not is_plain:
            nodes.append(node)
            continue
        weight = node.input[1]
        if options.get("transB", 0):
            weight = _transposed_constant(proto, tensors, weight)
        if len(node.input) > 2:
            product = f"{node.output[0]}_product"
            nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
            nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias"))
        else:
            nodes.append(helper.make_node("MatMul", [node.input[0], weight], [node.output[0]], name=node.name))
    replace_items(proto.graph.node, nodes)
    keep_constants(proto.graph, inputs_of_all(nodes))


def _transposed_constant(proto: onnx.ModelProto, tensors: dict[str, onnx.TensorProto], name: str) -> str:
    """Return the name of the transposed weight, which is added to the graph unless it is there."""
    transposed = name + TRANSPOSED
    if name.endswith(TRANSPOSED):
        transposed = name.removesuffix(TRANSPOSED)
    if transposed not in tensors:
        array = numpy_helper.to_array(tensors[name]).T
        tensors[transposed] = numpy_helper.from_array(np.ascontiguousarray(array), transposed)
        tensors[transposed].metadata_props.extend(tensors[name].metadata_props)
        proto.graph.initializer.append(tensors[transposed])
    return transposed


def _nodes_with_matrix(proto: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield `(node, matrix)` by name, of the nodes that the quantizer may convert."""
    tensors = tensors_by_name(proto.graph)
    for node in proto.graph.node:
        if node.op_type in (*PRODUCTS, "Gemm", *LOOKUPS):
            for name in node.input:
                tensor = tensors.get(name)
                if tensor is not None and len(tensor.dims) == 2 and tensor.metadata_props:
                    yield node.name, name


def _products_of_activations(proto: onnx.ModelProto) -> list[str]:
    """List the matrix products that read no constant."""
    constants = tensors_by_name(proto.graph).keys()
    names = []
    for node in proto.graph.node:
        if node.op_type in PRODUCTS and constants.isdisjoint(node.input):
            names.append(node.name)
    return names


def _module_of(matrix: str) -> str:
    layer = LAYER.match(matrix)
    if layer:
        return layer["layer"]
    return matrix.rpartition(".weight")[0]


@contextlib.contextmanager
def quiet_quantizer() -> Iterator[None]:
    """Keep the quantizer's advice about pre-processing from the user's terminal."""
    logger = logging.getLogger()  # the quantizer logs to the root, where nothing of ours does
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
