"""The packed form of one matrix: the values that are not zero, and how many zeros lie before each.

    blob = pack("encoder.layer.0.output.dense.weight", array, "fp16")
    array = unpack(blob)

Version 1, little endian. A header of 64 bytes, then scales, values and positions with nothing between them:

     0  4 bytes  b"SPDM"
     4  u8       version, 1
     5  u8       type of the values: 0 float32, 1 float16, 2 int8 (times the scale of the row)
     6  u8       gap bits k: 0: every value is stored and there are no positions; 1 to 8: only values that are not zero
     7  u8       0
     8  u32      rows        12  u32  columns; a vector is one row
    16  u64      stored values
    24  u64      bytes of positions
    32  u32      crc32 of the header, with this field 0, and then of what follows it
    36  zeros

    scales     float32 [rows], for int8 only
    values     in row-major order
    positions  for each stored value the number of zeros skipped since the one before it, over the flattened matrix,
               in fields of k bits, least significant bit first. With m = 2^k - 1, a gap g is g // m fields of m ("skip
               m zeros and go on"), then one field of g % m. Zeros after the last stored value are not written.

k = 1 is a bitmask, with a 1 for each zero. k is the one that gives the fewest bytes. A weight that is not zero never
becomes zero by rounding: it takes the least float16, or 1 as int8. Vectors are always float32, every value stored.

Nothing here needs more than numpy: the processes that `spdtool bench` times read packed matrices.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from spdtool.errors import ModelError

MAGIC = b"SPDM"
VERSION = 1
HEADER = struct.Struct("<4sBBBBIIQQI28s")
CRC_AT = 32
TYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1")}
LARGEST_GAP_BITS = 8
MOST_WEIGHTS = 2**30  # of one matrix: a damaged header must not make a reader ask for terabytes
INT8_LIMIT = 127
LEAST_FP16 = np.float16(2.0**-24)
LEAST_FP32 = np.float32(2.0**-149)
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(INT8_LIMIT), np.float32(0))

Packed = bytes | bytearray | memoryview | np.ndarray
"""A packed matrix: bytes, or a uint8 array."""


class PackingError(ModelError):
    """A matrix that cannot be packed, or a packed one that is damaged."""


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes say: shape, type of the values, bits of a gap, and how much follows."""

    rows: int
    columns: int
    values: str
    gap_bits: int
    stored: int
    position_bytes: int
    crc: int

    @property
    def size(self) -> int:
        """Weights of the matrix, zeros included."""
        return self.rows * self.columns

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of the rows."""
        return 4 * self.rows if self.values == "int8" else 0

    @property
    def value_bytes(self) -> int:
        """Bytes of the stored values."""
        return self.stored * TYPES[self.values].itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole, header included."""
        return HEADER.size + self.scale_bytes + self.value_bytes + self.position_bytes


def pack(name: str, array: np.ndarray, values: str, *, table: bool = False) -> np.ndarray:
    """The packed form, uint8, of a matrix [out, in] or a vector.

    Args:
        name: the parameter's name, for errors.
        values: `fp32` (without loss), `fp16` or `int8` (one scale a row); a vector is always stored as `fp32`.
        table: store every value, zeros too: rows of an embedding table are looked up in the packed form as it is.

    Raises:
        PackingError: a weight is not finite or too large for the type, or the array is empty, or neither of the two.
    """
    if array.ndim not in (1, 2) or not 0 < array.size <= MOST_WEIGHTS:
        raise PackingError(f"{name}: an array of shape {array.shape} cannot be packed")
    matrix = np.ascontiguousarray(np.atleast_2d(array), dtype=np.float32)
    vector = array.ndim == 1
    stored, scales = rounded(name, matrix, "fp32" if vector else values)
    flat = stored.reshape(-1)
    gap_bits, positions = (0, b"") if vector or table else _positions(flat)
    payload = b"".join(
        (
            b"" if scales is None else scales.astype("<f4").tobytes(),
            (flat[flat != 0] if gap_bits else flat).tobytes(),
            positions,
        )
    )
    count = int(np.count_nonzero(flat)) if gap_bits else flat.size
    code = list(TYPES.values()).index(stored.dtype)
    fields = (MAGIC, VERSION, code, gap_bits, 0, *matrix.shape, count, len(positions))
    crc = zlib.crc32(payload, zlib.crc32(HEADER.pack(*fields, 0, b"")))
    return np.frombuffer(HEADER.pack(*fields, crc, b"") + payload, dtype=np.uint8)


