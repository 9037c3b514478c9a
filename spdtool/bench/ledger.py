"""The sparsity ledger: of each pruned matrix, what its zeros cost and what they buy on this machine.

A matrix is taken from the exported files themselves: the dense form from the student's plain ONNX file, the sparse form
as the packed constant of the same name in the file that has the operators. The dense form becomes an onnxruntime model
of one product, whose fixed cost (what a model that does nothing takes) is taken off; the sparse form is timed by an
operator of the plug-in, on activations that stand as they do inside the encoder. Both are timed in turns with one
thread, in a process of its own. Beside them stands the bound: no product can be
faster than its multiplications at the machine's peak, or than reading its weights at the machine's bandwidth. Both are
measured here as well, in the same process.

The process speaks as `latency.py` says:

    {"machine": threads}                       ->  {"flops": per second, "bandwidth": bytes per second}
    {"dense": file, "sparse": file or null, "libraries": [...]}  ->  {}
    {"matrix": name, "tokens": 32, "rounds": 7}    ->  {"dense": [ms of each round], "sparse": [...] or null}
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.bench import latency
from spdtool.errors import SpdError
from spdtool.export import runtime

TOKENS = (32, 128)
ROUNDS = 7
TURN = 0.004  # seconds for one form at a stretch
LEAST = 1e-4  # milliseconds that a product is said to take at least
FEWEST_ZEROS = 0.01  # share of a matrix from which it counts as pruned
DOMAIN, OPERATOR = "spdtool", "SparseProductTime"  # repeats int64, packed weight uint8 -> seconds of one product
PRODUCTS = ((512, 1024, 1024), (1024, 1024, 1024), (1024, 768, 3072))  # rows, in, out, of which the best is the peak
PEAK_SECONDS = 0.15  # for each of them
COPIED = 64 * 2**20  # bytes that each thread copies: more than any cache
COPIES = 8
COMMAND = (sys.executable, "-P", "-m", "spdtool.bench.ledger")
LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Machine:
    """The best that was measured: float32 operations a second, and bytes a second (read plus written) of a copy."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Matrix:
    """A pruned matrix as the files hold it.

    Attributes:
        rows, columns: outputs and inputs of the layer.
        dense_bytes: in the plain file. sparse_bytes: in the file with the operators; None: not there, or stored dense.
    """

    name: str
    rows: int
    columns: int
    nonzeros: int
    dense_bytes: int
    sparse_bytes: int | None

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return self.nonzeros / (self.rows * self.columns)

    @property
    def layer(self) -> str:
        """What it is grouped under: the name up to its first number (`bert.encoder.layer.3`), or all of it."""
        found = LAYER.match(self.name)
        return found[1] if found else self.name


def matrices(dense: Path, sparse: Path | None) -> list[Matrix]:
    """The pruned matrices of an exported student, in the order of its file."""
    packed = _packed(sparse) if sparse else {}
    return [
        Matrix(
            name,
            weight.shape[0],
            weight.shape[1],
            int(np.count_nonzero(weight)),
            weight.nbytes,
            _length(packed.get(name)),
        )
        for name, weight in _weights(dense).items()
        if np.count_nonzero(weight) <= (1 - FEWEST_ZEROS) * weight.size
    ]


def has_packed(file: Path) -> bool:
    """Whether a file holds matrices in the packed form."""
    return bool(_packed(file))


def write(
    dense: Path, sparse: Path | None, libraries: Sequence[str], threads: Sequence[int], timeout: float = latency.TIMEOUT
) -> tuple[dict[int, Machine], list[dict[str, Any]]]:
    """Measure the machine, and every pruned matrix of the student.

    Args:
        dense: the student's plain ONNX file. sparse: the file with the operators, if there is one.
        threads: the machine is measured with each of these; the matrices with one.

    Returns:
        threads to machine, and an entry for each matrix (see `entry`).

    Raises:
        SpdError: the process died, or a product could not be run.
    """
    found = matrices(dense, sparse)
    times: dict[tuple[Any, ...], dict[str, Any]] = {}
    with latency.worker("single products", timeout, COMMAND, "switch it off with bench.ledger=false") as worker:
        machines = {count: Machine(**worker.ask({"machine": count})) for count in dict.fromkeys((*threads, 1))}
        worker.ask({"dense": str(dense), "sparse": str(sparse) if sparse else None, "libraries": list(libraries)})
        for matrix in found:
            for tokens in TOKENS:
                if (*_kind(matrix), tokens) not in times:
                    asked = {"matrix": matrix.name, "tokens": tokens, "rounds": ROUNDS}
                    times[(*_kind(matrix), tokens)] = worker.ask(asked)
    of_each = [{tokens: times[(*_kind(matrix), tokens)] for tokens in TOKENS} for matrix in found]
    return machines, [entry(matrix, timed, machines[1]) for matrix, timed in zip(found, of_each, strict=True)]


