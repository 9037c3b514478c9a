"""What an ONNX file holds, parameter by parameter, however a target stores it.

A constant has the name of its parameter, with `.T` where it is transposed. Metadata of the constant says more:

    parameters    the parameters that it holds, separated by spaces, where several share one constant
    packed        name=columns ..., where several matrices stand side by side in one constant (fused attention)

`NAME_quantized`, `NAME_scale` and `NAME_zero_point` are one constant in int8, as onnxruntime's quantiser names them. A
constant may be dense, or one of the graph's `sparse_initializer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TRANSPOSED = ".T"
PARAMETERS = "parameters"
PACKED = "packed"
QUANTISED = "_quantized"
HALF_ULP = 2.0**-11  # of float16, as a share of a normal number
LEAST_HALF = 6e-8  # a live weight is never rounded to 0, but up to the least number there is


Fingerprint = tuple[str, tuple[int, ...], bytes]


class Held(NamedTuple):
    """A parameter as a file holds it: name, float32 array in the parameter's orientation, largest rounding error."""

    name: str
    array: np.ndarray
    error: np.ndarray | float


def held(proto: onnx.ModelProto, *, known: bool = False) -> Iterator[Held]:
    """Every constant in the file, one at a time; a parameter that the file holds twice comes twice.

    Args:
        known: only constants that metadata says to be parameters.
    """
    dense = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        if not tensor.name.endswith(("_scale", "_zero_point")) and (tensor.metadata_props or not known):
            yield from _parameters(tensor, *_values(tensor, dense))
    for sparse in proto.graph.sparse_initializer:
        yield from _parameters(sparse.values, densify(sparse), 0.0)


def fingerprint(array: np.ndarray) -> Fingerprint:
    """Type, shape and hash of the bytes: what tells one constant from another whatever they are called."""
    return array.dtype.str, array.shape, hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()


def audit(file: Path) -> dict[str, tuple[int, int]]:
    """`(zeros, size)` of every parameter in an ONNX file; of one that the file holds twice, the fewest zeros."""
    counts: dict[str, tuple[int, int]] = {}
    for name, array, _ in held(onnx.load(file)):
        found = (int(array.size - np.count_nonzero(array)), int(array.size))
        counts[name] = min(counts.get(name, found), found)
    return counts


def notes(tensors: Iterable[TensorProto]) -> dict[str, dict[str, str]]:
    """Name of a constant to its metadata, for whatever pass loses it."""
    return {tensor.name: {entry.key: entry.value for entry in tensor.metadata_props} for tensor in tensors}


def annotate(proto: onnx.ModelProto, known: dict[str, dict[str, str]]) -> None:
    """Give the constants their metadata back; those in int8 have that of the constant that they were made of."""
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
        for key, value in known.get(tensor.name.removesuffix(QUANTISED), {}).items():
            tensor.metadata_props.add(key=key, value=value)


def densify(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """The array of a sparse constant whose indices are into the flattened array."""
    array = np.zeros(tuple(sparse.dims), np.float32)
    array.reshape(-1)[numpy_helper.to_array(sparse.indices)] = numpy_helper.to_array(sparse.values)
    return array


def thin(proto: onnx.ModelProto) -> int:
    """Store each float32 matrix as a sparse constant where that takes fewer bytes; how many there are then.

    An index takes eight bytes and a weight four, so that two thirds of a matrix have to be zeros before it pays.
    """
    kept, count = [], 0
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        live = np.flatnonzero(array)
        if array.dtype != np.float32 or array.ndim != 2 or 12 * live.size >= array.nbytes or not live.size:
            kept.append(tensor)
            continue
        values = numpy_helper.from_array(np.ascontiguousarray(array.reshape(-1)[live]), tensor.name)
        values.metadata_props.extend(tensor.metadata_props)
        indices = numpy_helper.from_array(live.astype(np.int64), f"{tensor.name}_indices")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
        count += 1
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return count


def _values(tensor: TensorProto, dense: dict[str, TensorProto]) -> tuple[np.ndarray, np.ndarray | float]:
    """A constant in float32 and its largest rounding error; of int8, half a step of its own scale."""
    array = numpy_helper.to_array(tensor)
    stem = tensor.name.removesuffix(QUANTISED)
    if stem == tensor.name or f"{stem}_scale" not in dense:
        if array.dtype == np.float16:
            return array.astype(np.float32), np.abs(array.astype(np.float32)) * HALF_ULP + LEAST_HALF
        return array, 0.0
    scale, zero = (numpy_helper.to_array(dense[f"{stem}_{part}"]) for part in ("scale", "zero_point"))
    # one scale a column of a matrix product
    return (array.astype(np.float32) - zero.astype(np.float32)) * scale, np.broadcast_to(scale / 2, array.shape)


def _parameters(tensor: TensorProto, array: np.ndarray, error: np.ndarray | float) -> Iterator[Held]:
    said = {entry.key: entry.value for entry in tensor.metadata_props}
    if PACKED in said:
        yield from _packed(said[PACKED], array, error)
        return
    stem = tensor.name.removesuffix(QUANTISED)
    name = stem.removesuffix(TRANSPOSED)
    for parameter in said[PARAMETERS].split() if PARAMETERS in said else [name]:
        yield _turned(parameter, array, error, turn=name != stem)


def _packed(text: str, array: np.ndarray, error: np.ndarray | float) -> Iterator[Held]:
    start = 0
    for entry in text.split():
        constant, _, columns = entry.rpartition("=")
        place = np.s_[..., start : start + int(columns)]
        start += int(columns)
        name = constant.removesuffix(TRANSPOSED)
        yield _turned(name, array[place], error if isinstance(error, float) else error[place], turn=name != constant)


def _turned(name: str, array: np.ndarray, error: np.ndarray | float, *, turn: bool) -> Held:
    if not turn:
        return Held(name, array, error)
    return Held(name, array.T, error if isinstance(error, float) else error.T)
