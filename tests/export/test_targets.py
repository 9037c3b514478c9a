"""The variants of the portable graph: the content of their files, and the faults that the gates detect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spdtool.data import tokens as data
from spdtool.errors import GateError, RecipeError
from spdtool.export import onnx_session
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.reference import DevSets, Reference
from spdtool.export.gates.score import DevComparison, compare_predictions
from spdtool.export.graph import fp16, row_lengths, trace
from spdtool.export.graph.float32 import float32_copy
from spdtool.export.graph.fuse import count_operators, fuse_operators, operator_domains
from spdtool.export.graph.int8 import quantize_dynamically
from spdtool.export.graph.weights import SIDE_BY_SIDE
from spdtool.export.target import MODEL_FILE, Rounding, Target, get_target
from spdtool.export.targets import Onnx
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.models.predict import onnx_forward

TARGETS = ("onnx", "onnx-ort", "onnx-fp16", "onnx-ort-fp16", "onnx-int8", "onnx-int8-static")
COARSE = TARGETS[2:]
# Grids over targets keep a file in float32, one in fp16 with fused operators and one in int8 in `make test`.
DIFFERENT = ("onnx", "onnx-ort-fp16", "onnx-int8")
BY_KIND = [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.long) for name in TARGETS]
DEVIATION = {"onnx-fp16": 0.005, "onnx-ort-fp16": 0.005, "onnx-int8": 0.06, "onnx-int8-static": 0.15}
HEAVY = "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A BERT of two layers with 75 % zeros in its matrices."""
    folder, model = tmp_path_factory.mktemp("variants") / "checkpoint", toys.bert(seed=2)
    for weight in find_prunable_weights(model).values():
        weight.data.view(-1)[np.arange(weight.numel()) % 4 > 0] = 0
    save_model(model, toys.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def proto(checkpoint: Path) -> onnx.ModelProto:
    """The portable graph of the checkpoint."""
    return trace.trace_checkpoint(checkpoint, 18)


@pytest.fixture
def dev(checkpoint: Path, toys: ModuleType, toy_task: Callable[..., Any]) -> DevSets:
    """A task whose gold labels are the predictions of the model."""
    task = toy_task()
    rows = data.encode_splits(toys.tokenizer(), {"dev": toys.rows(40), "train": toys.rows(32, 5)}, 32)
    return DevSets(task, {"dev": rows["dev"]}, rows["train"])


Export = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def export(checkpoint: Path, tmp_path: Path, dev: DevSets, toys: ModuleType) -> Export:
    """Return `export("onnx-int8", "export.budget=1")`: metrics and folder of a target that passed the gates."""

    def make(name: str, *sets: str, source: Path = checkpoint, target: Any = None) -> tuple[dict[str, Any], Path]:
        recipe = toys.recipe("export.sentences=6", *sets)
        resolved = target or get_target(name)
        return export_and_check(resolved, Reference(source, dev, recipe), tmp_path / name, ["cpu"]), tmp_path / name

    return make


@pytest.mark.parametrize("name", TARGETS)
def test_every_variant_passes_the_gates_and_describes_itself(name: str, export: Export, checkpoint: Path) -> None:
    metrics, folder = export(name, "export.budget=1")
    stored = {weight.name: weight.array for weight in get_target(name).stored_weights(folder)}
    for parameter, weight in find_prunable_weights(load_model(checkpoint)).items():
        array = weight.detach().numpy()
        assert stored[parameter].shape == array.shape
        assert not stored[parameter][array == 0].any()
        if name not in COARSE:
            assert np.array_equal(stored[parameter], array)
    allowed = {"", "com.microsoft"} if "-ort" in name else {""}
    assert operator_domains(onnx.load(folder / MODEL_FILE)) == allowed
    assert metrics.nodes == len(onnx.load(folder / MODEL_FILE).graph.node)
    assert metrics.largest_difference < (1e-3 if name in COARSE else 1e-4)
    if name in COARSE:
        assert 0 < metrics.deviation < DEVIATION[name]
        assert metrics.values == ("fp16" if "fp16" in name else "int8")
        assert metrics.rounded_to_zero >= 0


def test_fused_operators_are_counted(export: Export) -> None:
    metrics, folder = export("onnx-ort")
    assert metrics.fused == {"Attention": 2, "BiasGelu": 2, "SkipLayerNormalization": 4}
    (packed,) = {
        entry.value
        for tensor in onnx.load(folder / MODEL_FILE).graph.initializer
        for entry in tensor.metadata_props
        if entry.key == SIDE_BY_SIDE and "layer.1." in entry.value
    }
    assert [weight_name.split(".")[-3] for weight_name in packed.split()] == ["query", "key", "value"]


def test_the_fused_fp16_graph_has_nine_nodes_a_layer_at_most(
    checkpoint: Path, toys: ModuleType, tmp_path: Path
) -> None:
    get_target("onnx-ort-fp16").export(checkpoint, tmp_path, toys.recipe())
    nodes = onnx.load(tmp_path / MODEL_FILE).graph.node
    attentions = [index for index, node in enumerate(nodes) if node.op_type == "Attention"]
    sums = [index for index, node in enumerate(nodes) if node.op_type == "SkipLayerNormalization"]
    assert len(attentions) == 2, "one for each layer"
    assert max(sums) - min(attentions) + 1 <= 9 * 2
    assert [nodes[index].input[3] for index in attentions] == 2 * [row_lengths.MASK_INDEX]
    # a sum that nothing reads would be written to memory all the same
    assert [len(nodes[index].output) for index in sums] == 4 * [1]


def test_left_padding_is_refused_if_attention_takes_row_lengths(
    export: Export, tmp_path: Path, toys: ModuleType
) -> None:
    save_model(toys.bert(seed=2), toys.tokenizer("left"), tmp_path / "left")
    with pytest.raises(GateError, match="pads on the left"):
        export("onnx-ort-fp16", "export.budget=1", source=tmp_path / "left")


def test_a_bias_that_masks_more_than_padding_is_not_replaced(proto: onnx.ModelProto) -> None:
    """A bias of local attention or of positions cannot be replaced by row lengths."""
    fused = fuse_operators(onnx.ModelProto.FromString(proto.SerializeToString()))
    (bias,) = {node.input[5] for node in fused.graph.node if node.op_type == "Attention"}
    mask_node = next(node for node in fused.graph.node if bias in node.output)
    mask_node.output[0] = "padding"
    fused.graph.initializer.append(numpy_helper.from_array(np.full((1, 1, 1, 1), 0.5, np.float32), "half"))
    position = list(fused.graph.node).index(mask_node) + 1
    fused.graph.node.insert(position, helper.make_node("Add", ["padding", "half"], [bias]))
    before = fused.SerializeToString()
    assert not row_lengths.use_row_lengths(fused)
    assert fused.SerializeToString() == before


def test_equal_biases_of_query_key_and_value_are_stored_under_all_their_names(
    export: Export, tmp_path: Path, toys: ModuleType
) -> None:
    model = toys.bert(seed=2)
    for layer in model.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            linear.bias.data[:] = 0.25
    save_model(model, toys.tokenizer(), tmp_path / "equal")
    export("onnx-ort", source=tmp_path / "equal")


@pytest.mark.parametrize(
    ("name", "stored_as"),
    [("onnx-fp16", TensorProto.FLOAT16), ("onnx-int8", TensorProto.INT8), ("onnx-int8-static", TensorProto.INT8)],
)
def test_every_matrix_takes_fewer_bytes(name: str, stored_as: int, export: Export) -> None:
    _, folder = export(name, "export.budget=1")
    tensors = {tensor.name: tensor for tensor in onnx.load(folder / MODEL_FILE).graph.initializer}
    matrices = [tensor for key, tensor in tensors.items() if "layer." in key and len(tensor.dims) == 2]
    assert len(matrices) == 12
    assert {tensor.data_type for tensor in matrices} == {stored_as}
    embeddings = [tensor for key, tensor in tensors.items() if "_embeddings" in key and len(tensor.dims) == 2]
    assert len(embeddings) == 3
    assert {tensor.data_type for tensor in embeddings} <= {stored_as, TensorProto.UINT8}


def test_static_int8_rounds_only_inputs_of_products_with_weights(export: Export) -> None:
    _, folder = export("onnx-int8-static", "export.budget=1")
    graph = onnx.load(folder / MODEL_FILE).graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}

    def rounded(name: str) -> bool:
        return name in made_by and made_by[name].op_type == "DequantizeLinear"

    products = [node for node in graph.node if node.op_type == "MatMul"]
    with_weight = [node for node in products if rounded(node.input[1]) and made_by[node.input[1]].input[0] in constants]
    assert (len(with_weight), len(products)) == (14, 18)  # the attentions of two layers have two of their own each
    for node in products:
        assert rounded(node.input[0]) == (node in with_weight)
    read = {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    assert not read & {name for node in products for name in node.output}
    assert not rounded("logits")


@pytest.mark.parametrize("name", BY_KIND)
def test_two_exports_are_byte_identical(
    name: str, checkpoint: Path, tmp_path: Path, dev: DevSets, toys: ModuleType
) -> None:
    target = get_target(name)
    for folder in ("a", "b"):
        target.export_rounded(checkpoint, tmp_path / folder, toys.recipe(), Rounding((), dev.calibration_rows))
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


def damaged(name: str, damage: Callable[[Any], None]) -> Target:
    """Make the target `name` apply `damage(proto)` to the file it has written."""
    target = get_target(name)

    class Damaged(type(target)):  # type: ignore[misc]
        def export_rounded(self, checkpoint: Path, folder: Path, recipe: Any, rounding: Rounding) -> list[Path]:
            files = target.export_rounded(checkpoint, folder, recipe, rounding)
            proto = onnx.load(files[0])
            damage(proto)
            onnx.save(proto, files[0])
            return files

    return Damaged()


def fill_zeros(array: np.ndarray) -> None:
    array[array == 0] = array.dtype.type(array.max() / 2)


def perturb(array: np.ndarray) -> None:
    array[:] = np.roll(array, 1, axis=0)


@pytest.mark.parametrize("name", BY_KIND)
@pytest.mark.parametrize(
    ("change", "message"),
    [(fill_zeros, "zeros"), (perturb, "zeros|further from the checkpoint's|differ by|in place of")],
    ids=["lost mask", "perturbed matrix"],
)
def test_planted_faults_of_a_matrix_are_found(name: str, change: Any, message: str, export: Export) -> None:
    def damage(proto: Any) -> None:
        tensor = next(
            tensor
            for tensor in proto.graph.initializer
            if "layer.1" in tensor.name and "intermediate.dense.weight" in tensor.name and len(tensor.dims) == 2
        )
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.raw_data = array.tobytes()

    with pytest.raises(GateError, match=message):
        export(name, "export.budget=1", target=damaged(name, damage))


@pytest.mark.parametrize("name", BY_KIND)
def test_an_attention_mask_that_is_not_applied_is_found(name: str, export: Export) -> None:
    def unmask(proto: Any) -> None:
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and array.dtype.kind == "f" and array.item() <= fp16.MASK_VALUE:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(array), tensor.name))
        for node in proto.graph.node:
            if node.op_type == "Attention" and node.input[-1] == row_lengths.MASK_INDEX:
                node.input.pop()

    with pytest.raises(GateError, match="differ by .* padding on the|differ by .*dev rows"):
        export(name, "export.budget=1", target=damaged(name, unmask))


