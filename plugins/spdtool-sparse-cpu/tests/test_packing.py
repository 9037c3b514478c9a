"""The packed format: against slow plain code, lossless where promised, and damage is always detected."""

import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from spdtool_sparse_cpu.packing import MOST_WEIGHTS, TYPES, PackingError, pack, read_header, unpack

from spdtool.errors import ModelError

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (17, 33), (64, 48), (129, 257)]
SHARES = [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]


def matrix(shape, zeros, seed=0):
    """Draw a matrix with about the share `zeros` of zeros; every fifth row is empty."""
    random = np.random.default_rng([seed, *shape])
    array = random.normal(0, 0.05, shape).astype(np.float32)
    array[random.random(shape) < zeros] = 0
    if 0 < zeros < 1:
        array[2::5] = 0
    return array


def slow_pack(array, values):
    """Pack by the description of the format: one weight after another, trying every number of gap bits."""
    rows, columns = array.shape
    scales = b""
    if values == "int8":
        largest = np.abs(array).max(axis=1)
        steps = np.where(largest == 0, 1, largest / np.float32(127)).astype("<f4")
        scales = steps.tobytes()
    stored = []
    for row in range(rows):
        for value in array[row]:
            if values == "fp32":
                stored.append(struct.pack("<f", value))
            elif values == "fp16":
                as_half = np.float16(value)
                stored.append((np.copysign(np.float16(6e-8), value) if value and not as_half else as_half).tobytes())
            else:
                rounded = int(np.rint(value / steps[row]))
                stored.append(struct.pack("b", int(np.sign(value)) if value and not rounded else rounded))
    live_positions = [position for position, value in enumerate(array.reshape(-1)) if value]
    best = (0, b"".join(stored), b"")
    for bits in range(8, 0, -1):
        largest_gap, stream, last = 2**bits - 1, [], -1
        for position in live_positions:
            gap = position - last - 1
            for field in [largest_gap] * (gap // largest_gap) + [gap % largest_gap]:
                stream += [(field >> bit) & 1 for bit in range(bits)]
            last = position
        stream += [0] * (-len(stream) % 8)
        positions = bytes(
            sum(bit << shift for shift, bit in enumerate(stream[start : start + 8]))
            for start in range(0, len(stream), 8)
        )
        candidate = (bits, b"".join(stored[position] for position in live_positions), positions)
        smaller = len(candidate[1]) + len(positions) - len(best[1]) - len(best[2])
        if smaller < 0 or (smaller == 0 and best[0]):
            best = candidate
    bits, values_stored, positions = best
    size = {"fp32": 4, "fp16": 2, "int8": 1}[values]
    code = ["fp32", "fp16", "int8"].index(values)
    head = b"SPDM" + struct.pack(
        "<BBBBIIQQ", 1, code, bits, 0, rows, columns, len(values_stored) // size, len(positions)
    )
    payload = scales + values_stored + positions
    return head + struct.pack("<I", zlib.crc32(head + bytes(32) + payload)) + bytes(28) + payload


def with_checksum(blob, offset, content):
    """Overwrite bytes of the blob and update its checksum: damage that only other checks can find."""
    damaged = bytearray(blob)
    damaged[offset : offset + len(content)] = content
    damaged[32:36] = bytes(4)
    damaged[32:36] = struct.pack("<I", zlib.crc32(damaged))
    return bytes(damaged)


def test_bytes_are_those_of_the_description():
    for shape, zeros, values in itertools.product(SHAPES[:-1], SHARES, TYPES):
        array = matrix(shape, zeros)
        is_equal = bytes(pack("w", array, values)) == slow_pack(array, values)
        assert is_equal, f"{shape} with {zeros:.0%} zeros as {values}"


def test_fp32_is_unpacked_to_the_last_bit():
    for shape, zeros in itertools.product(SHAPES, SHARES):
        array = matrix(shape, zeros)
        is_equal = unpack(pack("w", array, "fp32")).tobytes() == array.tobytes()
        assert is_equal, f"{shape} with {zeros:.0%} zeros"


def test_fp16_rounds_by_half_a_step_and_keeps_the_zeros():
    for shape, zeros in itertools.product(SHAPES, SHARES):
        array = matrix(shape, zeros)
        unpacked = unpack(pack("w", array, "fp16"))
        case = f"{shape} with {zeros:.0%} zeros"
        assert ((unpacked != 0) == (array != 0)).all(), case
        # 2^-24 is the smallest step of fp16, which has fewer digits below its normal range.
        assert (np.abs(unpacked - array) <= 2**-11 * np.abs(array) + 2**-24).all(), case


def test_int8_rounds_by_half_a_step_and_keeps_the_zeros():
    for shape, zeros in itertools.product(SHAPES, SHARES):
        array = matrix(shape, zeros)
        unpacked = unpack(pack("w", array, "int8"))
        case = f"{shape} with {zeros:.0%} zeros"
        assert ((unpacked != 0) == (array != 0)).all(), case
        steps = np.abs(array).max(axis=1, keepdims=True) / 127
        was_lifted = np.abs(unpacked) == steps  # a small weight that became 1 instead of 0 is off by more
        assert ((np.abs(unpacked - array) <= 0.5 * 1.001 * steps) | was_lifted).all(), case


@pytest.mark.parametrize("values", ["fp16", "int8"])
def test_a_live_weight_never_becomes_zero(values):
    array = np.array([[1.0, 1e-30, -1e-30, 0.0], [0.0, 0.0, 1e-44, -1e-45]], np.float32)
    unpacked = unpack(pack("w", array, values))
    assert (np.sign(unpacked) == np.sign(array)).all()


def test_one_gap_bit_is_a_bitmask_of_the_zeros():
    array = matrix((16, 24), 0.5)
    array[2::5] = matrix((4, 24), 0.5, seed=1)[:3]  # no empty rows: gaps stay short
    blob = bytes(pack("w", array, "fp32"))
    header = read_header(blob)
    assert header.gap_bits == 1
    last = np.flatnonzero(array)[-1]
    mask = np.packbits(array.reshape(-1)[: last + 1] == 0, bitorder="little").tobytes()
    assert blob[-header.position_bytes :] == mask


def test_gap_bits_follow_the_share_of_zeros():
    for zeros, bits in ((0.0, 0), (0.5, 1), (0.8, 3), (0.9, 4), (0.99, 8)):
        random = np.random.default_rng(0)
        array = np.where(random.random((300, 200)) < zeros, 0, random.normal(size=(300, 200)))
        assert read_header(pack("w", array, "fp16")).gap_bits == bits, f"{zeros:.0%} zeros"


def test_an_all_zero_matrix_is_a_header():
    assert pack("w", np.zeros((50, 40), np.float32), "fp16").size == 64
    assert not unpack(pack("w", np.zeros((50, 40), np.float32), "fp16")).any()


def test_a_table_stores_every_value():
    for values, zeros in itertools.product(TYPES, (0.0, 0.9, 1.0)):
        array = matrix((20, 30), zeros)
        blob = pack("t", array, values, table=True)
        header = read_header(blob)
        case = f"{zeros:.0%} zeros as {values}"
        assert (header.gap_bits, header.stored, header.position_bytes) == (0, 600, 0), case
        assert ((unpack(blob) != 0) == (array != 0)).all(), case


# ---- tables of 6 bits


def six_bits(rows=5, columns=12, seed=0):
    """Pack a table of int6; return it with the numbers and the scales that it has to hold."""
    table = np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)
    scales = np.abs(table).max(axis=1) / np.float32(31)
    numbers = np.rint(table / scales[:, None])
    raised = np.where(numbers == 0, np.sign(table), numbers)
    return pack("t", table, "int6", table=True), raised, scales


