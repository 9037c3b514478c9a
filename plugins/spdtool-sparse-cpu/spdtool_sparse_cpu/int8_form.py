"""Check a file with matrices in int8 blocks: its graph in float32, and its arithmetic against `spdtool.models.int8`.

The arithmetic is checked twice. Each matrix alone has to give the products of the definition, up to the order of
float32 sums. Of the whole model no more can be asked than that it stays within the noise of rounding: a value that lies
between two steps falls to either side by the last bit of what comes before it, and after some layers two correct
engines differ by as much as either differs from float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from transformers import PreTrainedModel

from spdtool.data.tokens import Batch
from spdtool.errors import GateError
from spdtool.export.gates.logits import measure_deviation
from spdtool.export.graph.weights import parameters_of
from spdtool.export.onnx_session import open_session
from spdtool.models.int8 import RoundedRows, multiply_rounded, use_int8_attention, use_int8_products
from spdtool.models.predict import Forward, torch_forward
from spdtool_sparse_cpu import packing
from spdtool_sparse_cpu.library import DOMAIN

PRODUCT_TOKENS = 37  # one tile and a part of the next, whatever the width of the vectors
PRODUCT_TOLERANCE = 1e-5  # of a product's largest value: few sums of float32
# Times the change by rounding. Two engines whose roundings have nothing in common any more are sqrt(2) of it apart.
LARGEST_NOISE = 2.0
LEAST_NOISE = 1e-4  # of the logits' size; where rounding moves nothing, float32 still does
REFERENCE_TOKENS = 1024  # of a batch: the reference multiplies in float64


def packed_blocks(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, np.ndarray]]:
    """Yield the constants that hold a matrix in blocks, and their bytes.

    Raises:
        PackingError: one is damaged.
    """
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.UINT8 and parameters_of(tensor):
            packed = numpy_helper.to_array(tensor)
            if packing.read_header(packed, tensor.name).block_bits:
                yield tensor, packed


def use_single_weights(proto: onnx.ModelProto) -> None:
    """Store matrices in blocks as single float32 weights, in place: the operators then multiply in float32."""
    for tensor, packed in packed_blocks(proto):
        single = packing.pack(tensor.name, packing.unpack(packed, tensor.name), "fp32")
        tensor.raw_data = single.tobytes()
        tensor.dims[0] = single.size


def check_products(file: Path, libraries: list[Path]) -> None:
    """Compare the product of each matrix in blocks, on random tokens, with the definition.

    Raises:
        GateError: names the matrix whose product differs.
    """
    random = np.random.default_rng(0)
    nodes, inputs, outputs, constants = [], {}, [], []
    expected: dict[str, np.ndarray] = {}
    for index, (tensor, packed) in enumerate(packed_blocks(onnx.load(file))):
        rows = _read_rounded(packed, tensor.name)
        outputs_count, inputs_count = rows.values.shape
        x = random.normal(0.5, 2, (PRODUCT_TOKENS, inputs_count)).astype(np.float32)
        bias = random.normal(size=outputs_count).astype(np.float32)
        names = [f"x{index}", f"weight{index}", f"bias{index}"]
        nodes.append(helper.make_node("SparseLinear", names, [tensor.name], domain=DOMAIN, activation="none"))
        constants += [numpy_helper.from_array(packed, names[1]), numpy_helper.from_array(bias, names[2])]
        inputs[names[0]] = x
        outputs.append(helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, None))
        expected[tensor.name] = multiply_rounded(torch.from_numpy(x), rows, torch.from_numpy(bias)).numpy()
    if not nodes:
        return
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
    graph = helper.make_graph(nodes, "products", values, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = open_session(model.SerializeToString(), threads=1, libraries=libraries)
    for name, product in zip(expected, session.run(list(expected), inputs), strict=True):
        difference = float(np.abs(product - expected[name]).max())
        if not difference <= PRODUCT_TOLERANCE * float(np.abs(expected[name]).max()):
            raise GateError(f"{name}: its int8 product differs from the definition by {difference:.2g}")


def check_model(file: Path, model: PreTrainedModel, session: Forward, batches: Iterable[tuple[str, Batch]]) -> None:
    """Compare the logits of a file with those of int8 products and attention in torch.

    Args:
        model: filled with the stored weights; it is changed.

    Raises:
        GateError: they differ by more than rounding does.
    """
    short_batches = [(description, _shorten(batch)) for description, batch in batches]
    float32_logits = [torch_forward(model, "cpu")(batch) for _, batch in short_batches]
    names: list[str] = []
    proto = onnx.load(file)
    for tensor, _ in packed_blocks(proto):
        names += parameters_of(tensor)
    use_int8_products(model, names)
    limit = LARGEST_NOISE
    attends = any(node.op_type == "SparseEncoder" and not _kind_of(node) for node in proto.graph.node)
    if attends and not use_int8_attention(model):
        limit *= 2  # the file rounds attention as well, and the reference does not
    reference = torch_forward(model, "cpu")
    recorded = iter(float32_logits)
    noise = measure_deviation(lambda _: next(recorded), reference, short_batches).relative
    deviation = measure_deviation(reference, session, short_batches).relative
    if not deviation <= limit * noise + LEAST_NOISE:
        raise GateError(
            f"int8 logits differ from their definition by {deviation:.2%} of their size; "
            f"rounding itself changes {noise:.2%}"
        )


def _kind_of(encoder: onnx.NodeProto) -> str:
    """Return the kind of an encoder's layers; empty for that of BERT, which adds nothing to the scores."""
    return next((attribute.s.decode() for attribute in encoder.attribute if attribute.name == "kind"), "")


def _read_rounded(packed: np.ndarray, name: str) -> RoundedRows:
    """Read the integers and scales of a packed matrix in blocks."""
    header, weight = packing.read_header(packed, name), packing.unpack(packed, name)
    start = packing.HEADER.size
    scales = np.frombuffer(packed[start : start + header.scale_bytes].tobytes(), "<f4")
    values = np.rint(weight / scales[:, None]).astype(np.int8)
    return RoundedRows(torch.from_numpy(values), torch.from_numpy(scales.copy()))


def _shorten(batch: Batch) -> Batch:
    """Cut a batch to rows of at most `REFERENCE_TOKENS` tokens together, but at least one row."""
    rows = max(1, REFERENCE_TOKENS // batch["input_ids"].shape[1])
    return {name: column[:rows] for name, column in batch.items()}
