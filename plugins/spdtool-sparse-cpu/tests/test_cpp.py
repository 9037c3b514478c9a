"""The compiled library: its own tests, plain and under sanitizers, and model files whose weights are damaged.

Both are built here with the CMake and the C++ compiler of this machine, into a folder that goes away; without them
everything is skipped. `-m "not cpp"` leaves this file out: it takes one to two minutes.
"""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as states
from spdtool_sparse_cpu import library
from spdtool_sparse_cpu.packing import INT8_BLOCKS, PackingError, pack, read_header, unpack

SOURCE = Path(__file__).parents[1]
DAMAGED = 200  # model files, of each operator
RUNTIME_ERRORS = (states.Fail, states.InvalidArgument, states.RuntimeException)

pytestmark = [pytest.mark.cpp, pytest.mark.slow]


def call(*command, timeout=300, **environment):
    """Run a command to its end; its output, both kinds together, is the error where it fails."""
    run = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, f"{command} ended with {run.returncode}\n{run.stdout[-8000:]}"
    return run.stdout


@pytest.fixture(scope="module")
def tools():
    """CMake and its compiler, or a reason to skip."""
    if not shutil.which("cmake") or not shutil.which("ctest"):
        pytest.skip("no CMake on this machine")
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    return compiler


def configure(folder, *options):
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    call("cmake", "-S", SOURCE, "-B", folder, *generator, *(f"-D{option}" for option in options))


