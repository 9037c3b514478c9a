"""Read the parameters of an ONNX file back, however a target stores them.

A constant is called after its parameter, with `.T` where it is transposed. Metadata of the constant
says more:

    parameters    the parameters that it stores, separated by spaces, where several share one constant
    packed        name=columns ..., where several matrices stand side by side in one constant (fused attention);
                  name,name=columns where equal parameters share the columns
    positions     parameter to the rows and columns that the constant has of it; all others are zero (JSON)

`NAME_quantized`, `NAME_scale` and `NAME_zero_point` are one constant in int8, as onnxruntime's
quantizer names them. A constant may be dense, or one of the graph's `sparse_initializer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.errors import ModelError
from spdtool.export.graph.protobuf import find_ancestors, keep_constants, metadata_of, tensors_by_name

if TYPE_CHECKING:
    from spdtool.models.shrink import Positions

TRANSPOSED = ".T"
PARAMETERS = "parameters"
SIDE_BY_SIDE = "packed"
POSITIONS = "positions"
NAME_SEPARATOR = ","
QUANTIZED = "_quantized"
INT8_LEVELS = 127  # int8 numbers on either side of zero
REDUCED_LEVELS = 64  # the same where weights have 7 bits
SPARSE_BYTES = 12  # bytes of one weight in a sparse constant: eight for its index, four for its value

Fingerprint = tuple[str, tuple[int, ...], bytes]


class StoredWeight(NamedTuple):
    """A parameter as a file stores it.

    Attributes:
        array: float32, in the parameter's orientation.
        storage: type of the stored numbers: `fp32`, `fp16`, `int8` or `int6`.
        scale_axis: axis of the parameter along which the scales differ; None: one scale for all.
        levels: integers on either side of zero; 127 of int8, 31 of int6.
    """

    name: str
    array: np.ndarray
    storage: str = "fp32"
    scale_axis: int | None = None
    levels: int = INT8_LEVELS


def read_weights(proto: onnx.ModelProto) -> Iterator[StoredWeight]:
    """Decode the parameters of a file, one constant at a time; a parameter that is stored twice comes twice.

    Constants that metadata does not say to be parameters are skipped.
    """
    tensors = tensors_by_name(proto.graph)
    for tensor in proto.graph.initializer:
        if tensor.metadata_props:  # scales have none: `_decode` reads them with their constant
            yield from _split_parameters(tensor, _decode(tensor, tensors))
    for sparse in proto.graph.sparse_initializer:
        yield from _split_parameters(sparse.values, StoredWeight(sparse.values.name, densify(sparse)))


def note_positions(proto: onnx.ModelProto, positions: Mapping[str, Positions]) -> None:
    """Note in each constant which rows and columns of its parameters it has, where they are not all."""
    for tensor in proto.graph.initializer:
        noted = {}
        for name in parameters_of(tensor):
            if name in positions:
                noted[name] = describe_positions(positions[name])
        if noted:
            tensor.metadata_props.add(key=POSITIONS, value=json.dumps(noted))


def describe_positions(axes: Positions) -> list[list[object]]:
    """Write positions as JSON has them: size of each axis, and ranges [start, end) along it."""
    return [[axis.size, _to_ranges(axis.live)] for axis in axes]


def expand_weight(stored: StoredWeight, axes: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> StoredWeight:
    """Put the numbers of a shrunk parameter where they are in the full one, and zeros elsewhere.

    Args:
        axes: as `describe_positions` writes them.

    Raises:
        ModelError: the positions do not fit the constant.
    """
    full = np.zeros([size for size, _ in axes], np.float32)
    indices = []
    for _, ranges in axes:
        indices.append(np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in ranges)]))
    if tuple(map(len, indices)) != stored.array.shape:
        expected = " x ".join(str(len(index)) for index in indices)
        raise ModelError(f"{stored.name} has the shape {stored.array.shape}; its positions are those of {expected}")
    full[np.ix_(*indices)] = stored.array
    return stored._replace(array=full)


def parameters_of(tensor: TensorProto) -> list[str]:
    """List the parameters that a constant stores."""
    return metadata_of(tensor).get(PARAMETERS, "").split()


def find_unread_parameters(proto: onnx.ModelProto) -> set[str]:
    """Find the parameters of whose constants none has a way to an output of the graph."""
    constants = [*proto.graph.initializer, *(sparse.values for sparse in proto.graph.sparse_initializer)]
    read_names = find_ancestors(proto.graph, (value.name for value in proto.graph.output))
    unread, read = set[str](), set[str]()
    for tensor in constants:
        (read if tensor.name in read_names else unread).update(_names_in(tensor))
    return unread - read


def _names_in(tensor: TensorProto) -> list[str]:
    """List the parameters that a constant stores, those that stand side by side in it too."""
    names = parameters_of(tensor)
    for entry in metadata_of(tensor).get(SIDE_BY_SIDE, "").split():
        columns, _, _ = entry.rpartition("=")
        names += [name.removesuffix(TRANSPOSED) for name in columns.split(NAME_SEPARATOR)]
    return names


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


def _decode(tensor: TensorProto, tensors: dict[str, TensorProto]) -> StoredWeight:
    """Decode a constant to float32; the axis is that of the constant."""
    array = numpy_helper.to_array(tensor)
    stem = tensor.name.removesuffix(QUANTIZED)
    if stem != tensor.name and f"{stem}_scale" in tensors:
        scale = numpy_helper.to_array(tensors[f"{stem}_scale"])
        zero_point = numpy_helper.to_array(tensors[f"{stem}_zero_point"])
        # In float32: the difference of two int8 numbers overflows int8.
        widened = (array.astype(np.float32) - zero_point.astype(np.float32)) * scale
        # The quantizer gives each column of a matrix product a scale of its own.
        scale_axis = array.ndim - 1 if scale.ndim else None
        # By the numbers themselves: metadata that claims 7 bits would double the step that passes.
        levels = REDUCED_LEVELS if np.abs(array.astype(np.int16)).max(initial=0) <= REDUCED_LEVELS else INT8_LEVELS
        return StoredWeight(tensor.name, widened, "int8", scale_axis, levels)
    if array.dtype == np.float16:
        return StoredWeight(tensor.name, array.astype(np.float32), "fp16")
    return StoredWeight(tensor.name, array)


def _split_parameters(tensor: TensorProto, constant: StoredWeight) -> Iterator[StoredWeight]:
    """Yield the parameters that one constant stores."""
    metadata = metadata_of(tensor)
    positions = json.loads(metadata.get(POSITIONS, "{}"))
    if SIDE_BY_SIDE in metadata:
        stored = list(_split_columns(metadata[SIDE_BY_SIDE], constant))
    else:
        stem = tensor.name.removesuffix(QUANTIZED)
        name = stem.removesuffix(TRANSPOSED)
        stored = []
        for parameter in metadata.get(PARAMETERS, name).split():
            stored.append(_oriented(parameter, constant, transposed=name != stem))
    for weight in stored:
        yield expand_weight(weight, positions[weight.name]) if weight.name in positions else weight


def _to_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Write rising numbers as ranges [start, end)."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] = number + 1
        else:
            ranges.append([number, number + 1])
    return ranges


def _split_columns(layout: str, constant: StoredWeight) -> Iterator[StoredWeight]:
    """Yield the parameters that stand side by side in one constant; `layout` is `name=columns name=columns ...`."""
    start = 0
    for entry in layout.split():
        column_names, _, columns = entry.rpartition("=")
        end = start + int(columns)
        selected = constant._replace(array=constant.array[..., start:end])
        for column_name in column_names.split(NAME_SEPARATOR):
            name = column_name.removesuffix(TRANSPOSED)
            yield _oriented(name, selected, transposed=name != column_name)
        start = end


def _oriented(name: str, constant: StoredWeight, *, transposed: bool) -> StoredWeight:
    """Name the constant after its parameter, in the parameter's orientation."""
    if not transposed:
        return constant._replace(name=name)
    scale_axis = None if constant.scale_axis is None else 1 - constant.scale_axis
    return constant._replace(name=name, array=constant.array.T, scale_axis=scale_axis)