def entry(matrix: Matrix, times: Mapping[int, Mapping[str, Any]], machine: Machine) -> dict[str, Any]:
    """What the ledger says of one matrix.

    Args:
        times: tokens to `dense` and `sparse` milliseconds of each round.

    Returns:
        counts and bytes, and for each number of tokens under `products`: microseconds of the dense and of the sparse
        product and of the bound, their operations a second (of the sparse one, those on weights that are there), and
        how many times faster the sparse one is, in paired rounds.
    """
    products = {}
    for tokens, timed in times.items():
        dense, sparse = np.array(timed["dense"]), timed["sparse"] and np.array(timed["sparse"])
        all_work, real_work = (2.0 * count * tokens for count in (matrix.rows * matrix.columns, matrix.nonzeros))
        read = matrix.sparse_bytes or 4 * matrix.nonzeros
        limits = {"flops": real_work / machine.flops, "bandwidth": read / machine.bandwidth}
        products[str(tokens)] = {
            "dense_us": 1e3 * float(np.median(dense)),
            "dense_flops": all_work / (float(np.median(dense)) / 1e3),
            "sparse_us": None if sparse is None else 1e3 * float(np.median(sparse)),
            "sparse_flops": None if sparse is None else real_work / (float(np.median(sparse)) / 1e3),
            "ratio": None if sparse is None else float(np.median(dense / sparse)),
            "bound_us": 1e6 * max(limits.values()),
            "bound_by": max(limits, key=lambda name: limits[name]),
        }
    facts = {"name": matrix.name, "layer": matrix.layer, "rows": matrix.rows, "columns": matrix.columns}
    facts |= {"nonzeros": matrix.nonzeros, "density": matrix.density}
    return facts | {"dense_bytes": matrix.dense_bytes, "sparse_bytes": matrix.sparse_bytes, "products": products}


def dense_model(weight: np.ndarray) -> bytes:
    """A model of one dense product: x [tokens, in] -> [tokens, out].

    Args:
        weight: float32 [out, in], stored transposed, as the exported file stores it.
    """
    outputs, inputs = weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])
    stored = numpy_helper.from_array(np.ascontiguousarray(weight.T), "weight")
    bias = numpy_helper.from_array(np.zeros(outputs, dtype=np.float32), "bias")
    return _model([helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])], [x], [y], [stored, bias])


def sparse_model(packed: np.ndarray, tokens: int) -> bytes:
    """A model that times one sparse product: repeats int64 [1] -> float32 [1], seconds of one.

    Args:
        packed: uint8, a matrix as the file stores it.
    """
    repeats = helper.make_tensor_value_info("repeats", TensorProto.INT64, [1])
    seconds = helper.make_tensor_value_info("seconds", TensorProto.FLOAT, [1])
    node = helper.make_node(OPERATOR, ["repeats", "weight"], ["seconds"], domain=DOMAIN, tokens=tokens)
    return _model([node], [repeats], [seconds], [numpy_helper.from_array(packed, "weight")])