def test_a_table_of_int6_has_the_bytes_of_its_description():
    blob, numbers, scales = six_bits()
    assert bytes(blob[4:8]) == bytes([1, 3, 0, 0])
    assert blob.size == 64 + 5 * 4 + 5 * 9
    assert read_header(blob).values == "int6"
    expected = bytearray(scales.astype("<f4").tobytes())
    for row in numbers.astype(int) & 63:
        for plane in range(3):
            for column in range(3):
                expected.append(row[3 * plane + column] | ((row[9 + column] >> (2 * plane)) & 3) << 6)
    assert bytes(blob[64:]) == bytes(expected)
    assert np.array_equal(unpack(blob), numbers.astype(np.float32) * scales[:, None])


def test_int6_rounds_by_half_a_step_and_keeps_the_zeros():
    table = matrix((60, 128), 0.3)
    unpacked = unpack(pack("t", table, "int6", table=True))
    assert ((unpacked != 0) == (table != 0)).all()
    steps = np.abs(table).max(axis=1, keepdims=True) / 31
    was_lifted = np.abs(unpacked) == steps
    assert ((np.abs(unpacked - table) <= 0.5 * 1.001 * steps) | was_lifted).all()
    assert not unpack(pack("t", np.zeros((3, 8), np.float32), "int6", table=True)).any()
    extreme = np.float32([[3.4e38, -3.4e38, 0, 0], [2**-149, 0, 0, 2**-140]])
    assert np.allclose(unpack(pack("t", extreme, "int6", table=True)), extreme, rtol=0.02, atol=2**-143)


