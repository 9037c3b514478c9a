"""Pack one matrix: store the values that are not zero, and how many zeros precede each.

    blob = pack("encoder.layer.0.output.dense.weight", array, "fp16")
    array = unpack(blob)

Version 1, little endian. A header of 64 bytes, then scales, values and positions with nothing
between them:

     0  4 bytes  b"SPDM"
     4  u8       version, 1
     5  u8       type of the values: 0 float32, 1 float16, 2 int8, 3 int6 (both times the scale of the row)
     6  u8       gap bits k. 0: every value is stored, and there are no positions;
                             1 to 8: only values that are not zero are stored
     7  u8       block bits b. 0: single weights; 2, for int8 alone: weights come in blocks of four
                             consecutive inputs of a row, which are stored whole
     8  u32      rows        12  u32  columns; a vector is one row
    16  u64      stored values
    24  u64      bytes of positions
    32  u32      crc32 of the header, with this field 0, and then of what follows it
    36  zeros

    scales     float32 [rows], for int8 and int6 only
    values     in row-major order; int6: see below
    positions  for each stored value (block) the number of zeros (blocks of zeros) skipped since the
               one before it, over the flattened matrix, in fields of k bits, least significant bit
               first. Positions only rise, so no two blocks can overlap. With m = 2^k - 1,
               a gap g is g // m fields of m ("skip m zeros and go on"), then one field of g % m.
               Zeros after the last stored value are not written.

k = 1 is a bitmask, with a 1 for each zero. k is the one that gives the fewest bytes. A weight that
is not zero never becomes zero by rounding: it takes the least float16, or 1 as int8. Vectors are
always float32, every value stored.

int6 is for tables: every value is stored, from -31 to 31, and the columns are a multiple of four. A
row is three planes of columns / 4 bytes. The low six bits of plane p are quarter p of the row; the high
two bits of planes 0, 1 and 2 are, from the lowest up, the last quarter. So whole vectors are widened at once.

A matrix in blocks is rounded as `spdtool.models.int8` says, and `SparseEncoder` and `SparseLinear`
multiply it in 8 bits, with their inputs rounded too. Its columns are a multiple of four. A weight
in a block may be zero, and a small one may become zero; a block of zeros is not stored.

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
CRC_OFFSET = 32
TYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1")}
CODES = (*TYPES, "int6")  # in the order of their numbers in the header
WITH_SCALES = ("int8", "int6")
LARGEST_GAP_BITS = 8
INT8_BLOCKS = "int8-blocks"  # of `pack`: int8 in blocks, for a matrix whose zeros are in blocks
BLOCK_BITS = 2
BLOCK_SIZE = 2**BLOCK_BITS
# Share of the weights in live blocks that is not zero. A pattern of blocks leaves none of them zero,
# but by chance; the live blocks of 80 % single zeros are half zeros.
LEAST_FILLED = 0.9
MOST_WEIGHTS = 2**30  # of one matrix: a damaged header must not make a reader ask for terabytes
INT8_LIMIT = 127
INT6_LIMIT = 31
INT6_QUARTERS = 4  # of a row; the last one is the high bits of the others
LEAST_FP16 = np.float16(2.0**-24)
LEAST_FP32 = np.float32(2.0**-149)
# By limit: the largest float32 would overflow when the reader multiplies it by the limit.
LARGEST_SCALES = {
    limit: np.nextafter(np.finfo(np.float32).max / np.float32(limit), np.float32(0))
    for limit in (INT8_LIMIT, INT6_LIMIT)
}

Packed = bytes | bytearray | memoryview | np.ndarray
"""A packed matrix: bytes, or a uint8 array."""


class PackingError(ModelError):
    """A matrix that cannot be packed, or a packed one that is damaged."""


@dataclass(frozen=True)
class Header:
    """The first 64 bytes of a packed matrix: shape, type of the values, bits of a gap, and how much follows."""

    rows: int
    columns: int
    values: str
    gap_bits: int
    block_bits: int
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
        if self.values not in WITH_SCALES:
            return 0
        return 4 * self.rows

    @property
    def value_bytes(self) -> int:
        """Bytes of the stored values."""
        if self.values == "int6":
            return self.stored * 3 // 4
        return self.stored * TYPES[self.values].itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the packed matrix, header included."""
        return HEADER.size + self.scale_bytes + self.value_bytes + self.position_bytes


