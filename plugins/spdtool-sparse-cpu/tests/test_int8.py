"""Int8 in blocks of 1x4: the packed format, the compiled products against numpy, and the target with its gates."""

import struct
import zlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from spdtool_sparse_cpu import library, packing
from spdtool_sparse_cpu.int8_form import check_model, check_products, packed_blocks
from spdtool_sparse_cpu.packing import INT8_BLOCKS, PackingError, in_blocks, pack, read_header, unpack

from spdtool import plugins
from spdtool.errors import DeviceError, GateError
from spdtool.export.gates.checked_export import ExportAttempt, export_and_check, storage_choices
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.target import MODEL_FILE, get_target
from spdtool.models import int8
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import fill_weights, load_model, save_model

SHAPES = [(1, 4), (3, 8), (17, 36), (64, 48), (40, 772)]


def matrix(shape, zeros, seed=0):
    """Draw a matrix with about the share `zeros` of zeros, in blocks of four."""
    random = np.random.default_rng([seed, *shape])
    array = random.normal(0, 0.05, shape).astype(np.float32)
    array.reshape(-1, 4)[random.random(array.size // 4) < zeros] = 0
    if zeros:
        array[2::5] = 0
    return array


def with_checksum(blob, offset, content):
    """Overwrite bytes of a packed matrix and update its checksum."""
    blob = bytearray(blob)
    blob[offset : offset + len(content)] = content
    blob[32:36] = bytes(4)
    blob[32:36] = struct.pack("<I", zlib.crc32(blob))
    return bytes(blob)


# ---- the packed form


def test_unpacking_returns_the_rounded_weights_exactly(reference):
    for shape in SHAPES:
        for zeros in (0.0, 0.5, 0.8, 0.95, 1.0):
            array = matrix(shape, zeros)
            blob = pack("w", array, INT8_BLOCKS)
            values, scales = reference.round_rows(array)
            assert read_header(blob).block_bits == 2, (shape, zeros)
            assert np.array_equal(unpack(blob), values.astype(np.float32) * scales[:, None]), (shape, zeros)
            assert np.array_equal(pack("w", array, INT8_BLOCKS), blob)


def test_a_packed_matrix_has_the_bytes_of_its_description():
    array = np.zeros((2, 12), np.float32)
    array[0, 4:8] = [127, -3, 0.4, 1]
    array[1, 8:12] = [0.5, 2, -254, 2]
    blob = bytes(pack("w", array, INT8_BLOCKS))
    assert blob[4:8] == bytes([1, 2, 1, 2])
    assert struct.unpack("<IIQQ", blob[8:32]) == (2, 12, 8, 1)
    scales, values = struct.pack("<ff", 1, 2), struct.pack("8b", 127, -3, 0, 1, 0, 1, -127, 1)
    # One bit a block, 1 for each block of zeros: one of them, then three.
    assert blob[64:] == scales + values + bytes([0b011101])


def test_zeros_that_are_not_in_blocks_are_stored_as_single_weights():
    random = np.random.default_rng(0)
    single = random.normal(size=(16, 32)).astype(np.float32)
    single[random.random(single.shape) < 0.8] = 0
    for array in (single, np.ones((3, 6), np.float32)):
        assert not in_blocks(array)
        assert np.array_equal(pack("w", array, INT8_BLOCKS), pack("w", array, "int8"))
    table = matrix((16, 32), 0.5)
    assert np.array_equal(pack("w", table, INT8_BLOCKS, table=True), pack("w", table, "int8", table=True))
    nearly = matrix((16, 32), 0.5)
    nearly[0, np.flatnonzero(nearly[0])[0]] = 0
    assert in_blocks(nearly)


def test_damage_is_named():
    blob = bytes(pack("w", matrix((6, 32), 0.5), INT8_BLOCKS))
    header = read_header(blob)
    last = 64 + header.scale_bytes + header.value_bytes
    damages = [
        (7, bytes([1]), "blocks of 2\\^1"),
        (5, bytes([0]), "is damaged|bytes instead of"),
        (12, struct.pack("<I", 30), "30 columns"),
        (16, struct.pack("<Q", header.stored - 1), "no whole blocks"),
        (64 + header.scale_bytes, bytes(4), "a stored value is zero"),
        (last, b"\xff" * header.position_bytes, "positions"),
        (last, bytes(header.position_bytes), "positions"),
    ]
    for scale in (0.0, -1.0, np.inf, np.nan):
        damages.append((64, struct.pack("<f", scale), "a scale is not finite and above zero"))
    for offset, content, message in damages:
        with pytest.raises(PackingError, match=message):
            unpack(with_checksum(blob, offset, content), "w")


def test_flipped_bytes_under_a_checksum_that_fits_never_crash():
    blob = bytes(pack("w", matrix((9, 12), 0.6), INT8_BLOCKS))
    random, refused = np.random.default_rng(0), 0
    places = [*range(10), 12, 13, *range(16, 18), *range(24, 26), *range(36, len(blob))]
    for _ in range(1500):
        try:
            array = unpack(with_checksum(blob, int(random.choice(places)), bytes([random.integers(256)])))
        except PackingError:
            refused += 1
        else:
            assert np.isfinite(array).all()
    assert 200 < refused < 1500


# ---- one arithmetic


def test_torch_numpy_and_packing_round_alike(reference):
    for shape in SHAPES:
        array = matrix(shape, 0.5)
        rows = int8.round_weight_rows(torch.from_numpy(array))
        values, scales = reference.round_rows(array)
        packed, packed_scales = packing.round_weights("w", array, INT8_BLOCKS)
        assert np.array_equal(rows.values.numpy(), values)
        assert np.array_equal(packed, values)
        assert np.array_equal(rows.scales.numpy(), scales)
        assert np.array_equal(packed_scales, scales)
        x = np.random.default_rng(1).normal(0.3, 1, (7, shape[1])).astype(np.float32)
        for in_torch, in_numpy in zip(int8.round_tokens(torch.from_numpy(x)), reference.round_tokens(x), strict=True):
            assert np.array_equal(in_torch.numpy(), in_numpy)
        bias = np.linspace(-1, 1, shape[0], dtype=np.float32)
        product = int8.multiply_rounded(torch.from_numpy(x), rows, torch.from_numpy(bias)).numpy()
        assert np.array_equal(product, reference.multiply_rounded(x, values, scales, bias))
    assert int8.INPUT_CHUNK == reference.INPUT_CHUNK


@pytest.fixture(scope="module")
def compiled():
    """The compiled library, or a reason to skip."""
    if "sparse-cpu-int8" not in plugins.library_targets():
        pytest.skip("the installed plugin is an older one: install it again")
    try:
        return library.path()
    except DeviceError as error:
        pytest.skip(error.message)


def run_linear(file, blob, bias, x):
    node = helper.make_node("SparseLinear", ["x", "weight", "bias"], ["y"], domain="spdtool", activation="none")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(blob, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("spdtool", 1)]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(file))
    options.log_severity_level = 4
    content = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return ort.InferenceSession(content, options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_compiled_integer_products_equal_numpy(compiled, reference, monkeypatch):
    """With row scales of 1 and no bias only the token's scale is multiplied, so results are equal to the bit."""
    random = np.random.default_rng(0)
    for isa in ("", "avx512", "avx2", "baseline"):
        monkeypatch.setenv("SPDTOOL_SPARSE_CPU_ISA", isa)
        for shape, tokens in (((9, 12), 1), ((200, 64), 37), ((13, 768), 70)):
            array = random.integers(-127, 128, shape).astype(np.float32)
            array[:, 1] = 127  # the largest of each row
            array.reshape(-1, 4)[random.random(array.size // 4) < 0.5] = 0
            array[:, 0:4] = [3, 127, -5, 7]
            x = random.normal(0.5, 2, (tokens, shape[1])).astype(np.float32)
            bias = np.zeros(shape[0], np.float32)
            y = run_linear(compiled, pack("w", array, INT8_BLOCKS), bias, x)
            values, scales = reference.round_rows(array)
            assert (scales == 1).all()
            assert np.array_equal(y, reference.multiply_rounded(x, values, scales, bias)), (isa, shape)


def test_compiled_products_with_scales_and_chunks_are_near_numpy(compiled, reference):
    random = np.random.default_rng(1)
    array, bias = matrix((50, 1604), 0.8), random.normal(size=50).astype(np.float32)
    x = random.normal(0.5, 2, (33, 1604)).astype(np.float32)
    y = run_linear(compiled, pack("w", array, INT8_BLOCKS), bias, x)
    expected = reference.multiply_rounded(x, *reference.round_rows(array), bias)
    assert np.allclose(y, expected, rtol=2e-6, atol=2e-6)


# ---- the target


@pytest.fixture(scope="module")
def checkpoint(toys, tmp_path_factory):
    """A BERT of two layers with 80 % zeros in blocks, except one matrix with single zeros."""
    folder = tmp_path_factory.mktemp("int8") / "checkpoint"
    names = {0: "bad", 1: "good"}
    model = toys.bert(id2label=names, label2id={"bad": 0, "good": 1})
    random = np.random.default_rng(0)
    for number, weight in enumerate(find_prunable_weights(model).values()):
        size = 1 if number == 3 else 4
        dead = random.random(weight.numel() // size) < (0.8 if size == 4 else 0.5)
        weight.data.view(-1, size)[torch.from_numpy(dead)] = 0
    save_model(model, toys.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def prepared(toys, checkpoint):
    """`Reference` of the checkpoint, with a dev set."""
    toys.register(toys.dataset("blocks", dev=12))
    recipe = toys.recipe("export.sentences=4", "export.budget=1", task="blocks")
    yield Reference(checkpoint, prepare_dev_sets(checkpoint, recipe), recipe)
    plugins.datasets.unregister("blocks")


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory, compiled):  # noqa: ARG001 - it skips
    """An export before its gates."""
    path = tmp_path_factory.mktemp("exported") / "student"
    ExportAttempt(get_target("sparse-cpu-int8"), prepared, path, ["cpu"]).write()
    return path


@pytest.mark.slow
def test_the_target_passes_its_gates_and_reports_matrices_without_blocks(prepared, compiled, tmp_path, capsys):  # noqa: ARG001
    target, path = get_target("sparse-cpu-int8"), tmp_path / "out"
    assert storage_choices(target, prepared) == [("int8", "int6"), ("int8", "int8")]
    exported = export_and_check(target, prepared, path, ["cpu"])
    assert (exported.values, exported.embeddings) == ("int8", "int6")
    storages = {stored.name: stored.storage for stored in target.stored_weights(path)}
    assert storages["bert.embeddings.word_embeddings.weight"] == "int6"
    assert exported.deviation > 0
    assert exported.largest_difference < 1e-3
    output = capsys.readouterr()
    assert "1 of 12 matrices have no zeros in blocks of 1x4" in output.out + output.err


@pytest.mark.slow
def test_stored_weights_are_those_of_the_definition(prepared, folder):
    names = [tensor.name for tensor, _ in packed_blocks(onnx.load(folder / MODEL_FILE))]
    assert len(names) == 11
    model = load_model(prepared.checkpoint)
    for stored in get_target("sparse-cpu-int8").stored_weights(folder):
        if stored.name in names:
            values, scales = int8.round_weight_rows(model.get_parameter(stored.name).detach())
            assert np.array_equal(stored.array, (values * scales[:, None]).numpy())


@pytest.mark.slow
def test_another_arithmetic_is_refused(prepared, folder, compiled, monkeypatch):
    target = get_target("sparse-cpu-int8")
    session, batches = target.session(folder), prepared.batches[:3]

    def check(forward):
        model = load_model(prepared.checkpoint, eager=True)
        fill_weights(model, ((stored.name, stored.array) for stored in target.stored_weights(folder)))
        check_model(folder / MODEL_FILE, model, forward, batches)

    check(session)
    with pytest.raises(GateError, match="int8 logits differ from their definition"):
        check(lambda batch: session(batch) + 0.1 * np.abs(session(batch)).max())
    check_products(folder / MODEL_FILE, [compiled])
    monkeypatch.setattr(int8, "TOKEN_LIMIT", 254)  # simulate an engine with another rounding step
    with pytest.raises(GateError, match="its int8 product differs from the definition"):
        check_products(folder / MODEL_FILE, [compiled])


def test_the_target_is_exported_if_named_or_if_the_student_was_trained_for_it(toys):
    target = get_target("sparse-cpu-int8")
    for values in ("smallest", "fp16", "int8"):
        assert target.storage_formats(toys.recipe(f"export.values={values}")) == ("int8", "int8")
    assert target.storage_formats(toys.recipe("export.values=fp32", "export.embeddings=fp32")) == ("fp32", "fp32")
    assert target.storage_formats(toys.recipe("export.embeddings=int6")) == ("int8", "int6")
    assert not target.suits(toys.recipe())
    assert target.suits(toys.recipe("finetune.quantize=int8"))
    assert target.roles == ("student",)