def test_what_6_bits_do_not_fit_is_stored_as_int8():
    table = matrix((6, 10), 0.0)
    assert np.array_equal(pack("t", table, "int6", table=True), pack("t", table, "int8", table=True))
    pruned = matrix((6, 12), 0.9)
    assert np.array_equal(pack("w", pruned, "int6"), pack("w", pruned, "int8"))


def test_damaged_tables_of_int6_are_refused():
    blob = bytes(six_bits()[0])
    damages = [
        (6, b"\x01", "int6 with gaps of 1 bits"),
        (7, b"\x02", "int6 in blocks"),
        (8, struct.pack("<II", 6, 10), "10 columns"),
        (8, struct.pack("<II", 4, 12), "do not make 4 x 12 weights"),
        (16, struct.pack("<Q", 59), "59 values"),
        (64, struct.pack("<f", 0), "a scale is not finite and above zero"),
        (64, struct.pack("<f", np.nan), "a scale is not finite and above zero"),
        (64, struct.pack("<f", 3e38), "a weight is not finite"),
    ]
    for offset, content, message in damages:
        with pytest.raises(PackingError, match=message):
            unpack(with_checksum(blob, offset, content), "t")
    for length in range(len(blob)):
        with pytest.raises(PackingError):
            unpack(blob[:length])


@pytest.mark.parametrize("values", TYPES)
def test_a_vector_is_one_row_of_float32(values):
    vector = np.array([0.0, 0.1, 0.0, 0.0, 1e30], np.float32)
    header = read_header(pack("b", vector, values))
    assert (header.rows, header.columns, header.values, header.gap_bits, header.stored) == (1, 5, "fp32", 0, 5)
    assert unpack(pack("b", vector, values)).tolist() == [vector.tolist()]


@pytest.mark.parametrize("values", TYPES)
def test_very_large_and_very_small_rows(values):
    largest = np.finfo(np.float32).max
    array = np.array([[largest, -largest], [2**-149, 2**-140]], np.float32)
    if values == "fp16":
        with pytest.raises(PackingError, match=r"layer\.w: the weight 3\.40282e\+38 is too large for float16"):
            pack("layer.w", array, values)
    else:
        unpacked = unpack(pack("w", array, values))
        assert np.allclose(unpacked[0], array[0], rtol=0.005)
        assert (np.abs(unpacked[1] - array[1]) <= 2**-143).all()