def pack(name: str, array: np.ndarray, values: str, *, table: bool = False) -> np.ndarray:
    """Pack a matrix [out, in] or a vector; return it as uint8.

    Args:
        name: the parameter's name, for errors.
        values: `fp32` (without loss), `fp16` or `int8` (one scale a row); a vector is always stored
            as `fp32`. `int8-blocks` stores a matrix `in_blocks` in blocks, and any other as `int8`.
            `int6` stores a table whose columns are a multiple of four in 6 bits, and any other array as `int8`.
        table: store every value, zeros too: rows of an embedding table are looked up in the packed
            form as it is.

    Raises:
        PackingError: a weight is not finite or too large for the type, or the array is empty, or
            neither of the two.
    """
    if array.ndim not in (1, 2) or not 0 < array.size <= MOST_WEIGHTS:
        raise PackingError(f"{name}: an array of shape {array.shape} cannot be packed")
    matrix = np.ascontiguousarray(np.atleast_2d(array), dtype=np.float32)
    if array.ndim == 1:
        values = "fp32"
    block_bits = 0
    if values == INT8_BLOCKS and not table and in_blocks(matrix):
        block_bits = BLOCK_BITS
    elif values == INT8_BLOCKS or (values == "int6" and not (table and matrix.shape[1] % INT6_QUARTERS == 0)):
        values = "int8"
    rounded, scales = round_weights(name, matrix, values)
    blocks = rounded.reshape(-1, 2**block_bits)
    live = (blocks != 0).any(axis=1)
    gap_bits, positions = 0, b""
    if array.ndim == 2 and not table:
        gap_bits, positions = _encode_positions(live, blocks.itemsize << block_bits)
    stored = blocks
    if gap_bits:
        stored = blocks[live]
    payload = (_encode_int6(rounded) if values == "int6" else stored.tobytes()) + positions
    if scales is not None:
        payload = scales.astype("<f4").tobytes() + payload
    type_code = CODES.index("int8" if block_bits else values)
    fields = (MAGIC, VERSION, type_code, gap_bits, block_bits, *matrix.shape, stored.size, len(positions))
    crc = zlib.crc32(payload, zlib.crc32(HEADER.pack(*fields, 0, b"")))
    return np.frombuffer(HEADER.pack(*fields, crc, b"") + payload, dtype=np.uint8)


def read_header(data: Packed, name: str = "packed matrix") -> Header:
    """Read the header and check it against the number of bytes; the values are not looked at.

    Raises:
        PackingError: it is no packed matrix of version 1, its counts contradict each other, or it
            is cut short.
    """
    view = _view_bytes(data, name)
    if len(view) < HEADER.size:
        raise PackingError(f"{name}: {len(view)} bytes are less than a header of {HEADER.size}")
    fields = HEADER.unpack_from(view)
    magic, version, type_code, gap_bits, block_bits, rows, columns, stored, position_bytes, crc, padding = fields
    if magic != MAGIC:
        raise PackingError(f"{name}: not a packed matrix; it starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise PackingError(
            f"{name}: packed form {version}; this spdtool-sparse-cpu reads form {VERSION}", "export the model again"
        )
    if type_code >= len(CODES) or gap_bits > LARGEST_GAP_BITS or any(padding):
        raise PackingError(f"{name}: the header is damaged")
    header = Header(rows, columns, CODES[type_code], gap_bits, block_bits, stored, position_bytes, crc)
    _check_blocks(header, name)
    _check_int6(header, name)
    if not 0 < header.size <= MOST_WEIGHTS:
        raise PackingError(f"{name}: {rows} x {columns} weights cannot be")
    if gap_bits:
        is_consistent = stored <= header.size and (position_bytes > 0) == (stored > 0)
    else:
        is_consistent = stored == header.size and position_bytes == 0
    if not is_consistent:
        raise PackingError(
            f"{name}: {stored} values and {position_bytes} bytes of positions do not make {rows} x {columns} weights"
        )
    if header.total_bytes != len(view):
        raise PackingError(f"{name}: {len(view)} bytes instead of {header.total_bytes}", "copy the file again")
    return header