@pytest.fixture
def scaled(tmp_path: Path, toys: ModuleType) -> Callable[[float], Path]:
    """Return `scaled(factor)`: a checkpoint whose layer 0 multiplies one feature and later divides by it."""

    def make(factor: float) -> Path:
        model = toys.bert(seed=2)
        layer = model.bert.encoder.layer[0]
        layer.attention.self.value.weight.data[0] *= factor
        layer.attention.self.value.bias.data[0] *= factor
        layer.attention.output.dense.weight.data[:, 0] /= factor
        save_model(model, toys.tokenizer(), tmp_path / "scaled")
        return tmp_path / "scaled"

    return make


def test_overflow_in_fp16_is_found_node_by_node(export: Export, scaled: Callable[[float], Path]) -> None:
    """On a CPU the result may be finite, because values between nodes may stay in float32."""
    with pytest.raises(GateError, match="is not finite on") as error:
        export("onnx-fp16", "export.budget=1", source=scaled(1e5))
    assert "65504" in error.value.message


def test_values_not_finite_in_float32_are_not_blamed_on_fp16(tmp_path: Path) -> None:
    def scan(largest: float) -> None:
        tensors = [numpy_helper.from_array(np.array([[0.0], [largest]], np.float16), "weight")]
        nodes = [
            helper.make_node("Gather", ["weight", "input_ids"], ["found"]),
            helper.make_node("Log", ["found"], ["logarithm"]),
            helper.make_node("Mul", ["found", "found"], ["square"]),
            helper.make_node("Cast", ["square"], ["logits"], to=TensorProto.FLOAT),
        ]
        ends = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
        ends.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, None))
        graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, tmp_path / "model.onnx")
        fp16.check_overflow(tmp_path / "model.onnx", [("a batch", {"input_ids": np.array([[0, 1]])})], "cpu")

    scan(100.0)  # the logarithm of 0 is minus infinity in any arithmetic
    with pytest.raises(GateError, match="in fp16, square is not finite on a batch: in float32 it is 1e"):
        scan(1000.0)


