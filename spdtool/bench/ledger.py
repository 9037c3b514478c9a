"""The sparsity ledger: for every pruned matrix, what its zeros cost and what they buy on this machine.

The matrices come from the exported files themselves: the dense form from the student's plain ONNX
file, the sparse form from the packed constant of the same name in the file with custom operators.
The dense form becomes an onnxruntime model of one product; what a model that does nothing takes is
subtracted. The sparse form is timed by an operator of the plug-in, on activations that lie in
memory as they do inside the encoder. Both take turns on one thread, in a process of their own.
Beside them stands a bound: no product can be faster than its multiplications at the machine's peak,
or than reading its weights at the machine's bandwidth. The same process measures both.

Requests and answers of the process, in the form that `engines.py` describes:

    {"machine": threads}                                         ->  {"flops": a second, "bandwidth": bytes a second}
    {"dense": file, "sparse": null}                              ->  {}
    {"dense": file, "sparse": {...sparse file...}}               ->  {}
    {"matrix": name, "tokens": 32, "rounds": 7}                  ->  {"dense": [ms of each round], "sparse": or null}
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdtool.bench.engines import TIMEOUT, Answer, EngineProcess, answer_stdin, start_process, time_turn
from spdtool.errors import SpdError
from spdtool.export import onnx_session
from spdtool.run.records import LedgerEntry, MachinePeak, ProductTimes

TOKENS = (32, 128)
ROUNDS = 7
TURN = 0.004  # seconds of one turn
MIN_MS = 1e-4  # shortest time of a product: the difference of two timings may come out below 0
MIN_ZEROS = 0.01  # share of zeros from which a matrix counts as pruned
# Rows, inputs and outputs of products; the fastest of them is the machine's peak.
PEAK_PRODUCTS = ((512, 1024, 1024), (1024, 1024, 1024), (1024, 768, 3072))
PEAK_SECONDS = 0.15  # for each of them
COPIED_BYTES = 64 * 2**20  # that each thread copies: more than any cache holds
COPIES = 8
LEDGER_COMMAND = (sys.executable, "-P", "-m", "spdtool.bench.ledger")
LAYER_NAME = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class SparseFile:
    """A file with packed matrices, and what it takes to time one of them.

    Attributes:
        libraries: libraries of custom operators.
        operator: domain and name; see `Target.timing_operator`.
    """

    path: str
    libraries: tuple[str, ...]
    operator: tuple[str, str]


TakeTurn: TypeAlias = Callable[[], float]
"""Run a product for one turn and return the milliseconds of one."""


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned matrix as the files hold it.

    Attributes:
        rows, columns: outputs and inputs of the layer.
        dense_bytes: in the plain file.
        sparse_bytes: in the file with custom operators; None if it is not there, or stored dense.
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
        """The name up to its first number (`bert.encoder.layer.3`), or all of it."""
        match = LAYER_NAME.match(self.name)
        return match[1] if match else self.name

    @property
    def timing_key(self) -> tuple[int, int, int, bool]:
        """Shape, whole percent of density, and whether there is a sparse form: equal keys share a timing."""
        return self.rows, self.columns, round(100 * self.density), self.sparse_bytes is not None


def read_pruned_matrices(dense: Path, sparse: Path | None) -> list[PrunedMatrix]:
    """Read the pruned matrices of an exported student, in the order of its file."""
    packed = read_packed_weights(sparse) if sparse else {}
    matrices = []
    for name, weight in read_dense_weights(dense).items():
        nonzeros = int(np.count_nonzero(weight))
        if nonzeros <= (1 - MIN_ZEROS) * weight.size:
            rows, columns = weight.shape
            sparse_bytes = packed[name].nbytes if name in packed else None
            matrices.append(PrunedMatrix(name, rows, columns, nonzeros, weight.nbytes, sparse_bytes))
    return matrices


def has_packed_weights(file: Path) -> bool:
    """Whether a file holds matrices in packed form."""
    return bool(read_packed_weights(file))


def measure_ledger(
    dense: Path, sparse: SparseFile | None, threads: Sequence[int], timeout: float = TIMEOUT
) -> tuple[dict[int, MachinePeak], list[LedgerEntry]]:
    """Measure the machine, and every pruned matrix of the student on one thread.

    Args:
        dense: the student's plain ONNX file.
        sparse: the file with packed matrices, if there is one.
        threads: the machine is measured with each of these numbers.

    Returns:
        number of threads to the machine's peak, and the ledger.

    Raises:
        SpdError: the process died, or a product could not be run.
    """
    matrices = read_pruned_matrices(dense, None if sparse is None else Path(sparse.path))
    with start_process("single products", timeout, LEDGER_COMMAND, "switch it off with bench.ledger=false") as process:
        machines = {}
        for count in dict.fromkeys((*threads, 1)):
            machines[count] = MachinePeak.model_validate(process.ask({"machine": count}))
        process.ask({"dense": str(dense), "sparse": None if sparse is None else asdict(sparse)})
        times_by_key: dict[tuple[int, int, int, bool], dict[int, Answer]] = {}
        entries = []
        for matrix in matrices:
            if matrix.timing_key not in times_by_key:
                times_by_key[matrix.timing_key] = time_matrix(process, matrix)
            entries.append(ledger_entry(matrix, times_by_key[matrix.timing_key], machines[1]))
    return machines, entries


def time_matrix(process: EngineProcess, matrix: PrunedMatrix) -> dict[int, Answer]:
    """Time one matrix at every number of tokens."""
    times = {}
    for tokens in TOKENS:
        times[tokens] = process.ask({"matrix": matrix.name, "tokens": tokens, "rounds": ROUNDS})
    return times


def ledger_entry(
    matrix: PrunedMatrix, times: Mapping[int, Mapping[str, Sequence[float] | None]], machine: MachinePeak
) -> LedgerEntry:
    """Compute the ledger of one matrix.

    Args:
        times: number of tokens to the `dense` and `sparse` milliseconds of each round.
    """
    products = {}
    for tokens, milliseconds in times.items():
        products[tokens] = product_times(matrix, tokens, milliseconds, machine)
    return LedgerEntry(
        name=matrix.name,
        layer=matrix.layer,
        rows=matrix.rows,
        columns=matrix.columns,
        nonzeros=matrix.nonzeros,
        density=matrix.density,
        dense_bytes=matrix.dense_bytes,
        sparse_bytes=matrix.sparse_bytes,
        products=products,
    )


def product_times(
    matrix: PrunedMatrix, tokens: int, milliseconds: Mapping[str, Sequence[float] | None], machine: MachinePeak
) -> ProductTimes:
    """Compute times, operations a second, bound and paired ratio of one matrix at one number of tokens."""
    dense = np.array(milliseconds["dense"])
    # A product takes one multiplication and one addition for each weight and token.
    dense_operations = 2.0 * matrix.rows * matrix.columns * tokens
    sparse_operations = 2.0 * matrix.nonzeros * tokens
    weight_bytes = matrix.sparse_bytes or 4 * matrix.nonzeros
    limits = {"flops": sparse_operations / machine.flops, "bandwidth": weight_bytes / machine.bandwidth}
    bound_by = max(limits, key=lambda name: limits[name])
    dense_ms = float(np.median(dense))
    times = ProductTimes(
        dense_us=1e3 * dense_ms,
        dense_flops=dense_operations / (dense_ms / 1e3),
        sparse_us=None,
        sparse_flops=None,
        ratio=None,
        bound_us=1e6 * limits[bound_by],
        bound_by=bound_by,
    )
    if milliseconds["sparse"]:
        sparse = np.array(milliseconds["sparse"])
        sparse_ms = float(np.median(sparse))
        times.sparse_us = 1e3 * sparse_ms
        times.sparse_flops = sparse_operations / (sparse_ms / 1e3)
        # Round by round: both forms met the same state of the machine.
        times.ratio = float(np.median(dense / sparse))
    return times


def run_ledger(requests: Iterable[str], answer: Callable[[Answer], None]) -> None:
    """Answer requests in the process: measure the machine, open the files, time one matrix a request."""
    weights: dict[str, np.ndarray] = {}
    packed: dict[str, np.ndarray] = {}
    sparse: SparseFile | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if "machine" in request:
                threads = request["machine"]
                answer({"flops": measure_peak(threads), "bandwidth": measure_bandwidth(threads)})
            elif "dense" in request:
                weights = read_dense_weights(Path(request["dense"]))
                if request["sparse"] is not None:
                    sparse = SparseFile(**request["sparse"])
                    packed = read_packed_weights(Path(sparse.path))
                answer({})
            else:
                name, tokens = request["matrix"], request["tokens"]
                forms = {"dense": dense_turn(weights[name], tokens)}
                if sparse is not None and name in packed:
                    forms["sparse"] = sparse_turn(packed[name], tokens, sparse)
                answer({"sparse": None} | take_turns(forms, request["rounds"]))
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


def take_turns(forms: Mapping[str, TakeTurn], rounds: int) -> dict[str, list[float]]:
    """Time the forms in interleaved rounds, after one turn of each that is not counted."""
    for take_turn in forms.values():
        take_turn()
    milliseconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, take_turn in forms.items():
            milliseconds[name].append(take_turn())
    return milliseconds


def dense_turn(weight: np.ndarray, tokens: int) -> TakeTurn:
    """Prepare a dense product; what onnxruntime takes for a model that does nothing is subtracted."""
    inputs = weight.shape[1]
    # A call of onnxruntime costs microseconds, as much as a small sparse product takes in all.
    product = open_product(dense_model(weight), inputs, tokens)
    idle = open_product(idle_model(inputs), inputs, tokens)

    def take_turn() -> float:
        return max(time_turn(product, TURN)["ms"] - time_turn(idle, TURN)["ms"], MIN_MS)

    return take_turn


def sparse_turn(packed: np.ndarray, tokens: int, sparse: SparseFile) -> TakeTurn:
    """Prepare a sparse product, which the operator repeats and times itself."""
    model = sparse_model(packed, tokens, sparse.operator)
    session = onnx_session.open_session(model, threads=1, libraries=sparse.libraries)

    def product_seconds(repeats: int) -> float:
        return float(session.run(None, {"repeats": np.array([repeats])})[0][0])

    # Many products a call, timed inside the operator: the call itself is not what is measured.
    repeats = 1 + int(TURN / max(product_seconds(3), 1e-9))
    return lambda: 1e3 * product_seconds(repeats)


def open_product(model: bytes, inputs: int, tokens: int, threads: int = 1) -> Callable[[], object]:
    """Open a model of one input x [tokens, inputs] as a function that runs it."""
    session = onnx_session.open_session(model, threads=threads)
    x = np.random.default_rng(0).standard_normal((tokens, inputs), dtype=np.float32)
    return lambda: session.run(None, {"x": x})


def dense_model(weight: np.ndarray) -> bytes:
    """Build a model of one dense product: x [tokens, in] -> [tokens, out].

    Args:
        weight: float32 [out, in]; stored transposed, as the exported file stores it.
    """
    outputs, inputs = weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])
    transposed = numpy_helper.from_array(np.ascontiguousarray(weight.T), "weight")
    bias = numpy_helper.from_array(np.zeros(outputs, dtype=np.float32), "bias")
    return serialize_model([helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])], [x], [y], [transposed, bias])


def sparse_model(packed: np.ndarray, tokens: int, operator: tuple[str, str]) -> bytes:
    """Build a model that times one sparse product: repeats int64 [1] -> float32 [1], seconds of one.

    Args:
        packed: uint8, a matrix as the file stores it.
        operator: domain and name.
    """
    domain, name = operator
    repeats = helper.make_tensor_value_info("repeats", TensorProto.INT64, [1])
    seconds = helper.make_tensor_value_info("seconds", TensorProto.FLOAT, [1])
    node = helper.make_node(name, ["repeats", "weight"], ["seconds"], domain=domain, tokens=tokens)
    return serialize_model([node], [repeats], [seconds], [numpy_helper.from_array(packed, "weight")])


def idle_model(inputs: int) -> bytes:
    """Build a model that takes what a product takes, and does nothing: the fixed cost of onnxruntime."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", inputs]) for name in "xy")
    return serialize_model([helper.make_node("Identity", ["x"], ["y"])], [x], [y], [])


