"""Read the parameters of an ONNX file back, however a target stores them.

A constant is called after its parameter, with `.T` where it is transposed. Metadata of the constant
says more:

    parameters    the parameters that it stores, separated by spaces, where several share one constant
    packed        name=columns ..., where several matrices stand side by side in one constant (fused attention)

`NAME_quantized`, `NAME_scale` and `NAME_zero_point` are one constant in int8, as onnxruntime's
quantizer names them. A constant may be dense, or one of the graph's `sparse_initializer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.export.graph.protobuf import keep_constants, metadata_of, tensors_by_name

TRANSPOSED = ".T"
PARAMETERS = "parameters"
SIDE_BY_SIDE = "packed"
QUANTIZED = "_quantized"
FP16_HALF_STEP = 2.0**-11  # as a share of a normal number
LEAST_FP16 = 6e-8  # a weight that is not zero never becomes zero by rounding, but the least number there is
SPARSE_BYTES = 12  # bytes of one weight in a sparse constant: eight for its index, four for its value

Fingerprint = tuple[str, tuple[int, ...], bytes]


class StoredWeight(NamedTuple):
    """A parameter as a file stores it.

    Attributes:
        array: float32, in the parameter's orientation.
        largest_error: what its storage format may round, for each weight or for all.
    """

    name: str
    array: np.ndarray
    largest_error: np.ndarray | float


def read_weights(proto: onnx.ModelProto, *, parameters_only: bool = False) -> Iterator[StoredWeight]:
    """Decode the constants of a file, one at a time; a parameter that is stored twice comes twice.

    Args:
        parameters_only: skip constants that metadata does not say to be parameters.
    """
    tensors = tensors_by_name(proto.graph)
    for tensor in proto.graph.initializer:
        # `_decode` reads these together with the constant that they belong to.
        is_scale = tensor.name.endswith(("_scale", "_zero_point"))
        if not is_scale and (tensor.metadata_props or not parameters_only):
            array, largest_error = _decode(tensor, tensors)
            yield from _split_parameters(tensor, array, largest_error)
    for sparse in proto.graph.sparse_initializer:
        yield from _split_parameters(sparse.values, densify(sparse), 0.0)


def read_parameters(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(parameter, float32 array)` of every parameter in a file, each once."""
    names = set[str]()
    for name, array, _ in read_weights(onnx.load(file), parameters_only=True):
        if name not in names:
            names.add(name)
            yield name, array


def count_file_zeros(file: Path) -> dict[str, tuple[int, int]]:
    """Count `(zeros, size)` of every parameter in an ONNX file; one that is stored twice has the fewer zeros."""
    counts: dict[str, tuple[int, int]] = {}
    for name, array, _ in read_weights(onnx.load(file)):
        count = (int(array.size - np.count_nonzero(array)), int(array.size))
        # The fewer zeros: one copy that lost its zeros is a fault, whatever the other one has.
        counts[name] = min(counts.get(name, count), count)
    return counts


def fingerprint(array: np.ndarray) -> Fingerprint:
    """Type, shape and hash of an array, which identify a constant whatever it is called."""
    return array.dtype.str, array.shape, hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()


def read_metadata(tensors: Iterable[TensorProto]) -> dict[str, dict[str, str]]:
    """Map the name of each constant to its metadata, so that it survives a pass that loses it."""
    return {tensor.name: metadata_of(tensor) for tensor in tensors}


def restore_metadata(proto: onnx.ModelProto, metadata: dict[str, dict[str, str]]) -> None:
    """Put the metadata back; a constant in int8 gets that of the constant from which it was made."""
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
        for key, value in metadata.get(tensor.name.removesuffix(QUANTIZED), {}).items():
            tensor.metadata_props.add(key=key, value=value)


def densify(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """Expand a sparse constant whose indices count over the flattened array."""
    array = np.zeros(tuple(sparse.dims), np.float32)
    array.reshape(-1)[numpy_helper.to_array(sparse.indices)] = numpy_helper.to_array(sparse.values)
    return array


def use_sparse_constants(proto: onnx.ModelProto) -> int:
    """Store each float32 matrix as a sparse constant where that takes fewer bytes; return how many there are.

    Two thirds of a matrix have to be zeros before it pays.
    """
    dense_names = set[str]()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        live = np.flatnonzero(array)
        is_matrix = array.dtype == np.float32 and array.ndim == 2
        if not is_matrix or not live.size or SPARSE_BYTES * live.size >= array.nbytes:
            dense_names.add(tensor.name)
            continue
        # The name and metadata of a sparse constant are those of its values.
        values = numpy_helper.from_array(np.ascontiguousarray(array.reshape(-1)[live]), tensor.name)
        values.metadata_props.extend(tensor.metadata_props)
        indices = numpy_helper.from_array(live.astype(np.int64), f"{tensor.name}_indices")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
    keep_constants(proto.graph, dense_names)
    return len(proto.graph.sparse_initializer)


def _decode(tensor: TensorProto, tensors: dict[str, TensorProto]) -> tuple[np.ndarray, np.ndarray | float]:
    """Decode a constant to float32, with the largest rounding error of each weight."""
    array = numpy_helper.to_array(tensor)
    stem = tensor.name.removesuffix(QUANTIZED)
    if stem != tensor.name and f"{stem}_scale" in tensors:
        scale = numpy_helper.to_array(tensors[f"{stem}_scale"])
        zero_point = numpy_helper.to_array(tensors[f"{stem}_zero_point"])
        widened = (array.astype(np.float32) - zero_point.astype(np.float32)) * scale
        # Half a step; there is one scale for each column of a matrix product.
        return widened, np.broadcast_to(scale / 2, array.shape)
    if array.dtype == np.float16:
        widened = array.astype(np.float32)
        return widened, np.abs(widened) * FP16_HALF_STEP + LEAST_FP16
    return array, 0.0


def _split_parameters(
    tensor: TensorProto, array: np.ndarray, largest_error: np.ndarray | float
) -> Iterator[StoredWeight]:
    """Yield the parameters that one constant stores."""
    metadata = metadata_of(tensor)
    if SIDE_BY_SIDE in metadata:
        yield from _split_columns(metadata[SIDE_BY_SIDE], array, largest_error)
        return
    stem = tensor.name.removesuffix(QUANTIZED)
    name = stem.removesuffix(TRANSPOSED)
    for parameter in metadata.get(PARAMETERS, name).split():
        yield _oriented(parameter, array, largest_error, transposed=name != stem)


def _split_columns(layout: str, array: np.ndarray, largest_error: np.ndarray | float) -> Iterator[StoredWeight]:
    """Yield the parameters that stand side by side in one constant; `layout` is `name=columns name=columns ...`."""
    start = 0
    for entry in layout.split():
        constant, _, columns = entry.rpartition("=")
        end = start + int(columns)
        name = constant.removesuffix(TRANSPOSED)
        error = largest_error if isinstance(largest_error, float) else largest_error[..., start:end]
        yield _oriented(name, array[..., start:end], error, transposed=name != constant)
        start = end


def _oriented(name: str, array: np.ndarray, largest_error: np.ndarray | float, *, transposed: bool) -> StoredWeight:
    if not transposed:
        return StoredWeight(name, array, largest_error)
    if isinstance(largest_error, float):
        return StoredWeight(name, array.T, largest_error)
    return StoredWeight(name, array.T, largest_error.T)