def header(data: Packed, name: str = "packed matrix") -> Header:
    """Read the header and hold it against the number of bytes; the values are not looked at.

    Raises:
        PackingError: it is no packed matrix of version 1, its counts contradict each other, or it is cut short.
    """
    view = _view(data, name)
    if len(view) < HEADER.size:
        raise PackingError(f"{name}: {len(view)} bytes are less than a header of {HEADER.size}")
    magic, version, code, gap_bits, reserved, rows, columns, stored, position_bytes, crc, rest = HEADER.unpack_from(
        view
    )
    if magic != MAGIC:
        raise PackingError(f"{name}: not a packed matrix; it starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise PackingError(
            f"{name}: packed form {version}; this spdtool-sparse-cpu reads form {VERSION}", "export the model again"
        )
    if code >= len(TYPES) or gap_bits > LARGEST_GAP_BITS or reserved or any(rest):
        raise PackingError(f"{name}: the header is damaged")
    found = Header(rows, columns, list(TYPES)[code], gap_bits, stored, position_bytes, crc)
    if not 0 < found.size <= MOST_WEIGHTS:
        raise PackingError(f"{name}: {rows} x {columns} weights cannot be")
    every = found.size if gap_bits == 0 else stored
    if stored != every or stored > found.size or (position_bytes > 0) != (gap_bits > 0 and stored > 0):
        raise PackingError(
            f"{name}: {stored} values and {position_bytes} bytes of positions do not make {rows} x {columns} weights"
        )
    if found.total_bytes != len(view):
        raise PackingError(f"{name}: {len(view)} bytes instead of {found.total_bytes}", "copy the file again")
    return found


def unpack(data: Packed, name: str = "packed matrix") -> np.ndarray:
    """The matrix, float32 [rows, columns]; a vector is one row.

    Raises:
        PackingError: anything in it is damaged.
    """
    found, view = header(data, name), _view(data, name)
    blank = view[:CRC_AT].tobytes() + bytes(4) + view[CRC_AT + 4 : HEADER.size].tobytes()
    if zlib.crc32(view[HEADER.size :], zlib.crc32(blank)) != found.crc:
        raise PackingError(f"{name}: the checksum does not match", "the file is damaged: copy it again")
    scales_end = HEADER.size + found.scale_bytes
    values_end = scales_end + found.value_bytes
    values = np.frombuffer(view[scales_end:values_end], TYPES[found.values])
    if found.gap_bits == 0:
        matrix = values.astype(np.float32)
    else:
        if np.count_nonzero(values) != values.size:
            raise PackingError(f"{name}: a stored value is zero")
        matrix = np.zeros(found.size, np.float32)
        matrix[_indices(found, view[values_end:], name)] = values
    matrix = matrix.reshape(found.rows, found.columns)
    if found.values == "int8":
        scales = np.frombuffer(view[HEADER.size : scales_end], "<f4")
        if not (scales > 0).all():
            raise PackingError(f"{name}: a scale is not above zero")
        with np.errstate(over="ignore", invalid="ignore"):
            matrix *= scales[:, None]
    if not np.isfinite(matrix).all():
        raise PackingError(f"{name}: a weight is not finite")
    return matrix