def unpack(data: Packed, name: str = "packed matrix") -> np.ndarray:
    """Unpack a matrix to float32 [rows, columns]; a vector is one row.

    Raises:
        PackingError: anything in it is damaged.
    """
    header, view = read_header(data, name), _view_bytes(data, name)
    unsigned_header = view[:CRC_OFFSET].tobytes() + bytes(4) + view[CRC_OFFSET + 4 : HEADER.size].tobytes()
    if zlib.crc32(view[HEADER.size :], zlib.crc32(unsigned_header)) != header.crc:
        raise PackingError(f"{name}: the checksum does not match", "the file is damaged: copy it again")
    scales_end = HEADER.size + header.scale_bytes
    values_end = scales_end + header.value_bytes
    if header.values == "int6":
        values = _decode_int6(header, view[scales_end:values_end])
    else:
        values = np.frombuffer(view[scales_end:values_end], TYPES[header.values])
    blocks = values.reshape(-1, 2**header.block_bits)
    if header.gap_bits == 0:
        matrix = values.astype(np.float32)
    else:
        # One matrix has one packed form: zeros are never stored among positions.
        if not (blocks != 0).any(axis=1).all():
            raise PackingError(f"{name}: a stored value is zero")
        matrix = np.zeros((header.size >> header.block_bits, 2**header.block_bits), np.float32)
        matrix[_decode_positions(header, view[values_end:], name)] = blocks
    matrix = matrix.reshape(header.rows, header.columns)
    if header.values in WITH_SCALES:
        scales = np.frombuffer(view[HEADER.size : scales_end], "<f4")
        if not ((scales > 0) & np.isfinite(scales)).all():
            raise PackingError(f"{name}: a scale is not finite and above zero")
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            matrix *= scales[:, None]
    if not np.isfinite(matrix).all():
        raise PackingError(f"{name}: a weight is not finite")
    return matrix


def in_blocks(matrix: np.ndarray) -> bool:
    """Whether the zeros of a matrix [out, in] are in blocks of four inputs. Nearly all of a live block live."""
    if matrix.shape[1] % BLOCK_SIZE:
        return False
    live_blocks = int(np.count_nonzero((matrix.reshape(-1, BLOCK_SIZE) != 0).any(axis=1)))
    return bool(int(np.count_nonzero(matrix)) >= LEAST_FILLED * live_blocks * BLOCK_SIZE)