@pytest.mark.parametrize("architecture", ["deberta-v2", pytest.param("mpnet", marks=pytest.mark.long)])
def test_positions_are_the_same_in_fp16(architecture: str, tmp_path: Path, toys: ModuleType) -> None:
    """A relative position that is rounded before bucketing may fall into the next bucket."""
    config = {"position_buckets": 64} if architecture == "deberta-v2" else {}
    model = toys.classifier(architecture, layers=1, max_position_embeddings=514, **config)
    tokenizer = toys.tokenizer(token_types=toys.ARCHITECTURES[architecture][1])
    tokenizer.model_max_length = 512
    save_model(model, tokenizer, tmp_path / "checkpoint")
    wide = trace.trace_checkpoint(tmp_path / "checkpoint", 18)
    narrow = fp16.convert_to_fp16(trace.trace_checkpoint(tmp_path / "checkpoint", 18))
    output_names = [node.output[0] for node in wide.graph.node if node.op_type == "Cast" and node.attribute[0].i == 7]
    outputs = []
    for proto in (wide, narrow):
        proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in output_names)
        session = onnx_session.open_session(proto.SerializeToString())
        ids = np.full((1, 500), 9)
        batch = {value.name: np.zeros_like(ids) + (value.name == "attention_mask") for value in session.get_inputs()}
        outputs.append(session.run(output_names, batch | {"input_ids": ids}))
    assert outputs[0]
    for in_float32, in_float16 in zip(*outputs, strict=True):
        np.testing.assert_array_equal(in_float32, in_float16)


