"""The gate on weights: every stored weight must equal the checkpoint's, up to the rounding of its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from spdtool.data import tokens as data
from spdtool.errors import GateError
from spdtool.export.gates.reference import DevSets, Reference
from spdtool.export.gates.weights import check_weight, check_weights
from spdtool.export.graph.weights import StoredWeight, find_unread_parameters
from spdtool.export.target import StorageFormats, Target
from spdtool.models.load import load_model, save_model
from spdtool.recipe.fields import Recipe

MATRIX = "bert.encoder.layer.0.output.dense.weight"
TABLE = "bert.embeddings.word_embeddings.weight"
BIAS = "bert.pooler.dense.bias"
RANDOM = np.random.default_rng(0)
WEIGHT = np.where(RANDOM.random((16, 24)) < 0.5, 0, RANDOM.normal(size=(16, 24))).astype(np.float32)


def rounded_rows(weight: np.ndarray, levels: int = 127, clip: float = 1.0) -> np.ndarray:
    """Round to int8 with one scale a row; values are clipped at `clip` times the largest weight."""
    scale = clip * np.abs(weight).max(axis=1, keepdims=True) / levels
    return np.asarray(np.clip(np.rint(weight / scale), -levels, levels) * scale, np.float32)


def planted_faults(rounding: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """Make rounded weights with faults that rounding does not explain."""
    stored = rounding(WEIGHT)
    noise = WEIGHT + (WEIGHT != 0) * 0.05 * np.abs(WEIGHT).mean() * RANDOM.normal(size=WEIGHT.shape)
    signs, filled, lost_weight, not_finite = stored.copy(), stored.copy(), stored.copy(), stored.copy()
    signs[:2] *= -1
    filled[tuple(np.argwhere(WEIGHT == 0)[0])] = 1e-12
    lost_weight[np.unravel_index(np.abs(WEIGHT).argmax(), WEIGHT.shape)] = 0
    not_finite[tuple(np.argwhere(WEIGHT != 0)[0])] = np.nan
    return {
        "noise": rounding(noise.astype(np.float32)),
        "scaled": stored * np.float32(1.01),
        "two rows' signs": signs,
        "permuted rows": stored[::-1],
        "a filled zero": filled,
        "a lost weight": lost_weight,
        "not finite": not_finite,
        "another shape": stored[1:],
    }


def test_rounding_of_the_format_passes_and_planted_faults_are_refused() -> None:
    formats: dict[str, tuple[Callable[[np.ndarray], np.ndarray], StoredWeight]] = {
        "fp32": (np.copy, StoredWeight("w", WEIGHT)),
        "fp16": (lambda weight: weight.astype(np.float16).astype(np.float32), StoredWeight("w", WEIGHT, "fp16")),
        "int8": (rounded_rows, StoredWeight("w", WEIGHT, "int8", 0)),
        "int6": (lambda weight: rounded_rows(weight, 31), StoredWeight("w", WEIGHT, "int6", 0, 31)),
        "7 bits": (lambda weight: rounded_rows(weight, 64), StoredWeight("w", WEIGHT, "int8", 0, 64)),
    }
    for name, (rounding, stored) in formats.items():
        check_weight(stored._replace(array=rounding(WEIGHT)), WEIGHT)
        for fault, array in planted_faults(rounding).items():
            try:
                check_weight(stored._replace(array=array), WEIGHT)
            except GateError:
                continue
            pytest.fail(f"{name}: {fault} passed")


def test_the_rounding_step_is_that_of_the_checkpoint() -> None:
    """A scale ten times too coarse is consistent in itself; the checkpoint's largest weight shows the fault."""
    coarse = rounded_rows(WEIGHT, 12)
    with pytest.raises(GateError, match="than int8 rounds"):
        check_weight(StoredWeight("w", coarse, "int8", 0), WEIGHT)


def test_a_small_weight_may_be_raised_to_one_step_but_not_more() -> None:
    weight = np.array([[1.0, 1e-4, -1e-9, 0.5]], np.float32)
    step = np.float32(1 / 127)
    raised = np.array([[1.0, step, -step, 64 * step]], np.float32)
    check_weight(StoredWeight("w", raised, "int8", 0), weight)
    fp16_weight = weight.astype(np.float16).astype(np.float32)
    fp16_weight[0, 2] = -(2.0**-24)
    check_weight(StoredWeight("w", fp16_weight, "fp16"), weight)
    for fault in (raised * [[1, 2, 1, 1]], raised * [[1, -1, 1, 1]]):
        with pytest.raises(GateError, match="1 of 4 weights"):
            check_weight(StoredWeight("w", fault.astype(np.float32), "int8", 0), weight)


def test_clipping_must_be_declared_and_is_bounded() -> None:
    clipped = StoredWeight("w", rounded_rows(WEIGHT, clip=0.9), "int8", 0)
    share = np.count_nonzero(np.abs(clipped.array - WEIGHT) > 0.01) / WEIGHT.size
    assert 0 < share < 0.1
    check_weight(clipped, WEIGHT, clipped_share=0.1)
    with pytest.raises(GateError, match="further from"):
        check_weight(clipped, WEIGHT)
    with pytest.raises(GateError, match="further from"):
        check_weight(clipped, WEIGHT, clipped_share=share / 2)
    negated = np.where(np.abs(WEIGHT) > 1, -clipped.array, clipped.array)
    with pytest.raises(GateError, match="further from"):
        check_weight(clipped._replace(array=negated), WEIGHT, clipped_share=0.1)