def round_weights(name: str, matrix: np.ndarray, values: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Round a float32 matrix to the type `values`; return it with the scales of its rows, which int8 and int6 have.

    A zero stays zero. Nothing else becomes zero, but small weights of `int8-blocks`, whose mask is that of its blocks.

    Raises:
        PackingError: a weight is not finite, or too large for the type.
    """
    if not np.isfinite(matrix).all():
        raise PackingError(f"{name}: a weight is not finite", "the checkpoint is damaged, or training diverged")
    if values == "fp32":
        return matrix.astype(TYPES[values], copy=False), None
    if values == "fp16":
        return _round_to_fp16(name, matrix), None
    largest = np.abs(matrix).max(axis=1)
    limit = INT6_LIMIT if values == "int6" else INT8_LIMIT
    scales = np.clip(largest / np.float32(limit), LEAST_FP32, LARGEST_SCALES[limit])
    scales[largest == 0] = 1  # a row of zeros; any scale does, and it must be above zero
    rounded = np.clip(np.rint(matrix / scales[:, None]), -limit, limit).astype(np.int8)
    if values != INT8_BLOCKS:
        underflowed = (rounded == 0) & (matrix != 0)
        rounded[underflowed] = np.sign(matrix[underflowed])
    return rounded, scales


def _round_to_fp16(name: str, matrix: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        rounded = matrix.astype(TYPES["fp16"])
    if not np.isfinite(rounded).all():
        raise PackingError(
            f"{name}: the weight {float(matrix.flat[np.abs(matrix).argmax()]):g} is too large for float16",
            "store it as fp32: --set export.values=fp32 (a table: export.embeddings=fp32)",
        )
    underflowed = (rounded == 0) & (matrix != 0)
    rounded[underflowed] = np.copysign(LEAST_FP16, matrix[underflowed])
    return rounded


def _encode_int6(rounded: np.ndarray) -> bytes:
    """Write the rows of a table of int6 as three planes of bytes each."""
    quarters = (rounded.view(np.uint8) & 63).reshape(len(rounded), INT6_QUARTERS, -1)
    planes = quarters[:, :3].copy()
    for plane in range(3):
        planes[:, plane] |= ((quarters[:, 3] >> (2 * plane)) & 3) << 6
    return planes.tobytes()


def _decode_int6(header: Header, data: memoryview) -> np.ndarray:
    """Read the numbers of a table of int6, as int8."""
    planes = np.frombuffer(data, np.uint8).reshape(header.rows, 3, -1)
    quarters = np.zeros((header.rows, INT6_QUARTERS, planes.shape[2]), np.uint8)
    quarters[:, :3] = planes & 63
    for plane in range(3):
        quarters[:, 3] |= planes[:, plane] >> 6 << (2 * plane)
    return ((quarters ^ 32).astype(np.int8) - np.int8(32)).reshape(-1)


def _check_int6(header: Header, name: str) -> None:
    """Raise PackingError where a table of int6 has gaps, or rows that are no whole bytes."""
    if header.values == "int6" and (header.gap_bits or header.columns % INT6_QUARTERS):
        raise PackingError(
            f"{name}: the header is damaged: int6 with gaps of {header.gap_bits} bits and {header.columns} columns"
        )


def _check_blocks(header: Header, name: str) -> None:
    """Raise PackingError unless rows and stored values are whole blocks."""
    if header.block_bits == 0:
        return
    if header.block_bits != BLOCK_BITS or header.values != "int8":
        raise PackingError(f"{name}: the header is damaged: {header.values} in blocks of 2^{header.block_bits}")
    if header.columns % BLOCK_SIZE or header.stored % BLOCK_SIZE:
        raise PackingError(
            f"{name}: {header.columns} columns and {header.stored} values are no whole blocks of {BLOCK_SIZE}"
        )


def _encode_positions(live: np.ndarray, itemsize: int) -> tuple[int, bytes]:
    """Choose the gap bits with the fewest bytes; return them with the positions.

    Returns `(0, b"")` where storing every value is smaller.

    Args:
        live: bool, for each value or block.
        itemsize: bytes of one.
    """
    live_count = int(np.count_nonzero(live))
    saved_bytes = (live.size - live_count) * itemsize
    if -(-live_count // 8) >= saved_bytes:  # a bit for each value already costs as much as it saves
        return 0, b""
    gaps = np.diff(np.flatnonzero(live), prepend=-1) - 1
    sizes: dict[int, int] = {}
    for bits in range(1, LARGEST_GAP_BITS + 1):
        continued = int((gaps // (2**bits - 1)).sum())
        sizes[bits] = -(-bits * (gaps.size + continued) // 8)
    best = min(sizes, key=sizes.__getitem__)
    if sizes[best] >= saved_bytes:
        return 0, b""
    return best, _encode_gaps(gaps, best)


def _encode_gaps(gaps: np.ndarray, bits: int) -> bytes:
    """Write the gaps as fields of `bits` bits."""
    top = 2**bits - 1  # a field of this value means: skip so many zeros and go on
    ends = np.cumsum(gaps // top + 1) - 1  # index of the last field of each gap
    field_count = 0
    if gaps.size:
        field_count = int(ends[-1]) + 1
    fields = np.full(field_count, top, np.uint8)
    fields[ends] = gaps % top
    spread = np.empty((fields.size, bits), np.uint8)
    for bit in range(bits):
        spread[:, bit] = (fields >> bit) & 1
    return np.packbits(spread.reshape(-1), bitorder="little").tobytes()


def _decode_positions(header: Header, positions: memoryview, name: str) -> np.ndarray:
    """Read the index of each stored value (block) in the flattened matrix, int64, ascending."""
    bits, top = header.gap_bits, 2**header.gap_bits - 1
    stored = header.stored >> header.block_bits
    stream = np.unpackbits(np.frombuffer(positions, np.uint8), bitorder="little")
    count = stream.size // bits
    fields = np.zeros(count, np.uint8)
    for bit in range(bits):
        fields |= stream[bit : count * bits : bits] << np.uint8(bit)
    ends = np.flatnonzero(fields != top)[:stored]
    if ends.size < stored:
        raise PackingError(f"{name}: the positions end after {ends.size} of {stored} values")
    used_bits = 0
    if ends.size:
        used_bits = (int(ends[-1]) + 1) * bits
    # Whatever follows the last field has to be zero bits of its byte: no other bytes could mean the
    # same matrix.
    if -(-used_bits // 8) != len(positions) or stream[used_bits:].any():
        raise PackingError(f"{name}: there are more positions than values")
    indices = (np.cumsum(fields, dtype=np.int64)[ends] + np.arange(stored)).astype(np.int64, copy=False)
    if indices.size and indices[-1] >= header.size >> header.block_bits:
        raise PackingError(f"{name}: the positions run out of the matrix")
    return indices


def _view_bytes(data: Packed, name: str) -> memoryview:
    if not isinstance(data, np.ndarray):
        return memoryview(data).cast("B")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise PackingError(f"{name}: a packed matrix is a vector of bytes, not {data.dtype} {data.shape}")
    return np.ascontiguousarray(data).data.cast("B")