@pytest.mark.parametrize(
    "architecture", ["bert", "deberta-v2", pytest.param("mpnet", marks=pytest.mark.long), "modernbert"]
)
def test_an_fp16_graph_is_sorted_and_has_no_extra_nodes(architecture: str, tmp_path: Path, toys: ModuleType) -> None:
    model = toys.classifier(architecture, **toys.TRACED)
    save_model(model, toys.tokenizer(token_types=toys.ARCHITECTURES[architecture][1]), tmp_path / "checkpoint")
    wide = trace.trace_checkpoint(tmp_path / "checkpoint", 18)
    narrow = fp16.convert_to_fp16(trace.trace_checkpoint(tmp_path / "checkpoint", 18))
    onnx.checker.check_model(narrow, full_check=True)
    assert [value.name for value in narrow.graph.input] == [value.name for value in wide.graph.input]
    assert len(narrow.graph.node) <= len(wide.graph.node) + 8  # casts of masks, angles and logits


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-int8-static"])
def test_an_outlier_that_ruins_int8_is_found(name: str, export: Export, scaled: Callable[[float], Path]) -> None:
    """One outlier makes all other features of the activation smaller than one step of the common scale."""
    intact, _ = export(name, "export.budget=1", source=scaled(1))
    assert intact.deviation < 0.15
    with pytest.raises(GateError, match="moves the logits by .* the tolerance is 25%"):
        export(name, "export.budget=1", source=scaled(1e3))