class Storing(Target):
    """A target that stores the given weights."""

    def __init__(self, weights: list[StoredWeight], formats: StorageFormats) -> None:
        self.weights, self.formats = weights, formats
        self.rounds_weights = self.rounds_arithmetic = formats.matrices != "fp32"

    def stored_weights(self, folder: Path) -> list[StoredWeight]:
        return self.weights

    def storage_formats(self, recipe: Recipe) -> StorageFormats:
        return self.formats


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Reference:
    folder, model = tmp_path_factory.mktemp("weights"), toys.bert()
    model.bert.pooler.dense.bias.data += 1
    save_model(model, toys.tokenizer(), folder)
    rows = data.encode_splits(toys.tokenizer(), {"dev": toys.rows(4)}, 32)
    return Reference(folder, DevSets(None, rows), Recipe())


def test_every_parameter_must_be_stored_in_the_requested_format(reference: Reference, tmp_path: Path) -> None:
    exact = StorageFormats("fp32", "fp32")
    parameters = dict(load_model(reference.checkpoint).named_parameters())
    arrays = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    weights = {name: StoredWeight(name, array) for name, array in arrays.items()}

    def check(changes: dict[str, StoredWeight | None], formats: StorageFormats = exact) -> int:
        stored = [weight for weight in (weights | changes).values() if weight is not None]
        return check_weights(Storing(stored, formats), reference, tmp_path)

    assert check({}) == 0
    assert check({"bert.encoder.layer.0.output.dense.bias": None}) == 0, "one of zeros, which exporters leave out"
    fp16_weight = arrays[MATRIX].astype(np.float16).astype(np.float32)
    as_half, as_int8 = StoredWeight(MATRIX, fp16_weight, "fp16"), StoredWeight(MATRIX, fp16_weight, "int8", 0)
    assert check({MATRIX: as_half}, StorageFormats("fp16", "int8")) == 0
    last_word = arrays[TABLE].copy()
    last_word[-1] += 1
    faults: list[tuple[str, dict[str, StoredWeight | None], StorageFormats]] = [
        (f"{BIAS}: the exported file does not store it", {BIAS: None}, exact),
        ("no such weight", {"other": StoredWeight("other", fp16_weight)}, exact),
        ("weights in the exported file are further", {"copy": StoredWeight(BIAS, arrays[BIAS] + 1e-6)}, exact),
        ("32 of 800 weights", {TABLE: StoredWeight(TABLE, last_word)}, exact),
        (f"{MATRIX}: the exported file stores it as fp16; fp32 was asked for", {MATRIX: as_half}, exact),
        ("stores it as int8; fp16 was asked for", {MATRIX: as_int8}, StorageFormats("fp16", "int8")),
    ]
    for message, changes, formats in faults:
        with pytest.raises(GateError, match=message):
            check(changes, formats)


def test_weights_that_become_zero_are_counted_if_allowed(reference: Reference, tmp_path: Path) -> None:
    weights = []
    for name, parameter in load_model(reference.checkpoint).named_parameters():
        array = parameter.detach().numpy().copy()
        if name == MATRIX:
            step = np.abs(array).max() / 127
            array[np.abs(array) < 0.4 * step] = 0
            expected = int(np.count_nonzero(array == 0))
        weights.append(StoredWeight(name, array, "int8" if name == MATRIX else "fp32"))
    assert expected > 0
    target = Storing(weights, StorageFormats("int8", "int8"))
    assert check_weights(target, reference, tmp_path) == expected
    target.rounds_arithmetic = False
    with pytest.raises(GateError, match=f"{expected} weights are zero in the exported file"):
        check_weights(target, reference, tmp_path)


def test_a_constant_that_no_output_depends_on_stores_nothing() -> None:
    """The right table beside the one that is looked up in, which is another."""

    def constant(name: str, **metadata: str) -> onnx.TensorProto:
        tensor = numpy_helper.from_array(np.eye(2, dtype=np.float32), name)
        for key, value in metadata.items():
            tensor.metadata_props.add(key=key, value=value)
        return tensor

    constants = [
        constant("read", parameters="read"),
        constant("unread", parameters="unread"),
        constant("copy", parameters="twice"),
        constant("first", parameters="twice"),
        constant("side_by_side", packed="query.T=1 key.T,value=1"),
        constant("side", packed="other.T=2"),
        constant("nameless"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "read"], ["a"]),
        helper.make_node("MatMul", ["a", "first"], ["b"]),
        helper.make_node("MatMul", ["b", "side_by_side"], ["c"]),
        helper.make_node("MatMul", ["c", "nameless"], ["y"]),
        helper.make_node("MatMul", ["a", "unread"], ["of no use"]),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "xy")
    proto = helper.make_model(helper.make_graph(nodes, "graph", [x], [y], constants))
    assert find_unread_parameters(proto) == {"unread", "other"}
