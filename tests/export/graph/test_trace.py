"""The ONNX file of every architecture: axes, names, zeros and logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from toys import ARCHITECTURES
from transformers import PreTrainedTokenizerFast

from spdtool import plugins
from spdtool.data import tokens as data
from spdtool.data.tokens import Batch, Encoded
from spdtool.errors import GateError, ModelError
from spdtool.export.gates import weights as weights_gate
from spdtool.export.gates.batches import longest_supported_input, make_dev_batches, make_random_batches
from spdtool.export.gates.logits import compare_logits
from spdtool.export.gates.reference import DevSets, Reference
from spdtool.export.graph import trace as export
from spdtool.export.graph.weights import read_weights
from spdtool.export.target import MODEL_FILE
from spdtool.export.targets import Onnx
from spdtool.models.layers import count_zeros, find_prunable_weights
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.models.predict import torch_forward
from spdtool.recipe.fields import Recipe


def comparison_batches(model: Any, rows: Encoded, sentences: int) -> list[tuple[str, Batch]]:
    """List the batches of the logits gate with their descriptions."""
    return [*make_dev_batches(rows, sentences).values(), *make_random_batches(model, rows)]


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its exported folder, and dev rows for it."""

    checkpoint: Path
    folder: Path
    files: list[Path]
    rows: Encoded

    @property
    def zeros(self) -> dict[str, tuple[int, int]]:
        return count_zeros(self.checkpoint, list(find_prunable_weights(load_model(self.checkpoint))))


def check_weights(exported_model: Exported) -> None:
    """Compare every stored weight with the checkpoint's."""
    reference = Reference(exported_model.checkpoint, DevSets(None, {"dev": exported_model.rows}), Recipe())
    assert weights_gate.check_weights(Onnx(), reference, exported_model.folder) == 0


def checkpoint(name: str, folder: Path, toys: ModuleType, **config: Any) -> Any:
    """Save a tiny random classifier with 70 % zeros in every prunable matrix; return its tokenizer."""
    model = toys.classifier(name, seed=7, id2label={0: "no", 1: "maybe", 2: "yes"}, **toys.TRACED | config)
    random = torch.Generator().manual_seed(7)
    for weight in find_prunable_weights(model).values():
        weight.data[torch.rand(weight.shape, generator=random) < 0.7] = 0
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=toys.tokenizer().backend_tokenizer,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if has_token_types(name) else [])],
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    save_model(model, tokenizer, folder)
    return load_tokenizer(folder)


def has_token_types(name: str) -> bool:
    """Whether the family knows token types."""
    return ARCHITECTURES[name][1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Callable[[str], Exported]:
    """Return `exported("bert")`, which exports each architecture once for the module; read only."""
    exported_by_name: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in exported_by_name:
            folder = tmp_path_factory.mktemp(name)
            tokenizer = checkpoint(name, folder / "checkpoint", toys)
            splits = data.encode_splits(tokenizer, {"dev": toys.rows(12, pairs=True)}, 32)
            files = Onnx().export(folder / "checkpoint", folder / "out", Recipe())
            exported_by_name[name] = Exported(folder / "checkpoint", folder / "out", files, splits["dev"])
        return exported_by_name[name]

    return make


# Their layers are BERT's, and the plug-in's tests trace them too.
LIKE_BERT = {"electra", "roberta", "xlm-roberta"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LIKE_BERT else ()) for name in ARCHITECTURES],
)
class TestArchitectures:
    def test_logits_equal_those_of_the_checkpoint(self, name: str, exported: Callable[[str], Exported]) -> None:
        exported_model = exported(name)
        model = load_model(exported_model.checkpoint, eager=True)
        batches = comparison_batches(model, exported_model.rows, 12)
        largest, largest_at = compare_logits(
            torch_forward(model), Onnx().session(exported_model.folder, threads=1), batches, 1e-4
        )
        assert 0 < largest < 1e-4
        assert largest_at
        assert any(batch["input_ids"].shape == (1, 1) for _, batch in batches)
        assert any(batch["input_ids"].shape == (1, longest_supported_input(model)) for _, batch in batches)

    def test_every_weight_equals_that_of_the_checkpoint(self, name: str, exported: Callable[[str], Exported]) -> None:
        exported_model = exported(name)
        check_weights(exported_model)
        assert (
            0.6
            < sum(z for z, _ in exported_model.zeros.values()) / sum(s for _, s in exported_model.zeros.values())
            < 0.8
        )

    def test_axes_inputs_and_output(self, name: str, exported: Callable[[str], Exported]) -> None:
        graph = onnx.load(exported(name).files[0]).graph
        typed = has_token_types(name)
        assert [value.name for value in graph.input] == list(export.INPUT_NAMES[: 3 if typed else 2])
        for value in graph.input:
            assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
        assert [value.name for value in graph.output] == ["logits"]
        assert [axis.dim_param for axis in graph.output[0].type.tensor_type.shape.dim] == ["batch", ""]