@pytest.mark.parametrize(
    "sanitizers",
    [
        pytest.param("", id="plain", marks=pytest.mark.long),
        pytest.param("address,undefined", id="address", marks=pytest.mark.long),
        pytest.param("thread", id="thread", marks=pytest.mark.long),
    ],
)
def test_its_own_tests(tools, tmp_path, sanitizers):
    if sanitizers:
        program = tmp_path / "nothing"
        (tmp_path / "nothing.cpp").write_text("int main() {}\n")
        command = [tools, f"-fsanitize={sanitizers}", "-o", program, tmp_path / "nothing.cpp"]
        if subprocess.run(command, capture_output=True).returncode or subprocess.run([program]).returncode:
            pytest.skip(f"programs with the sanitizers {sanitizers} do not build or run on this machine")
    build = tmp_path / "build"
    configure(build, "SPARSE_CPU_TESTS=ON", f"SPARSE_CPU_SANITIZE={sanitizers}")
    call("cmake", "--build", build, "--target", "cpp_tests", "-j2")
    told = call("ctest", "--test-dir", build, "-j2", "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in told
    programs = (
        ["team", "linear", "training", "int8", "encoder"]
        if sanitizers == "thread"
        else ["packed", "kernels", "linear", "training", "int8", "encoder", "fuzz"]
    )
    assert all(f" {name}" in told for name in programs), told


@pytest.mark.parametrize("operator", ["SparseLinear", "SparseEncoder"])
def test_damaged_model_files_are_errors_of_onnxruntime(operator):
    """In a process of their own: what one of them did to it would be seen here."""
    told = call(sys.executable, __file__, library.path(), operator)
    refused, read = (int(line.split()[-1]) for line in told.splitlines()[-2:])
    assert refused + read == DAMAGED
    assert refused > DAMAGED / 4
    assert read > 0


# ---- the process of its own


def damaged(blob, chance):
    """A packed matrix with one or two faults. Its checksum is mostly made to fit, so that later checks are reached."""
    blob = bytearray(blob)
    for _ in range(chance.integers(1, 3)):
        match chance.integers(8):
            case 0:
                blob[chance.integers(len(blob))] ^= 1 << int(chance.integers(8))
            case 1:
                blob[chance.integers(min(64, len(blob)))] = int(chance.integers(256))
            case 2:  # one of the four counts
                at, width = [(8, 4), (12, 4), (16, 8), (24, 8)][chance.integers(4)]
                near = int.from_bytes(blob[at : at + width], "little") + int(chance.integers(-2, 3))
                count = [near, 0, 1, 2**30, 2**31, 2 ** (8 * width) - 1][chance.integers(6)]
                blob[at : at + width] = (count % 2 ** (8 * width)).to_bytes(width, "little")
            case 3:
                del blob[int(chance.integers(1, len(blob) + 1)) :]
            case 4:
                blob += chance.bytes(int(chance.integers(1, 9)))
            case 5:
                blob[-int(chance.integers(1, len(blob) + 1))] = 255
            case 6 | 7 if len(blob) > 64:  # in the payload, where much of it gives another matrix
                blob[chance.integers(64, len(blob))] ^= 1 << int(chance.integers(8))
        if len(blob) < 64:
            return bytes(blob)
    if chance.integers(16):
        blob[32:36] = bytes(4)
        blob[32:36] = zlib.crc32(blob).to_bytes(4, "little")
    return bytes(blob)


def random_weight(chance, shape, zeros, kind):
    """A matrix whose zeros are in blocks of four where its kind of storage wants that."""
    weight = chance.normal(size=shape).astype(np.float32)
    size = 4 if kind == INT8_BLOCKS else 1
    weight.reshape(-1, size)[chance.random(weight.size // size) < zeros] = 0
    return weight


def linear_model(chance):
    values = ["fp32", "fp16", "int8", INT8_BLOCKS][chance.integers(4)]
    weight = random_weight(chance, (12, 32), 0.7, values)
    bias = chance.normal(size=12).astype(np.float32)
    node = helper.make_node("SparseLinear", ["x", "weight", "bias"], ["y"], domain="spdtool", activation="relu")
    inputs = {"x": chance.normal(size=(5, 32)).astype(np.float32)}
    return node, {"weight": pack("weight", weight, values), "bias": bias}, "weight", inputs


def encoder_model(chance):
    """One layer, hidden 8, inner 12."""
    layers_kind = ["fp16", INT8_BLOCKS][chance.integers(2)]

    def matrix(rows, columns, kind=layers_kind, **options):
        return pack("matrix", random_weight(chance, (rows, columns), 0.4, kind), kind, **options)

    def numbers(size):
        return pack("numbers", chance.random(size).astype(np.float32), "fp32")

    shapes = [(8, 8)] * 4 + [None] + [(12, 8), (8, 12)] + [None]
    blobs = [matrix(20, 8, "fp16", table=True), matrix(10, 8, "int8", table=True), numbers(8), numbers(8)]
    for shape in shapes:
        blobs += [matrix(*shape), numbers(shape[0])] if shape else [numbers(8), numbers(8)]
    names = [f"w{index}" for index in range(len(blobs))]
    node = helper.make_node(
        "SparseEncoder",
        ["ids", "mask", "", *names],
        ["y"],
        domain="spdtool",
        heads=2,
        layers=1,
        epsilon=1e-5,
        activation="gelu",
        padding_id=-1,
        token_types=0,
        projection=0,
        output=["first", "all"][chance.integers(2)],
    )
    inputs = {"ids": chance.integers(0, 20, (3, 5)), "mask": chance.integers(0, 2, (3, 5))}
    return node, dict(zip(names, blobs, strict=True)), names[chance.integers(len(names))], inputs


def session(file, node, constants, inputs):
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "damaged",
        [helper.make_tensor_value_info(name, kinds[array.dtype], array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("spdtool", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(file))
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def meet(file, operator):
    """Open damaged models. What `unpack` refuses, the library refuses; what it takes, in the right shape, is read."""
    refused = read = 0
    for seed in range(DAMAGED):
        chance = np.random.default_rng(seed)
        node, constants, name, inputs = (linear_model if operator == "SparseLinear" else encoder_model)(chance)
        session(file, node, constants, inputs).run(None, inputs)
        whole = unpack(constants[name]).shape
        blob = damaged(constants[name].tobytes(), chance)
        try:
            weight = unpack(blob)
        except PackingError:
            weight = None
        constants[name] = np.frombuffer(blob, np.uint8)
        try:
            (y,) = session(file, node, constants, inputs).run(None, inputs)
        except RUNTIME_ERRORS as error:
            if weight is not None and weight.shape == whole:
                raise AssertionError(f"seed {seed}: packing.py reads it") from error
            refused += 1
            continue
        assert weight is not None, f"seed {seed}: read by the library, refused by packing.py"
        assert weight.shape == whole or operator == "SparseEncoder"
        if operator == "SparseLinear":
            with np.errstate(over="ignore"):
                expected = np.maximum(inputs["x"].astype(np.float64) @ weight.T + constants["bias"], 0)
            scale = np.abs(inputs["x"]).astype(np.float64) @ np.abs(weight.T) + 1
            usual = scale < 1e30
            tolerance = 0.05 if read_header(blob).block_bits else 1e-5  # blocks are multiplied in 8 bits
            assert (np.abs(y - expected) <= tolerance * scale)[usual].all(), f"seed {seed}"
        read += 1
    print(f"refused {refused}\nread {read}")  # noqa: T201


if __name__ == "__main__":
    meet(*sys.argv[1:])
