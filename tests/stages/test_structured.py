"""A student with fewer heads, neurons and layers, through the three phases and every export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from spdtool.bench.lineup import fill_zeros_inside
from spdtool.errors import GateError, ModelError, RecipeError
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.gates.weights import check_weights
from spdtool.export.graph.weights import POSITIONS
from spdtool.export.load import load
from spdtool.export.target import MODEL_FILE, get_target
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, save_model
from spdtool.models.structures import find_structures
from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.structure import LayerShape, interpolate_shape
from spdtool.pruning.structured import StructuredMasks, StructuredPruner
from spdtool.recipe.training import Prune
from spdtool.run.folder import Run
from spdtool.stages.plan import make_plan
from spdtool.stages.prune import prune
from spdtool.training.step import Stepper

MakeRun = Callable[..., Run]
SHAPE = [[1, 32], [2, 0]]
SETS = ("prune.shape=[[1, 32], [2, 0]]", "prune.calibration=2", "prune.criterion=layerwise", "prune.save_at=0.25")


def shape_of(folder: Path) -> list[list[int]]:
    """Count the live heads and neurons of each layer of a checkpoint."""
    layers = find_structures(load_model(folder))
    return [[int(layer.heads.find_live().sum()), int(layer.neurons.find_live().sum())] for layer in layers]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Any:
    """A run whose student was pruned to `SHAPE` and went through all phases; read only."""
    from importlib import import_module

    toys.register(toys.dataset("toy"))
    sets = [f"{stage}.epochs=1" for stage in ("teacher", "prune", "distill", "finetune")]
    run = Run.for_recipe(tmp_path_factory.mktemp("structured") / "run", toys.recipe(*sets, *SETS, "export.sentences=4"))
    for stage in ("teacher", "prune", "distill", "finetune"):
        getattr(import_module(f"spdtool.stages.{stage}"), stage)(run)
    return run


def test_a_student_on_the_way_is_saved_with_the_shape_of_its_event(finished: Run) -> None:
    (student,) = finished.training_result("prune").fit.students
    assert student.sparsity == 0.25
    assert set(student.dev) >= {"score"}
    # halfway to [1, 32] and [2, 0] from [2, 64] everywhere, each number rounded
    halfway = interpolate_shape((LayerShape(2, 64),) * 2, (LayerShape(1, 32), LayerShape(2, 0)), 0.5)
    assert shape_of(finished.path / "prune" / student.folder) == [[layer.heads, layer.neurons] for layer in halfway]


@pytest.fixture
def reference(finished: Run, toy_task: Callable[..., Any]) -> Reference:
    """The finished student, as the reference of an export."""
    toy_task()
    checkpoint = finished.path / "finetune"
    return Reference(checkpoint, prepare_dev_sets(checkpoint, finished.recipe), finished.recipe)


def test_every_phase_hands_over_a_full_width_checkpoint_of_the_shape(finished: Run) -> None:
    for stage in ("prune", "distill", "finetune"):
        folder = finished.path / stage
        assert shape_of(folder) == SHAPE, stage
        result = finished.training_result(stage)
        assert [list(layer) for layer in result.shape or ()] == SHAPE, stage
        # attention and feed-forward have equally many weights here, and lose a half, a half, none and all
        assert result.sparsity == 0.5, stage
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.intermediate_size == 64, stage
    events = [json.loads(line) for line in (finished.path / "prune" / "metrics.jsonl").read_text("utf-8").splitlines()]
    climbed = [event["sparsity"] for event in events if event["event"] == "prune"]
    assert len(climbed) == 3
    assert climbed == sorted(climbed)
    assert climbed[-1] == pytest.approx(finished.training_result("finetune").sparsity)


@pytest.mark.slow  # it traces and quantizes
def test_every_target_drops_dead_heads_and_neurons_and_passes_the_gates(reference: Reference, tmp_path: Path) -> None:
    parameters = dict(reference.load_model().named_parameters())
    for name in ("onnx", "onnx-ort", "onnx-fp16", "onnx-int8", "transformers"):
        target = get_target(name)
        if name in ("onnx", "onnx-int8"):
            export_and_check(target, reference, tmp_path / name, ["cpu"])
        else:  # a shape changes only the weights, so their gate is enough
            target.export(reference.checkpoint, tmp_path / name, reference.recipe)
            check_weights(target, reference, tmp_path / name)
        for stored in get_target(name).stored_weights(tmp_path / name):
            assert stored.array.shape == tuple(parameters[stored.name].shape), f"{name}: {stored.name}"
    stored_size = {}
    for tensor in onnx.load(tmp_path / "onnx" / MODEL_FILE).graph.initializer:
        stored_size[tensor.name.removesuffix(".T")] = numpy_helper.to_array(tensor).size
    layer = "bert.encoder.layer."
    assert stored_size[f"{layer}0.attention.self.query.weight"] == 16 * 32
    assert stored_size[f"{layer}0.intermediate.dense.weight"] == 32 * 32
    assert f"{layer}1.output.dense.weight" not in stored_size
    texts = ["a good film", "a bad meal"]
    with torch.no_grad():
        encoded = reference.tokenizer(texts, return_tensors="pt")
        expected = reference.load_model()(**encoded).logits.argmax(1).tolist()
    assert load(tmp_path / "onnx")(texts) == [reference.label_names[number] for number in expected]


def test_stock_transformers_opens_the_narrow_checkpoint(reference: Reference, tmp_path: Path, toys: ModuleType) -> None:
    get_target("transformers").export(reference.checkpoint, tmp_path / "narrow", reference.recipe)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "narrow")
    assert model.config.intermediate_size == 32
    batch = toys.batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reference.load_model()(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.slow  # it traces
def test_a_swapped_head_column_is_caught_by_the_gate_on_weights(reference: Reference, tmp_path: Path) -> None:
    target = get_target("onnx")
    target.export(reference.checkpoint, tmp_path, reference.recipe)
    check_weights(target, reference, tmp_path)
    proto = onnx.load(tmp_path / MODEL_FILE)
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name in (name, f"{name}.T")]
    expected = numpy_helper.to_array(tensor)
    assert expected.shape == (16, 32)
    swapped = expected.copy()
    swapped[[0, 1]] = expected[[1, 0]]
    tensor.raw_data = swapped.tobytes()
    onnx.save(proto, tmp_path / MODEL_FILE)
    with pytest.raises(GateError, match=r"attention\.output\.dense\.weight"):
        check_weights(target, reference, tmp_path)
    # name the other head as the live one
    tensor.raw_data = expected.tobytes()
    for entry in tensor.metadata_props:
        if entry.key == POSITIONS:
            ((size, ((start, _),)),) = json.loads(entry.value)[name][1:]
            wrong_range = [[0, 16]] if start else [[16, 32]]
            entry.value = json.dumps({name: [[32, [[0, 32]]], [size, wrong_range]]})
    onnx.save(proto, tmp_path / MODEL_FILE)
    with pytest.raises(GateError, match="in place of"):
        check_weights(target, reference, tmp_path)


def test_a_killed_prune_stage_resumes_to_the_same_weights(
    finished: Run, tmp_path: Path, toy_task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_task()
    run = Run.for_recipe(tmp_path / "run", finished.recipe.model_copy(update={"save_minutes": 0.0}))
    shutil.copytree(finished.path / "teacher", tmp_path / "run" / "teacher", dirs_exist_ok=True)
    take, steps = Stepper.take, iter(range(1000))

    def die(*arguments: Any) -> None:
        if next(steps) == 3:  # after the first of three events
            raise KeyboardInterrupt
        take(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "take", die)
        with pytest.raises(KeyboardInterrupt):
            prune(run)
    prune(run)
    resumed, expected = (
        load_file(tmp_path / "run/prune/model.safetensors"),
        load_file(finished.path / "prune/model.safetensors"),
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.items())


def test_a_plan_counts_the_zeros_of_the_shape_and_refuses_one_that_does_not_fit(toy_run: MakeRun) -> None:
    plan = make_plan(toy_run(*SETS))
    assert 2 * plan.parameters.zeros == plan.parameters.prunable
    for shape, message in (("[[1, 32]]", "has 1 layers"), ("[[3, 32], [2, 64]]", "keeps 3 heads")):
        with pytest.raises(RecipeError, match=message):
            make_plan(toy_run(f"prune.shape={shape}", "prune.calibration=2"))
    with pytest.raises(RecipeError, match="do not go with prune.pattern=4x4: prune.zeros says how many"):
        toy_run("prune.heads=0.5", "prune.pattern=4x4")
    with pytest.raises(RecipeError, match="prune.zeros lie inside a smaller student"):
        toy_run("prune.zeros=0.5")
    inside = make_plan(toy_run(*SETS, "prune.zeros=0.5", "prune.pattern=1x4"))
    assert 4 * inside.parameters.zeros == 3 * inside.parameters.prunable
    for pattern, message in (("2:4", "no pattern for zeros inside"), ("1x5", "does not divide")):
        with pytest.raises((RecipeError, ModelError), match=message):
            make_plan(toy_run(*SETS, "prune.zeros=0.5", f"prune.pattern={pattern}"))
    with pytest.raises(RecipeError, match="'wanda' ranks single weights"):
        make_plan(toy_run("prune.heads=0.5", "prune.criterion=wanda", "prune.calibration=2"))


def test_zeros_inside_a_shape_stay_through_the_phases(toy_run: MakeRun) -> None:
    sets = [f"{stage}.epochs=1" for stage in ("teacher", "prune", "distill", "finetune")]
    run = toy_run(*sets, *SETS, "prune.zeros=0.5", "prune.pattern=1x4", "finetune.quantize=int8", until="finetune")
    for stage in ("prune", "distill", "finetune"):
        assert shape_of(run.path / stage) == SHAPE, stage
        assert run.training_result(stage).sparsity == 0.75, stage
    events = [json.loads(line) for line in (run.path / "prune/metrics.jsonl").read_text("utf-8").splitlines()]
    climbed = [event["sparsity"] for event in events if event["event"] == "prune"]
    assert 0.5 in climbed  # the whole shape, then zeros inside of it
    assert climbed == sorted(climbed)


def test_the_shape_of_a_student_is_timed_without_the_zeros_inside(toys: ModuleType, tmp_path: Path) -> None:
    model = toys.bert()
    weights = find_prunable_weights(model)
    masks = StructuredMasks.from_structures(weights, find_structures(model), find_pattern("1x4"))
    shape = tuple(LayerShape(*sizes) for sizes in SHAPE)
    section = Prune(criterion="magnitude", pattern="1x4", zeros=0.5)
    pruner = StructuredPruner(masks, [(0, 0.75)], section, shape)
    pruner.prune(0)
    pruner.finalize()
    save_model(model, toys.tokenizer(), tmp_path / "student")
    fill_zeros_inside(tmp_path / "student", tmp_path / "filled")
    assert shape_of(tmp_path / "filled") == SHAPE
    for name, weight in find_prunable_weights(load_model(tmp_path / "filled")).items():
        assert torch.equal(weight == 0, masks.removed()[name]), name
        kept = ~masks.dead[name]
        assert torch.equal(weight[kept], weights[name][kept]), name


def test_a_student_of_fewer_layers_and_half_the_heads(toy_run: MakeRun, toy_task: Callable[..., Any]) -> None:
    toy_task(layers=3)
    sets = ("prune.layers=[1, 3]", "prune.heads=0.5", "prune.neurons=0.5", "prune.criterion=magnitude")
    run = toy_run(*sets, "teacher.epochs=1", "prune.epochs=1", until="prune")
    assert shape_of(run.path / "prune") == [[1, 32], [1, 32]]
    assert load_model(run.path / "prune").config.num_hidden_layers == 2