def test_the_layout_follows_hugging_face(exported: Callable[[str], Exported]) -> None:
    exported_model = exported("bert")
    files = sorted(
        str(path.relative_to(exported_model.folder)) for path in exported_model.folder.rglob("*") if path.is_file()
    )
    assert files == ["config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert exported_model.files == [exported_model.folder / "onnx/model.onnx"]
    config = json.loads((exported_model.folder / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert load_tokenizer(exported_model.folder)("good film")["input_ids"]


def test_no_path_of_this_machine_is_in_any_file(exported: Callable[[str], Exported]) -> None:
    exported_model = exported("bert")
    machine_paths = [
        str(Path(torch.__file__).parents[1]),
        str(Path(__file__).parents[2]),
        str(exported_model.checkpoint),
    ]
    for file in exported_model.folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for trace in (*machine_paths, "site-packages", ".py", "stack_trace"):
            assert trace.encode() not in content, f"{trace} in {file}"


def test_two_exports_are_byte_identical_and_silent(
    exported: Callable[[str], Exported],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    exported_model = exported("bert")
    capfd.readouterr()
    with export.cached_traces({}):
        repeated = Onnx().export(exported_model.checkpoint, tmp_path / "elsewhere", Recipe())
    Onnx().session(tmp_path / "elsewhere")
    assert capfd.readouterr() == ("", "")
    assert repeated[0].read_bytes() == exported_model.files[0].read_bytes()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (exported_model.folder / name).read_bytes()


def test_the_file_is_valid_and_keeps_the_opset(exported: Callable[[str], Exported]) -> None:
    proto = onnx.load(exported("bert").files[0])
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]


def test_another_opset_can_be_chosen(tmp_path: Path, toys: ModuleType) -> None:
    tokenizer = checkpoint("bert", tmp_path / "checkpoint", toys, layers=1)
    rows = data.encode_splits(tokenizer, {"dev": toys.rows(4)}, 32)["dev"]
    recipe = Recipe.model_validate({"export": {"opset": 20}})
    (file,) = Onnx().export(tmp_path / "checkpoint", tmp_path / "out", recipe)
    assert onnx.load(file).opset_import[0].version == 20
    model = load_model(tmp_path / "checkpoint")
    compare_logits(torch_forward(model), Onnx().session(tmp_path / "out"), comparison_batches(model, rows, 4), 1e-4)


def test_transposed_weights_are_marked_in_their_names(exported: Callable[[str], Exported]) -> None:
    exported_model = exported("bert")
    weights = dict(load_model(exported_model.checkpoint).named_parameters())
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(exported_model.files[0]).graph.initializer
    }
    name = "bert.encoder.layer.1.attention.self.key.weight"
    np.testing.assert_array_equal(stored[f"{name}.T"], weights[name].detach().numpy().T)
    np.testing.assert_array_equal(stored["classifier.weight"], weights["classifier.weight"].detach().numpy())


def test_equal_weights_share_a_constant_and_are_all_audited(tmp_path: Path, toys: ModuleType) -> None:
    model = toys.bert()
    first, second = (f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1))
    weights = find_prunable_weights(model)
    weights[first].data[:, ::2] = 0
    weights[second].data.copy_(weights[first])
    shared = numpy_helper.from_array(np.ascontiguousarray(weights[first].detach().numpy().T), "val_7")
    node = helper.make_node("MatMul", ["x", "val_7"], ["logits"])
    proto = helper.make_model(helper.make_graph([node], "g", [], [], [shared]))
    export.name_weights(proto, model)
    assert proto.graph.initializer[0].name == f"{first}.T"
    assert list(proto.graph.node[0].input) == ["x", f"{first}.T"]
    export.write_model(proto, tmp_path / MODEL_FILE)
    stored = {weight.name: weight.array for weight in Onnx().stored_weights(tmp_path)}
    for name in (first, second):
        assert np.array_equal(stored[name], weights[name].detach().numpy())


def test_beyond_the_limit_weights_go_to_a_second_file(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported_model = exported("bert")
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    for _ in range(2):  # a second export does not append to the first
        files = export.write_model(onnx.load(exported_model.files[0]), tmp_path / MODEL_FILE)
    assert [file.name for file in files] == ["model.onnx", "model.onnx_data"]
    assert files[0].stat().st_size < files[1].stat().st_size < exported_model.files[0].stat().st_size
    check_weights(replace(exported_model, folder=tmp_path))
    shutil.copy(exported_model.folder / "config.json", tmp_path)
    batch = exported_model.rows.collate([0, 1])
    assert (Onnx().session(tmp_path)(batch) == Onnx().session(exported_model.folder)(batch)).all()


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Onnx().export(tmp_path / "none", tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_a_configuration_is_traced_once_and_filled_with_the_weights_of_each_model(
    monkeypatch: pytest.MonkeyPatch, toys: ModuleType
) -> None:
    original, traced, graphs = export.trace_model, [], []

    def trace_model(model: Any, names: list[str], opset: int) -> onnx.ModelProto:
        traced.append(opset)
        if not graphs:  # once is enough: the later calls are counted
            graphs.append(original(model, names, opset).SerializeToString())
        return onnx.load_from_string(graphs[0])

    monkeypatch.setattr(export, "trace_model", trace_model)
    names = list(export.INPUT_NAMES)
    first = toys.bert(layers=1)
    second = toys.bert(
        layers=1, seed=1, problem_type="regression", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    with export.cached_traces({}):
        export.trace_named(first, names, 18)
        with export.cached_traces():
            filled = export.trace_named(second, names, 18)
        assert traced == [18]
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in filled.graph.initializer}
        query = "bert.encoder.layer.0.attention.self.query.weight"
        np.testing.assert_array_equal(stored[f"{query}.T"], second.get_parameter(query).detach().numpy().T)
        np.testing.assert_array_equal(stored["classifier.bias"], second.classifier.bias.detach().numpy())
        export.trace_named(second, names[:2], 18)
        assert len(traced) == 2, "other inputs are another graph"
    with export.cached_traces({}):
        export.trace_named(first, names[:2], 18)
    assert len(traced) == 3, "the cache ended with its block"


def test_a_matrix_and_the_transpose_of_another_are_not_one_constant() -> None:
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    constants = [numpy_helper.from_array(square, name) for name in ("a.T", "b", "c")]
    for tensor in constants:
        tensor.metadata_props.add(key="parameters", value=tensor.name.removesuffix(".T"))
    nodes = [helper.make_node("MatMul", ["x", tensor.name], [f"y{tensor.name}"]) for tensor in constants]
    proto = helper.make_model(helper.make_graph(nodes, "g", [], [], constants))
    export.merge_equal_weights(proto)
    stored = {weight.name: weight.array for weight in read_weights(proto)}
    assert [tensor.name for tensor in proto.graph.initializer] == ["a.T", "b"]
    np.testing.assert_array_equal(stored["a"], square.T)
    for name in ("b", "c"):
        np.testing.assert_array_equal(stored[name], square)


class SummedHead(torch.nn.Module):
    """A head whose weight is the sum of two parameters."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Parameter(head.weight / 4), torch.nn.Parameter(head.weight * 0.75)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.first + self.second)


def test_a_constant_computed_from_weights_follows_the_model(toys: ModuleType, tmp_path: Path) -> None:
    """The exporter may fold the sum or leave it to the runtime; the logits must be those of the model."""
    names, batch = ["input_ids", "attention_mask"], toys.batch()
    with export.cached_traces({}):
        for seed in (0, 1):
            model = toys.bert(layers=0, seed=seed)  # the sum is in the head
            model.classifier = SummedHead(model.classifier)
            export.write_model(export.trace_named(model, names, 18), tmp_path / MODEL_FILE)
            session = onnxruntime.InferenceSession(tmp_path / MODEL_FILE)
            (logits,) = session.run(None, {name: batch[name].numpy() for name in names})
            with torch.no_grad():
                expected = model(**{name: batch[name] for name in names}).logits.numpy()
            np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_frozen_axis_is_refused(monkeypatch: pytest.MonkeyPatch, toys: ModuleType) -> None:
    class Program:
        model_proto = helper.make_model(
            helper.make_graph([], "g", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [2, 9])], [])
        )

    monkeypatch.setattr(torch.onnx, "export", lambda *_given, **_named: Program())
    with pytest.raises(GateError, match=r"froze the axes of input_ids as \[2, 9\]"):
        export.trace_model(toys.bert(), ["input_ids"], 18)


class TestPlantedFaults:
    @pytest.fixture
    def altered(self, exported: Callable[[str], Exported], tmp_path: Path) -> Callable[..., Exported]:
        """Return a function that copies the exported BERT and applies `change` to one of its matrices."""

        def make(change: Callable[[np.ndarray], Any]) -> Exported:
            exported_model = exported("bert")
            proto = onnx.load(exported_model.files[0])
            name = "bert.encoder.layer.1.output.dense.weight.T"
            tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
            array = numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.raw_data = array.tobytes()
            (tmp_path / "onnx").mkdir()
            onnx.save(proto, tmp_path / "onnx/model.onnx")
            shutil.copy(exported_model.folder / "config.json", tmp_path)  # says what the outputs are
            return Exported(exported_model.checkpoint, tmp_path, [tmp_path / "onnx/model.onnx"], exported_model.rows)

        return make

    def test_a_lost_zero_is_detected(self, altered: Callable[..., Exported]) -> None:
        def lose(array: np.ndarray) -> None:
            row, column = np.argwhere(array == 0)[0]
            array[row, column] = 1e-12

        exported_model = altered(lose)
        with pytest.raises(GateError, match=r"layer.1.output.dense.weight: .* in place of 1 zeros"):
            check_weights(exported_model)

    def test_a_changed_weight_is_caught(self, altered: Callable[..., Exported]) -> None:
        def change(array: np.ndarray) -> None:
            row, column = np.argwhere(array != 0)[0]
            array[row, column] *= -1

        exported_model = altered(change)
        with pytest.raises(GateError, match=r"layer.1.output.dense.weight: 1 of 2048 weights"):
            check_weights(exported_model)
        model = load_model(exported_model.checkpoint)
        probes = comparison_batches(model, exported_model.rows, 4)
        with pytest.raises(GateError, match="checkpoint and exported file differ by"):
            compare_logits(torch_forward(model), Onnx().session(exported_model.folder), probes, 1e-4)

    def test_a_nan_weight_is_detected(self, altered: Callable[..., Exported]) -> None:
        exported_model = altered(lambda array: array.fill(np.nan))
        model = load_model(exported_model.checkpoint)
        with pytest.raises(GateError, match="exported file gives logits that are not finite"):
            compare_logits(
                torch_forward(model),
                Onnx().session(exported_model.folder),
                comparison_batches(model, exported_model.rows, 4),
                1e-4,
            )


def test_the_target_is_registered() -> None:
    entry = plugins.targets.entry("onnx")
    assert isinstance(entry.value, Onnx)
    assert "portable" in entry.summary
