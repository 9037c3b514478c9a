"""The ledger: matrices of real files, requests to the process, derived values. No durations asserted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from spdtool.bench import engines, ledger
from spdtool.bench.ledger import PrunedMatrix, SparseFile
from spdtool.errors import SpdError
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.run.records import MachinePeak

PREFIX = "bert.encoder.layer."
OPERATOR = ("spdtool", "SparseProductTime")
KINDS = {
    "attention.self.query": (32, 32), "attention.self.key": (32, 32), "attention.self.value": (32, 32),
    "attention.output.dense": (32, 32), "intermediate.dense": (64, 32), "output.dense": (32, 64),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """The plain ONNX file of a student with exactly 75 % zeros in every matrix."""
    folder = tmp_path_factory.mktemp("student")
    model = toys.bert()
    with torch.no_grad():
        for weight in find_prunable_weights(model).values():
            weight.view(-1)[: 3 * weight.numel() // 4] = 0
    save_model(model, toys.tokenizer(), folder / "checkpoint")
    Onnx().export(folder / "checkpoint", folder, toys.recipe())
    return folder / "onnx/model.onnx"


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """An ONNX file with one packed matrix (100 bytes) and one plain matrix."""
    packed = numpy_helper.from_array(np.zeros(100, np.uint8), PREFIX + "0.intermediate.dense.weight")
    plain = numpy_helper.from_array(np.zeros((32, 32), np.float32), PREFIX + "0.attention.self.key.weight")
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [100])
    node = helper.make_node("Identity", [packed.name], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [y], [packed, plain])), tmp_path / "sparse.onnx")
    return tmp_path / "sparse.onnx"


def test_the_pruned_matrices_of_a_file_are_found_with_their_counts(dense: Path) -> None:
    matrices = {matrix.name: matrix for matrix in ledger.read_pruned_matrices(dense, None)}
    assert set(matrices) == {f"{PREFIX}{layer}.{kind}.weight" for layer in (0, 1) for kind in KINDS}
    for layer in (0, 1):
        for kind, (rows, columns) in KINDS.items():
            matrix = matrices[f"{PREFIX}{layer}.{kind}.weight"]
            expected = PrunedMatrix(matrix.name, rows, columns, rows * columns // 4, 4 * rows * columns, None)
            assert matrix == expected
            assert (matrix.density, matrix.layer) == (0.25, f"{PREFIX}{layer}")


def test_a_matrix_that_is_used_twice_is_listed_once_by_name(tmp_path: Path, toys: ModuleType) -> None:
    """DeBERTa uses its query and key matrices twice, and the exporter folds large ones into two constants."""
    model = toys.classifier("deberta-v2", layers=1, hidden_size=64, intermediate_size=128, position_buckets=16)
    for weight in find_prunable_weights(model).values():
        weight.data.view(-1)[::2] = 0
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    Onnx().export(tmp_path / "checkpoint", tmp_path, toys.recipe())
    names = [matrix.name for matrix in ledger.read_pruned_matrices(tmp_path / "onnx/model.onnx", None)]
    assert sorted(names) == sorted(find_prunable_weights(model))
    shapes = [tuple(tensor.dims) for tensor in onnx.load(tmp_path / "onnx/model.onnx").graph.initializer]
    assert shapes.count((64, 64)) == 5, "query, key, value, output and the pooler"


def test_the_packed_bytes_equal_those_of_the_file(dense: Path, sparse: Path) -> None:
    packed_bytes = {matrix.name: matrix.sparse_bytes for matrix in ledger.read_pruned_matrices(dense, sparse)}
    assert packed_bytes.pop(PREFIX + "0.intermediate.dense.weight") == 100
    assert set(packed_bytes.values()) == {None}
    assert ledger.has_packed_weights(sparse)
    assert not ledger.has_packed_weights(dense)


def test_weights_are_read_as_torch_stores_them(dense: Path) -> None:
    checkpoint = load_model(dense.parent.parent / "checkpoint")
    for name, weight in ledger.read_dense_weights(dense).items():
        if name.startswith(PREFIX):
            np.testing.assert_array_equal(weight, checkpoint.get_parameter(name).detach().numpy())


def test_a_dense_product_is_that_product() -> None:
    draw = np.random.default_rng(0)
    weight, x = draw.standard_normal((5, 3), np.float32), draw.standard_normal((4, 3), np.float32)
    session = onnxruntime.InferenceSession(ledger.dense_model(weight), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.T, rtol=1e-5)


def test_a_sparse_product_is_timed_by_one_node_of_the_operator() -> None:
    proto = onnx.load_from_string(ledger.sparse_model(np.arange(9, dtype=np.uint8), 32, OPERATOR))
    (node,) = proto.graph.node
    assert (node.domain, node.op_type, list(node.input)) == ("spdtool", "SparseProductTime", ["repeats", "weight"])
    assert [(attribute.name, attribute.i) for attribute in node.attribute] == [("tokens", 32)]
    (weight,) = map(numpy_helper.to_array, proto.graph.initializer)
    assert weight.tolist() == list(range(9))


def test_the_fixed_cost_of_the_runtime_is_taken_off_a_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([{"ms": 0.5}, {"ms": 0.125}, {"ms": 0.1}, {"ms": 0.2}])
    monkeypatch.setattr(ledger, "time_turn", lambda call, seconds: next(turns))
    time_product = ledger.dense_turn(np.ones((4, 3), dtype=np.float32), 32)
    assert time_product() == 0.375
    assert time_product() == ledger.MIN_MS


def test_an_entry_derives_operations_ratio_and_bound() -> None:
    matrix = PrunedMatrix("a.layer.3.x.weight", 100, 200, 2000, 80_000, 6000)
    times = {10: {"dense": [2.0, 1.0, 4.0], "sparse": [1.0, 0.5, 0.5]}}
    entry = ledger.ledger_entry(matrix, times, MachinePeak(flops=1e9, bandwidth=1e9))
    assert (entry.layer, entry.density, entry.sparse_bytes) == ("a.layer.3", 0.1, 6000)
    assert entry.products[10].model_dump() == {
        "dense_us": 2000,
        "dense_flops": 2 * 20_000 * 10 / 0.002,
        "sparse_us": 500,
        "sparse_flops": 2 * 2000 * 10 / 0.0005,
        "ratio": 2.0,  # the median of 2, 2 and 8: in pairs, not 2000 / 500
        "bound_us": pytest.approx(40),
        "bound_by": "flops",
    }
    slow = ledger.ledger_entry(matrix, times, MachinePeak(flops=1e9, bandwidth=1e6)).products[10]
    assert (slow.bound_us, slow.bound_by) == (pytest.approx(6000), "bandwidth")
    plain = ledger.ledger_entry(
        PrunedMatrix("x", 1, 1, 1, 4, None),
        {10: {"dense": [1.0], "sparse": None}},
        MachinePeak(flops=1e9, bandwidth=1e9),
    )
    assert plain.products[10].sparse_us is plain.products[10].ratio is None


def test_the_ledger_is_measured_in_a_process_once_for_each_shape(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = []
    ask = engines.EngineProcess.ask

    def listen(self: Any, request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return {"flops": 1e9, "bandwidth": 1e9} if "machine" in request else ask(self, request)

    monkeypatch.setattr(engines.EngineProcess, "ask", listen)
    machines, entries = ledger.measure_ledger(dense, None, [2])
    peak = MachinePeak(flops=1e9, bandwidth=1e9)
    assert machines == {2: peak, 1: peak}
    assert [request["machine"] for request in requests[:2]] == [2, 1]
    assert [(request["matrix"], request["tokens"]) for request in requests[3:]] == [
        (f"{PREFIX}0.{kind}.weight", tokens)
        for kind in ("attention.self.query", "intermediate.dense", "output.dense")
        for tokens in (32, 128)
    ]
    assert len(entries) == 12
    query, key, *_ = entries
    assert query.products == key.products
    assert query.products[32].dense_us > 0


def test_dense_and_sparse_products_are_timed_in_turns(
    dense: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs replace both products and record the order of the calls; the operator is not needed."""
    calls: list[str] = []
    products: list[Any] = []

    def record_product(name: str, weight: np.ndarray, tokens: int, file: SparseFile | None = None) -> Any:
        products.append((name, weight.size, tokens, () if file is None else tuple(file.libraries)))
        return lambda: calls.append(name) or float(len(calls))

    monkeypatch.setattr(ledger, "dense_turn", functools.partial(record_product, "dense"))
    monkeypatch.setattr(ledger, "sparse_turn", functools.partial(record_product, "sparse"))
    responses: list[dict[str, Any]] = []
    requests = [
        {"dense": str(dense), "sparse": {"path": str(sparse), "libraries": ["lib.so"], "operator": OPERATOR}},
        {"matrix": PREFIX + "0.intermediate.dense.weight", "tokens": 32, "rounds": 3},
        {"matrix": PREFIX + "0.attention.self.key.weight", "tokens": 32, "rounds": 2},
    ]
    ledger.run_ledger(map(json.dumps, requests), responses.append)
    assert [(name, tokens, libraries) for name, _, tokens, libraries in products] == [
        ("dense", 32, ()),
        ("sparse", 32, ("lib.so",)),
        ("dense", 32, ()),
    ]
    assert products[1][1] == 100  # the packed bytes
    assert calls == ["dense", "sparse"] * 4 + ["dense"] * 3
    assert responses == [{}, {"dense": [3, 5, 7], "sparse": [4, 6, 8]}, {"dense": [10, 11], "sparse": None}]


def test_an_operator_that_is_not_there_is_a_clear_error(dense: Path, sparse: Path) -> None:
    with pytest.raises(SpdError, match="single products cannot be timed: .*SparseProductTime"):
        ledger.measure_ledger(dense, SparseFile(str(sparse), (), OPERATOR), [])


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PEAK_PRODUCTS", ((8, 16, 16),))
    monkeypatch.setattr(ledger, "COPIED_BYTES", 2**16)
    monkeypatch.setattr(ledger, "PEAK_SECONDS", 0)
    assert ledger.measure_peak(2) > 1e3
    assert ledger.measure_bandwidth(2) > 1e3