def serialize_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto],
) -> bytes:
    """Serialize a small model."""
    graph = helper.make_graph(nodes, "product", inputs, outputs, constants)
    domains = [helper.make_opsetid("", 18)]
    domains += [helper.make_opsetid(node.domain, 1) for node in nodes if node.domain]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def measure_peak(threads: int) -> float:
    """Measure the highest number of float32 operations a second, over a few large products."""
    best = 0.0
    for rows, inputs, outputs in PEAK_PRODUCTS:
        weight = np.ones((outputs, inputs), dtype=np.float32)
        product = open_product(dense_model(weight), inputs, rows, threads=threads)
        product()  # the first call packs the weights
        seconds = time_turn(product, PEAK_SECONDS)["least"] / 1e3
        best = max(best, 2 * rows * inputs * outputs / seconds)
    return best


def measure_bandwidth(threads: int) -> float:
    """Measure the highest number of bytes a second, read plus written, of a copy."""
    sources = [np.ones(COPIED_BYTES // 8) for _ in range(threads)]
    targets = [np.zeros(COPIED_BYTES // 8) for _ in range(threads)]
    best_seconds = float("inf")
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the interpreter lock while it copies
        for _ in range(COPIES):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * threads * COPIED_BYTES / best_seconds


def read_dense_weights(file: Path) -> dict[str, np.ndarray]:
    """Read every constant matrix that a product multiplies with: parameter name to float32 [out, in]."""
    graph = onnx.load(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    weights = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            tensor = tensors[node.input[1]]
            array = numpy_helper.to_array(tensor)
            stored_as_in_torch = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            weights[parameter_names(tensor)[0]] = array if stored_as_in_torch else array.T
    return weights


def read_packed_weights(file: Path) -> dict[str, np.ndarray]:
    """Read every matrix that the file stores packed: parameter name to uint8."""
    packed = {}
    for tensor in onnx.load(file).graph.initializer:
        if tensor.data_type == TensorProto.UINT8 and len(tensor.dims) == 1:
            for name in parameter_names(tensor):
                packed[name] = numpy_helper.to_array(tensor)
    return packed


def parameter_names(tensor: onnx.TensorProto) -> list[str]:
    """Names of the parameters that a constant holds, from its metadata."""
    # export.graph.weights knows this too, but imports more than a timed process should hold.
    for entry in tensor.metadata_props:
        if entry.key == "parameters":
            return str(entry.value).split()
    return [tensor.name.removesuffix(".T")]


if __name__ == "__main__":
    answer_stdin(run_ledger)
