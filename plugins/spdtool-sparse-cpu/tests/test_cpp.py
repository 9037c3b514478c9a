"""The compiled library: its C++ tests, plain and under sanitizers, and model files with damaged weights.

CMake and the C++ compiler of this machine build both into a temporary folder; without them all tests are skipped.
`-m "not cpp"` leaves this file out: it takes one to two minutes.
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
    """Run a command and return stdout and stderr together; fail with that output if the command fails."""
    run = subprocess.run(
        [str(argument) for argument in command],
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
    output = call("ctest", "--test-dir", build, "-j2", "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in output
    programs = (
        ["team", "linear", "training", "int8", "encoder"]
        if sanitizers == "thread"
        else ["packed", "kernels", "linear", "training", "int8", "encoder", "fuzz"]
    )
    assert all(f" {name}" in output for name in programs), output


@pytest.mark.parametrize("operator", ["SparseLinear", "SparseEncoder"])
def test_damaged_model_files_are_errors_of_onnxruntime(operator):
    """Open the files in another process, because a crash of the library must not end this one."""
    output = call(sys.executable, __file__, library.path(), operator)
    refused, read = (int(line.split()[-1]) for line in output.splitlines()[-2:])
    assert refused + read == DAMAGED
    assert refused > DAMAGED / 4
    assert read > 0


# ---- the process of its own


def damaged(blob, random):
    """Damage a packed matrix in one or two places; usually fix its checksum, so that later checks are reached."""
    blob = bytearray(blob)
    for _ in range(random.integers(1, 3)):
        match random.integers(8):
            case 0:
                blob[random.integers(len(blob))] ^= 1 << int(random.integers(8))
            case 1:
                blob[random.integers(min(64, len(blob)))] = int(random.integers(256))
            case 2:  # one of the four counts
                offset, width = [(8, 4), (12, 4), (16, 8), (24, 8)][random.integers(4)]
                changed_count = int.from_bytes(blob[offset : offset + width], "little") + int(random.integers(-2, 3))
                count = [changed_count, 0, 1, 2**30, 2**31, 2 ** (8 * width) - 1][random.integers(6)]
                blob[offset : offset + width] = (count % 2 ** (8 * width)).to_bytes(width, "little")
            case 3:
                del blob[int(random.integers(1, len(blob) + 1)) :]
            case 4:
                blob += random.bytes(int(random.integers(1, 9)))
            case 5:
                blob[-int(random.integers(1, len(blob) + 1))] = 255
            case 6 | 7 if len(blob) > 64:  # in the payload, where much of it gives another matrix
                blob[random.integers(64, len(blob))] ^= 1 << int(random.integers(8))
        if len(blob) < 64:
            return bytes(blob)
    if random.integers(16):
        blob[32:36] = bytes(4)
        blob[32:36] = zlib.crc32(blob).to_bytes(4, "little")
    return bytes(blob)


def random_weight(random, shape, zeros, kind):
    """Draw a matrix with zeros; for storage in blocks the zeros are in blocks of four."""
    weight = random.normal(size=shape).astype(np.float32)
    size = 4 if kind == INT8_BLOCKS else 1
    weight.reshape(-1, size)[random.random(weight.size // size) < zeros] = 0
    return weight


def linear_model(random):
    values = ["fp32", "fp16", "int8", INT8_BLOCKS][random.integers(4)]
    weight = random_weight(random, (12, 32), 0.7, values)
    bias = random.normal(size=12).astype(np.float32)
    node = helper.make_node("SparseLinear", ["x", "weight", "bias"], ["y"], domain="spdtool", activation="relu")
    inputs = {"x": random.normal(size=(5, 32)).astype(np.float32)}
    return node, {"weight": pack("weight", weight, values), "bias": bias}, "weight", inputs


KINDS = ["bert", "mpnet", "deberta-v2", "modernbert"]


def encoder_model(random):
    """One layer of some kind, hidden 8, inner 12."""
    kind, layers_kind = KINDS[random.integers(4)], ["fp16", INT8_BLOCKS][random.integers(2)]
    blobs = []

    def matrix(rows, columns):
        blobs.append(pack("matrix", random_weight(random, (rows, columns), 0.4, layers_kind), layers_kind))
        numbers(rows)

    def table(rows, columns, storage):
        blobs.append(pack("table", random_weight(random, (rows, columns), 0.4, storage), storage, table=True))

    def numbers(size, times=1):
        for _ in range(times):
            blobs.append(pack("numbers", random.random(size).astype(np.float32), "fp32"))

    table(20, 8, "fp16")
    if kind in ("bert", "mpnet"):
        table(10, 8, "int8")
    numbers(8, times=2)
    if kind == "modernbert":
        numbers(2, times=2)
        matrix(24, 8)
        matrix(8, 8)
        numbers(8, times=2)
        matrix(24, 8)
    else:
        if kind == "mpnet":
            table(5, 2, "fp16")
        if kind == "deberta-v2":
            table(5, 8, "int8")
            numbers(8, times=2)
        if kind != "bert":
            blobs.append(pack("buckets", np.arange(5, dtype=np.float32), "fp32"))
        for _ in range(4):
            matrix(8, 8)
        numbers(8, times=2)
        matrix(12, 8)
    matrix(8, 12)
    numbers(8, times=2)
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
        output=["first", "mean", "real", "all"][random.integers(4)],
        **({} if kind == "bert" else {"kind": kind}),
        **({"attention": "gl"[random.integers(2)], "window": 1} if kind == "modernbert" else {}),
    )
    inputs = {"ids": random.integers(0, 20, (3, 5)), "mask": random.integers(0, 2, (3, 5))}
    return node, dict(zip(names, blobs, strict=True)), names[random.integers(len(names))], inputs


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


def open_damaged_models(file, operator):
    """Open damaged models: the library must refuse exactly those that `unpack` refuses or of another shape."""
    refused = read = 0
    for seed in range(DAMAGED):
        random = np.random.default_rng(seed)
        node, constants, name, inputs = (linear_model if operator == "SparseLinear" else encoder_model)(random)
        session(file, node, constants, inputs).run(None, inputs)
        shape = unpack(constants[name]).shape
        blob = damaged(constants[name].tobytes(), random)
        try:
            weight = unpack(blob)
        except PackingError:
            weight = None
        constants[name] = np.frombuffer(blob, np.uint8)
        try:
            (y,) = session(file, node, constants, inputs).run(None, inputs)
        except RUNTIME_ERRORS as error:
            # A sound vector may hold what are no buckets.
            if weight is not None and weight.shape == shape and "buckets of distances" not in str(error):
                raise AssertionError(f"seed {seed}: packing.py reads it") from error
            refused += 1
            continue
        assert weight is not None, f"seed {seed}: read by the library, refused by packing.py"
        assert weight.shape == shape or operator == "SparseEncoder"
        if operator == "SparseLinear":
            with np.errstate(over="ignore"):
                expected = np.maximum(inputs["x"].astype(np.float64) @ weight.T + constants["bias"], 0)
            scale = np.abs(inputs["x"]).astype(np.float64) @ np.abs(weight.T) + 1
            is_representable = scale < 1e30
            tolerance = 0.05 if read_header(blob).block_bits else 1e-5  # blocks are multiplied in 8 bits
            assert (np.abs(y - expected) <= tolerance * scale)[is_representable].all(), f"seed {seed}"
        read += 1
    print(f"refused {refused}\nread {read}")  # noqa: T201


if __name__ == "__main__":
    open_damaged_models(*sys.argv[1:])