def test_weights_that_are_not_finite_are_refused_by_name():
    for values, value in itertools.product(TYPES, (np.nan, np.inf, -np.inf)):
        array = matrix((4, 4), 0.5)
        array[1, 2] = value
        with pytest.raises(PackingError, match=r"layer\.w: a weight is not finite") as error:
            pack("layer.w", array, values)
        assert isinstance(error.value, ModelError)
        with pytest.raises(PackingError):
            pack("layer.b", array[1], values)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (2, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(PackingError, match="cannot be packed"):
        pack("w", np.zeros(shape, np.float32), "fp32")


# Counts that contradict each other, each under a checksum that fits.
DAMAGE = {
    "no magic": (0, b"SPDN"),
    "another version": (4, b"\x02"),
    "another type of values": (5, b"\x04"),
    "int6 with gaps": (5, b"\x03"),
    "fp32 instead of fp16": (5, b"\x00"),
    "nine gap bits": (6, b"\x09"),
    "all are stored": (6, b"\x00"),
    "other gap bits": (6, b"\x08"),
    "the reserved byte": (7, b"\x01"),
    "the reserved end": (63, b"\x01"),
    "no rows": (8, struct.pack("<I", 0)),
    "fewer rows": (8, struct.pack("<I", 3)),
    "a terabyte": (8, struct.pack("<II", 2**20, 2**20)),
    "most that fits in u32": (8, struct.pack("<II", 2**32 - 1, 2**32 - 1)),
    "fewer values": (16, struct.pack("<Q", 10)),
    "more values than weights": (16, struct.pack("<Q", 2**63)),
    "fewer bytes of positions": (24, struct.pack("<Q", 3)),
    "no positions": (24, struct.pack("<Q", 0)),
    "huge positions": (24, struct.pack("<Q", 2**64 - 1)),
    "a stored zero": (64, bytes(2)),
    "a stored nan": (64, struct.pack("<e", np.nan)),
    "a stored infinity": (64, struct.pack("<e", np.inf)),
}


def test_damage_under_a_checksum_that_fits():
    blob = bytes(pack("w", matrix((12, 20), 0.9), "fp16"))
    assert read_header(blob).gap_bits not in (0, 8)
    for damage, (offset, content) in DAMAGE.items():
        message = ""
        try:
            unpack(with_checksum(blob, offset, content), "layer.w")
        except PackingError as error:
            message = error.message
        assert message.startswith("layer.w: "), damage


def test_wrong_counts_of_positions_are_refused():
    array = matrix((12, 20), 0.9)
    array[-1, -1] = 1
    blob = bytes(pack("w", array, "fp16"))
    header = read_header(blob)
    start = len(blob) - header.position_bytes
    with pytest.raises(PackingError, match="the positions end after 0"):  # "go on" for ever
        unpack(with_checksum(blob, start, b"\xff" * header.position_bytes))
    with pytest.raises(PackingError, match="run out of the matrix"):  # the first value one place later
        unpack(with_checksum(blob, start, bytes([blob[start] + 1])))
    with pytest.raises(PackingError, match="more positions than values"):  # no gaps at all: fewer fields than there are
        unpack(with_checksum(blob, start, bytes(header.position_bytes)))
    with pytest.raises(PackingError, match="more positions than values"):
        unpack(
            with_checksum(blob[:24] + struct.pack("<Q", header.position_bytes + 1) + blob[32:] + b"\x00", 0, b"SPDM")
        )


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0])
def test_invalid_scales_are_refused(scale):
    blob = bytes(pack("w", matrix((12, 20), 0.9), "int8"))
    with pytest.raises(PackingError, match=r"w: a (scale|weight) is not"):
        unpack(with_checksum(blob, 64, struct.pack("<f", scale)), "w")


def test_every_truncation_and_every_flipped_byte_is_detected():
    for values, zeros in itertools.product(TYPES, (0.0, 0.5, 0.9, 1.0)):
        blob = bytes(pack("w", matrix((9, 11), zeros), values))
        damaged_blobs = [blob[:length] for length in range(len(blob))] + [blob + b"\x00"]
        random = np.random.default_rng(0)
        for _ in range(500):
            flipped = bytearray(blob)
            for offset in random.integers(0, len(blob), random.integers(1, 4)):
                flipped[offset] ^= int(random.integers(1, 256))
            if bytes(flipped) != blob:  # a byte may have been flipped back
                damaged_blobs.append(bytes(flipped))
        for damaged in damaged_blobs:
            with pytest.raises(PackingError):
                unpack(damaged)


@pytest.mark.parametrize("values", TYPES)
def test_flipped_bytes_under_a_checksum_that_fits_never_crash(values):
    """With a forged checksum, unpacking gives a matrix of finite weights or a PackingError, nothing else."""
    blob = bytes(pack("w", matrix((9, 11), 0.8), values))
    random, refused = np.random.default_rng(0), 0
    places = [
        *range(10),
        12,
        13,
        *range(16, 18),
        *range(24, 26),
        *range(36, len(blob)),
    ]  # bytes of the sizes are left out, because they would request gigabytes
    for _ in range(3000):
        offset, value = int(random.choice(places)), bytes([random.integers(0, 256)])
        try:
            array = unpack(with_checksum(blob, offset, value))
        except PackingError:
            refused += 1
        else:
            assert np.isfinite(array).all()
            assert 0 < array.size <= MOST_WEIGHTS
    assert 500 < refused < 3000


def test_no_other_kind_of_array_is_read():
    blob = pack("w", matrix((4, 4), 0.5), "fp32")
    for other_array in (blob.astype(np.int8), blob.reshape(1, -1), np.zeros((), np.uint8)):
        with pytest.raises(PackingError, match="vector of bytes"):
            unpack(other_array)
    assert (unpack(memoryview(blob)) == unpack(bytearray(blob))).all()


def test_packing_needs_no_torch():
    code = (
        "import spdtool_sparse_cpu, spdtool_sparse_cpu.packing, spdtool_sparse_cpu.library, spdtool_sparse_cpu.target\n"
        "import sys; print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