def test_a_portable_file_has_no_other_operators(export: Export) -> None:
    class Foreign(Onnx):
        def export(self, checkpoint: Path, folder: Path, recipe: Any) -> list[Path]:
            return trace.save_folder(fuse_operators(trace.trace_checkpoint(checkpoint, 18)), checkpoint, folder)

    with pytest.raises(GateError, match=r"operators of the domain com\.microsoft"):
        export("onnx", target=Foreign())


def test_static_int8_needs_rows(checkpoint: Path, tmp_path: Path, dev: DevSets, toys: ModuleType) -> None:
    target, without = get_target("onnx-int8-static"), DevSets(None, dev.splits)
    with pytest.raises(RecipeError, match="calibrated on rows of a task"):
        export_and_check(target, Reference(checkpoint, without, toys.recipe()), tmp_path / "out", ["cpu"])


def test_layers_that_break_the_budget_stay_in_float32(
    export: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stub meets the budget once layer 0 stays in float32, because a toy's predictions seldom flip."""
    original_compare = compare_predictions

    def compare(task: Any, reference: Any, file_logits: Any, rows: Any, tolerance: float) -> DevComparison:
        change = original_compare(task, reference, file_logits, rows, tolerance)
        names_in_file = {tensor.name for tensor in current().graph.initializer}
        is_float32 = any("layer.0" in name and name.endswith("intermediate.dense.weight.T") for name in names_in_file)
        metrics = {name: value - (0 if is_float32 else 0.5) for name, value in change.checkpoint_scores.items()}
        return DevComparison(
            metrics, change.checkpoint_scores, 9, change.rows, change.largest_change, 0 if is_float32 else 9
        )

    def current() -> onnx.ModelProto:
        return onnx.load(written[-1])

    written: list[Path] = []
    monkeypatch.setattr("spdtool.export.gates.score.compare_predictions", compare)
    monkeypatch.setattr(trace, "write_model", lambda proto, file: written.append(file) or write(proto, file))
    metrics, folder = export("onnx-int8")
    assert "bert.encoder.layer.0" in metrics.kept_fp32
    assert set(metrics.damage) >= {"bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"}
    assert metrics.tries <= 24
    names = {tensor.name for tensor in onnx.load(folder / MODEL_FILE).graph.initializer}
    assert HEAVY + ".T" in names
    assert "left in float32, after" in capsys.readouterr().out


write = trace.write_model


def test_sparse_constants_compute_the_same_and_take_fewer_bytes(export: Export) -> None:
    dense, _ = export("onnx")
    sparse, folder = export("onnx", "export.sparse_initializers=true")
    proto = onnx.load(folder / MODEL_FILE)
    assert sparse.sparse == len(proto.graph.sparse_initializer) == 12
    assert sparse.bytes < dense.bytes
    assert {tensor.indices.data_type for tensor in proto.graph.sparse_initializer} == {TensorProto.INT64}
    onnx.checker.check_model(proto)


def test_the_attention_operator_of_operator_set_23(export: Export) -> None:
    metrics, folder = export("onnx", "export.opset=23")
    operators = count_operators(onnx.load(folder / MODEL_FILE), "")
    assert (metrics.opset, operators["Attention"]) == (23, 2)


def test_the_float32_copy_rounds_no_activation(proto: onnx.ModelProto) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    unrounded = float32_copy(quantize_dynamically(copy))
    operators = {node.op_type for node in unrounded.graph.node}
    assert not operators & {"DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}
    rows = {name: np.ones((2, 5), np.int64) for name in trace.INPUT_NAMES}
    assert onnx_forward(onnx_session.open_session(unrounded.SerializeToString()))(rows).shape == (2, 2)


def test_masks_are_clamped_and_nothing_else() -> None:
    values = {"mask": np.float32(-3.4e38), "scale": np.float32(2.0), "weight": np.full((2, 2), -2e4, np.float32)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    proto = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    fp16.clamp_masks(proto)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert arrays["mask"] == fp16.MASK_VALUE
    assert (arrays["weight"] == values["weight"]).all()