def idle_model(inputs: int) -> bytes:
    """A model that takes what a product takes, and does nothing: what onnxruntime costs by itself."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", inputs]) for name in "xy")
    return _model([helper.make_node("Identity", ["x"], ["y"])], [x], [y], [])


def machine(threads: int) -> dict[str, float]:
    """Measure this machine; see `Machine`."""
    return {"flops": _peak(threads), "bandwidth": _bandwidth(threads)}


def work(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """The side of the process: measure the machine, open the files, time one matrix for each request."""
    weights: dict[str, np.ndarray] = {}
    packed: dict[str, np.ndarray] = {}
    libraries: list[str] = []
    for line in requests:
        request = json.loads(line)
        try:
            if "machine" in request:
                answer(machine(request["machine"]))
            elif "dense" in request:
                weights, libraries = _weights(Path(request["dense"])), request["libraries"]
                packed = _packed(Path(request["sparse"])) if request["sparse"] else {}
                answer({})
            else:
                name, tokens = request["matrix"], request["tokens"]
                forms = [_dense(weights[name], tokens)]
                if name in packed:
                    forms.append(_sparse(packed[name], tokens, libraries))
                answer(dict(zip(("dense", "sparse"), [*_in_turns(forms, request["rounds"]), None], strict=False)))
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


Timed = Callable[[], float]
"""One turn of a form; gives the milliseconds of one product."""


def _in_turns(forms: Sequence[Timed], rounds: int) -> list[list[float]]:
    for form in forms:
        form()
    measured = [[form() for form in forms] for _ in range(rounds)]
    return [list(times) for times in zip(*measured, strict=True)]


def _dense(weight: np.ndarray, tokens: int) -> Timed:
    product, idle = (
        _product(model, weight.shape[1], tokens) for model in (dense_model(weight), idle_model(weight.shape[1]))
    )

    def timed() -> float:
        whole, fixed = (latency.turn(form, TURN)["ms"] for form in (product, idle))
        return max(whole - fixed, LEAST)

    return timed


def _sparse(packed: np.ndarray, tokens: int, libraries: Sequence[str]) -> Timed:
    session = runtime.open_session(sparse_model(packed, tokens), threads=1, libraries=libraries)

    def seconds(repeats: int) -> float:
        return float(session.run(None, {"repeats": np.array([repeats])})[0][0])

    repeats = 1 + int(TURN / max(seconds(3), 1e-9))
    return lambda: 1e3 * seconds(repeats)


def _product(model: bytes, inputs: int, tokens: int, threads: int = 1) -> Callable[[], Any]:
    session = runtime.open_session(model, threads=threads)
    x = np.random.default_rng(0).standard_normal((tokens, inputs), dtype=np.float32)
    return lambda: session.run(None, {"x": x})


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto],
) -> bytes:
    graph = helper.make_graph(nodes, "product", inputs, outputs, constants)
    domains = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def _peak(threads: int) -> float:
    best = 0.0
    for rows, inputs, outputs in PRODUCTS:
        call = _product(dense_model(np.ones((outputs, inputs), dtype=np.float32)), inputs, rows, threads=threads)
        call()
        best = max(best, 2 * rows * inputs * outputs / (latency.turn(call, PEAK_SECONDS)["least"] / 1e3))
    return best


def _bandwidth(threads: int) -> float:
    sources = [np.ones(COPIED // 8) for _ in range(threads)]
    targets = [np.zeros(COPIED // 8) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:  # numpy gives up the interpreter lock while it copies
        for _ in range(COPIES):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - start)
    return 2 * threads * COPIED / best


def _weights(file: Path) -> dict[str, np.ndarray]:
    """Parameter name to float32 [out, in], of every constant matrix that a product of the file multiplies with."""
    graph = onnx.load(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    found = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            tensor = tensors[node.input[1]]
            array = numpy_helper.to_array(tensor)
            as_torch = any(entry.name == "transB" and entry.i for entry in node.attribute)
            found[_parameters(tensor)[0]] = array if as_torch else array.T
    return found


def _packed(file: Path) -> dict[str, np.ndarray]:
    """Parameter name to packed uint8, of every matrix that the file stores so."""
    initializers = onnx.load(file).graph.initializer
    packed = [tensor for tensor in initializers if tensor.data_type == TensorProto.UINT8 and len(tensor.dims) == 1]
    return {name: numpy_helper.to_array(tensor) for tensor in packed for name in _parameters(tensor)}


def _parameters(tensor: onnx.TensorProto) -> list[str]:
    """The parameters that a constant holds, as `export/onnx.py` notes them; this process does without its torch."""
    listed = [entry.value for entry in tensor.metadata_props if entry.key == "parameters"]
    return listed[0].split() if listed else [tensor.name.removesuffix(".T")]


def _kind(matrix: Matrix) -> tuple[Any, ...]:
    """Matrices of one kind share a timing: their shape, whole percent of zeros, and whether there is a sparse form."""
    return matrix.rows, matrix.columns, round(100 * matrix.density), matrix.sparse_bytes is not None


def _length(packed: np.ndarray | None) -> int | None:
    return None if packed is None else packed.nbytes


if __name__ == "__main__":
    latency.speak(work)