def rounded(name: str, matrix: np.ndarray, values: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The float32 matrix as the type `values` holds it, and for int8 the scale of each row.

    What is zero stays zero, and nothing else becomes zero.

    Raises:
        PackingError: a weight is not finite, or too large for the type.
    """
    if not np.isfinite(matrix).all():
        raise PackingError(f"{name}: a weight is not finite", "the checkpoint is damaged, or training diverged")
    if values == "fp32":
        return matrix.astype(TYPES[values], copy=False), None
    if values == "fp16":
        return _half(name, matrix), None
    largest = np.abs(matrix).max(axis=1)
    scales = np.clip(largest / np.float32(INT8_LIMIT), LEAST_FP32, LARGEST_SCALE)
    scales[largest == 0] = 1
    whole = np.clip(np.rint(matrix / scales[:, None]), -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
    lost = (whole == 0) & (matrix != 0)
    whole[lost] = np.sign(matrix[lost])
    return whole, scales


def _half(name: str, matrix: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        half = matrix.astype(TYPES["fp16"])
    if not np.isfinite(half).all():
        raise PackingError(
            f"{name}: the weight {float(matrix.flat[np.abs(matrix).argmax()]):g} is too large for float16",
            "store it as fp32: --set export.values=fp32 (a table: export.embeddings=fp32)",
        )
    lost = (half == 0) & (matrix != 0)
    half[lost] = np.copysign(LEAST_FP16, matrix[lost])
    return half


def _positions(flat: np.ndarray) -> tuple[int, bytes]:
    """The gap bits that give the fewest bytes, and the positions; `(0, b"")` where storing every value is smaller."""
    live = flat != 0
    saved = (flat.size - int(np.count_nonzero(live))) * flat.itemsize
    if -(-int(np.count_nonzero(live)) // 8) >= saved:  # a bit for each value already costs as much as it saves
        return 0, b""
    gaps = np.diff(np.flatnonzero(live), prepend=-1) - 1
    sizes = {k: -(-k * (gaps.size + int((gaps // (2**k - 1)).sum())) // 8) for k in range(1, LARGEST_GAP_BITS + 1)}
    best = min(sizes, key=sizes.__getitem__)
    return (best, _fields(gaps, best)) if sizes[best] < saved else (0, b"")


def _fields(gaps: np.ndarray, bits: int) -> bytes:
    """The gaps as fields of `bits` bits."""
    top = 2**bits - 1
    ends = np.cumsum(gaps // top + 1) - 1
    fields = np.full(int(ends[-1]) + 1 if gaps.size else 0, top, np.uint8)
    fields[ends] = gaps % top
    spread = np.empty((fields.size, bits), np.uint8)
    for bit in range(bits):
        spread[:, bit] = (fields >> bit) & 1
    return np.packbits(spread.reshape(-1), bitorder="little").tobytes()


def _indices(found: Header, positions: memoryview, name: str) -> np.ndarray:
    """Where each stored value belongs in the flattened matrix, int64 [stored], ascending."""
    bits, top = found.gap_bits, 2**found.gap_bits - 1
    stream = np.unpackbits(np.frombuffer(positions, np.uint8), bitorder="little")
    count = stream.size // bits
    fields = np.zeros(count, np.uint8)
    for bit in range(bits):
        fields |= stream[bit : count * bits : bits] << np.uint8(bit)
    ends = np.flatnonzero(fields != top)[: found.stored]
    if ends.size < found.stored:
        raise PackingError(f"{name}: the positions end after {ends.size} of {found.stored} values")
    used = (int(ends[-1]) + 1) * bits if ends.size else 0
    if -(-used // 8) != len(positions) or stream[used:].any():
        raise PackingError(f"{name}: there are more positions than values")
    indices = (np.cumsum(fields, dtype=np.int64)[ends] + np.arange(found.stored)).astype(np.int64, copy=False)
    if indices.size and indices[-1] >= found.size:
        raise PackingError(f"{name}: the positions run out of the matrix")
    return indices


def _view(data: Packed, name: str) -> memoryview:
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise PackingError(f"{name}: a packed matrix is a vector of bytes, not {data.dtype} {data.shape}")
        return np.ascontiguousarray(data).data.cast("B")
    return memoryview(data).cast("B")
