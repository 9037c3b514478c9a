"""The three phases with students of other shapes, layer maps, relations, projections and blends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from spdtool import console, plugins
from spdtool.errors import ModelError, RecipeError
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import label_names, load_model, load_tokenizer, save_model
from spdtool.pruning.allocation import zeros_in
from spdtool.pruning.masks import Masks
from spdtool.run.folder import Run
from spdtool.stages.distill import distill
from spdtool.stages.finetune import finetune
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.tasks.task import Task

pytestmark = pytest.mark.slow  # it trains whole stages

MakeRun = Callable[..., Run]
NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


@pytest.fixture
def make_student(toys: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """Return `make_student(layers=1, hidden_size=16)`, which saves another classifier and returns its folder."""

    def make(name: str = "small", architecture: str = "bert", **fields: Any) -> str:
        folder = tmp_path / name
        options: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "layers": 1, "seed": 7} | fields
        model = toys.classifier(architecture, eager=False, **{**NAMES, **options})
        save_model(model, toys.tokenizer(token_types=architecture != "distilbert"), folder)
        return str(folder)

    return make


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the warnings of the console."""
    messages: list[str] = []
    monkeypatch.setattr(console, "warn", messages.append)
    return messages


def weights(run: Run, stage: str, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run.path / stage / file)


def steps(run: Run, stage: str) -> list[dict[str, Any]]:
    lines = (run.path / stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def almost_equal(weight: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare up to the tiny steps that a learning rate of 1e-30 takes away from zero."""
    return torch.allclose(weight, expected, rtol=0, atol=1e-20)


def encoder_only(folder: str) -> str:
    """Copy a model folder without its classification head."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    encoder_folder = f"{folder}-bare"
    shutil.copytree(folder, encoder_folder)
    model.base_model.save_pretrained(encoder_folder)
    return encoder_folder


def test_a_smaller_student_goes_through_every_phase_with_its_projections(
    toy_run: MakeRun, make_student: Callable[..., str], warnings: list[str], stage_files: list[str]
) -> None:
    run = toy_run("prune.grafting.start=0.5", student=make_student(), sparsity=0.7, until="finetune")
    before: dict[str, torch.Tensor] = {}
    for stage in ("prune", "distill", "finetune"):
        folder = run.path / stage
        assert sorted(path.name for path in folder.iterdir()) == sorted([*stage_files, "projections.safetensors"])
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 16)
        assert not [name for name in model.state_dict() if "projection" in name]
        for weight in find_prunable_weights(model).values():
            assert int((weight == 0).sum()) == zeros_in(weight.numel(), 0.7)
        projections = weights(run, stage, "projections.safetensors")
        assert {name: tuple(weight.shape) for name, weight in projections.items()} == {
            "projection.0": (32, 16), "projection.1": (32, 16),
        }  # fmt: skip
        assert not any(torch.equal(projections[name], before.get(name, torch.zeros(1))) for name in projections), (
            "they learn"
        )
        before = projections
        assert {step["replacing_rate"] for step in steps(run, stage)} == {1.0}
    ignored = [line for line in warnings if "grafting is ignored" in line]
    assert [line.split(".")[0] for line in ignored] == ["prune", "distill"][: len(ignored)]
    assert ignored
    assert any("bert, 1 layers of width 16" in line and "bert, 2 layers of width 32" in line for line in warnings)


def test_the_next_phase_goes_on_with_the_projections_of_the_one_before(
    toy_run: MakeRun, make_student: Callable[..., str]
) -> None:
    run = toy_run("distill.epochs=0", student=make_student(), until="distill")
    pruned, distilled = (weights(run, stage, "projections.safetensors") for stage in ("prune", "distill"))
    assert all(torch.equal(pruned[name], distilled[name]) for name in pruned)


def test_projections_are_there_only_where_hidden_states_are_compared(
    toy_run: MakeRun, make_student: Callable[..., str]
) -> None:
    relation = ["prune.loss={hidden=0, relation=1, relation_heads=4, layer_map='last'}", "prune.epochs=1"]
    run = toy_run(*relation, student=make_student(), until="prune")
    assert not (run.path / "prune" / "projections.safetensors").exists()
    assert all(step["losses"]["relation"] > 0 for step in steps(run, "prune"))
    same_width = toy_run("prune.epochs=1", student=make_student("wide", hidden_size=32), folder="equal", until="prune")
    assert not (same_width.path / "prune" / "projections.safetensors").exists()


@pytest.mark.parametrize("layer_map", [pytest.param("uniform", marks=pytest.mark.long), "last", "[2, 1]"])
def test_the_layer_map_changes_the_hidden_state_loss(
    toy_run: MakeRun, toy_task: Callable[..., Task], make_student: Callable[..., str], layer_map: str
) -> None:
    toy_task(layers=4, train=16, dev=8)
    sets = ["prune.epochs=1", f"prune.loss.layer_map={layer_map}", "prune.loss.attention=1", "prune.events=1"]
    student = make_student(hidden_size=32, layers=2)
    run = toy_run(*sets, "teacher.epochs=1", student=student, sparsity=0.3, until="prune")
    assert all(step["losses"][name] > 0 for step in steps(run, "prune") for name in ("hidden", "attention"))
    other_run = toy_run("prune.loss.layer_map=[4, 4]", *sets[:1], *sets[2:], "teacher.epochs=1", student=student,
                    sparsity=0.3, folder="other", until="prune")  # fmt: skip
    assert steps(run, "prune")[0]["losses"]["hidden"] != steps(other_run, "prune")[0]["losses"]["hidden"]


@pytest.mark.parametrize("kind", ["bernoulli", "blend"])
def test_a_student_of_the_teachers_shape_is_grafted(
    toy_run: MakeRun, make_student: Callable[..., str], warnings: list[str], kind: str
) -> None:
    sets = [f"prune.grafting={{kind='{kind}', start=0.4}}", "prune.loss.relation=1", "prune.loss.relation_heads=8"]
    student = make_student(hidden_size=32, intermediate_size=64, layers=2)
    run = toy_run(*sets, student=student, until="prune")
    log_steps = steps(run, "prune")
    assert {step["replacing_rate"] for step in log_steps} == {0.4}
    assert {is_student for step in log_steps for is_student in step["drawn"]} == (
        {True} if kind == "blend" else {True, False}
    )
    assert not [line for line in warnings if "grafting" in line]


def test_a_blend_rises_to_the_student_alone(toy_run: MakeRun) -> None:
    sets = ["prune.grafting={kind='blend', start=0.2}", "distill.grafting={kind='blend', schedule='linear', start=0.2}"]
    run = toy_run(*sets, sparsity=0.8, until="finetune")
    assert [step["replacing_rate"] for step in steps(run, "distill")][:2] == [0.2, pytest.approx(0.2 + 0.8 / 12)]
    repeated = toy_run(*sets, sparsity=0.8, folder="again", until="distill")
    files = [(each_run.path / "distill" / "model.safetensors").read_bytes() for each_run in (run, repeated)]
    assert files[0] == files[1]


def test_pretrained_starts_from_the_model_with_a_new_head(
    toy_run: MakeRun, toy_task: Any, make_student: Callable[..., str]
) -> None:
    toy_task(build=False)
    encoder = encoder_only(make_student(hidden_size=32, layers=2))
    no_training = ["prune.learning_rate=1e-30", "prune.epochs=1", "prune.events=1", "prune.weight_decay=0"]
    run = toy_run(*no_training, model=encoder, student="pretrained", sparsity=0.0, until="prune")
    start, student, teacher_weights = (
        load_file(f"{encoder}/model.safetensors"),
        weights(run, "prune"),
        weights(run, "teacher"),
    )
    assert all(almost_equal(student[f"bert.{name}"], weight) for name, weight in start.items() if "pooler" not in name)
    assert not torch.equal(student["classifier.weight"], teacher_weights["classifier.weight"])
    repeated = toy_run(*no_training, model=encoder, student="pretrained", sparsity=0.0, folder="again", until="prune")
    assert torch.equal(weights(repeated, "prune")["classifier.weight"], student["classifier.weight"]), "seeded"
    other_seed = toy_run(
        *no_training, model=encoder, student="pretrained", sparsity=0.0, seed=1, folder="other", until="prune"
    )
    assert not torch.equal(weights(other_seed, "prune")["classifier.weight"], student["classifier.weight"])


def test_pretrained_of_a_task_with_a_model_of_its_own_is_that_model(toy_run: MakeRun, toys: ModuleType) -> None:
    run = toy_run("prune.learning_rate=1e-30", "prune.epochs=1", student="pretrained", sparsity=0.0, until="prune")
    start = toys.bert().state_dict()
    student = weights(run, "prune")
    assert all(almost_equal(student[name], start[name]) for name in student)


def test_the_labels_are_the_teachers_in_its_order(
    toy_run: MakeRun, make_student: Callable[..., str], toys: ModuleType
) -> None:
    """A student with the labels in reverse order gets its head reordered and keeps its predictions."""
    reversed_labels = make_student(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    no_training = ["prune.learning_rate=1e-30", "prune.epochs=1", "prune.events=1", "prune.weight_decay=0"]
    run = toy_run(*no_training, student=reversed_labels, sparsity=0.0, until="prune")
    before, after = load_model(reversed_labels), load_model(run.path / "prune")
    assert label_names(after) == label_names(load_model(run.path / "teacher")) == ["bad", "good"]
    batch = {name: column for name, column in toys.batch().items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(after(**batch).logits, before(**batch).logits.flip(-1))


@pytest.mark.parametrize("labels", [3, 0])
def test_an_encoder_or_a_classifier_of_another_task_gets_a_new_head(
    toy_run: MakeRun, make_student: Callable[..., str], warnings: list[str], labels: int
) -> None:
    three_labels = {"labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    folder = make_student(**three_labels) if labels else encoder_only(make_student())
    run = toy_run("prune.epochs=1", student=folder, until="prune")
    model = load_model(run.path / "prune")
    assert label_names(model) == ["bad", "good"]
    assert any("gets a new head: the model has 3 labels (a, b, c)" in line for line in warnings) == bool(labels)


def test_a_regression_student(toy_run: MakeRun, toy_task: Any, make_student: Callable[..., str]) -> None:
    toy_task(labels=())
    run = toy_run("prune.epochs=1", student=encoder_only(make_student()), until="prune")
    assert label_names(load_model(run.path / "prune")) == ["score"]


def test_a_student_of_another_family_reads_only_what_it_knows(
    toy_run: MakeRun, toy_task: Any, make_student: Callable[..., str], warnings: list[str]
) -> None:
    """A DistilBERT student of a BERT teacher, which reads token types, and the reverse."""
    toy_task(pairs=True)
    folder = make_student(architecture="distilbert", dim=16, hidden_dim=24, n_heads=2)
    run = toy_run("prune.loss.attention=1", student=folder, until="distill")
    assert load_model(run.path / "distill").config.model_type == "distilbert"
    assert "token_type_ids" not in load_tokenizer(run.path / "distill").model_input_names
    toy_task(pairs=True, architecture="distilbert")
    other_run = toy_run(
        "prune.loss.relation=1",
        "prune.loss.relation_heads=4",
        student=make_student("back"),
        folder="other",
        until="prune",
    )
    assert load_model(other_run.path / "prune").config.model_type == "bert"


def assert_refused(run: Run, error: type[Exception], message: str) -> None:
    teacher(run)
    with pytest.raises(error, match=message):
        prune(run)
    assert not run.done("prune")
    assert not (run.path / ".prune.partial").exists()


@pytest.mark.parametrize(
    ("setting", "fields", "error", "message"),
    [
        ("prune.loss.layer_map=[1, 2]", {}, RecipeError, r"prune.loss: layer_map = \[1, 2\]: a student of 1 layers"),
        ("finetune.loss.layer_map=[3]", {}, RecipeError, r"finetune.loss: layer_map = \[3\]"),
        ("prune.loss.layer_map=last", {"layers": 3}, RecipeError, "student has 3 layers and the teacher only 2"),
        ("prune.loss.relation=1", {}, RecipeError, "relation_heads = 12 does not divide"),
        ("prune.loss.attention=1", {"num_attention_heads": 4}, RecipeError, "student has 4 and the teacher 2"),
        ("max_length=60", {"max_position_embeddings": 30}, ModelError, "has 30 positions, and rows may have 60"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_the_work(
    toy_run: MakeRun,
    make_student: Callable[..., str],
    setting: str,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    assert_refused(toy_run(setting, "teacher.epochs=1", student=make_student(**fields)), error, message)


def test_a_new_head_that_would_stay_random_is_refused(toy_run: MakeRun, make_student: Callable[..., str]) -> None:
    run = toy_run("prune.train=layers", "teacher.epochs=1", student=encoder_only(make_student()))
    assert_refused(run, RecipeError, "gets a new head, and prune.train = 'layers' would leave it random")


def test_another_vocabulary_is_refused(toy_run: MakeRun, make_student: Callable[..., str]) -> None:
    folder = Path(make_student())
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"warm"', '"tepid"'), "utf-8")
    assert_refused(
        toy_run("teacher.epochs=1", student=str(folder)), ModelError, "'tepid' is number 8 here and unknown there"
    )


def test_a_tokenizer_that_cuts_otherwise_is_refused(toy_run: MakeRun, make_student: Callable[..., str]) -> None:
    folder = Path(make_student())
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"do_lower_case": False}), "utf-8")
    assert_refused(
        toy_run("teacher.epochs=1", student=str(folder)), ModelError, "cuts text otherwise than the teacher's"
    )


def test_an_interruption_leaves_no_trace_in_the_projections(
    toy_run: MakeRun, make_student: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["save_minutes=0", "prune.loss.relation=0.5", "prune.loss.relation_heads=4", "prune.weight_decay=0.1"]
    uninterrupted = toy_run(*sets, student=make_student(), until="finetune")
    run, original = toy_run(*sets, student=make_student(), folder="stopped", until="teacher"), torch.optim.AdamW.step
    for stage, stop in ((prune, 3), (prune, 4), (distill, 5), (finetune, 11)):
        calls = 0

        def step(*args: Any, stop: int = stop, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            stage(run)
        monkeypatch.setattr(torch.optim.AdamW, "step", original)
        if (stage, stop) != (prune, 3):
            stage(run)
    for stage_name in ("prune", "distill", "finetune"):
        for file in ("model.safetensors", "projections.safetensors"):
            expected, actual = (each_run.path / stage_name / file for each_run in (uninterrupted, run))
            assert expected.read_bytes() == actual.read_bytes(), (stage_name, file)


@pytest.mark.parametrize("recipe", ["theseus", "gmp"])
def test_the_recipes_train_on_what_they_say(toy_run: MakeRun, recipe: str) -> None:
    run = toy_run(name=recipe, sparsity=0.8, until="finetune")
    for stage in ("prune", "distill", "finetune"):
        assert all(set(step["losses"]) == {"loss", "logits"} for step in steps(run, stage))
    rates = [step["replacing_rate"] for stage in ("prune", "distill") for step in steps(run, stage)]
    assert (set(rates) == {1.0}) == (recipe == "gmp")
    assert rates[:12] == [0.5 if recipe == "theseus" else 1.0] * 12
    share = run.recipe.prune.loss.hardness
    assert share == (0.0 if recipe == "theseus" else 1.0)


@pytest.mark.parametrize(
    ("sets", "skip_dead_gradients"),
    [
        (("prune.criterion=magnitude", "prune.calibration=0"), True),
        (("prune.criterion=magnitude", "prune.calibration=0", "prune.regrowth=true"), False),
        (("prune.criterion=taylor",), False),
        (("prune.clip_over=all",), False),
        (("sparse_products=false",), None),
        (("compile=true",), None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.usefixtures("clean_plugins")
def test_sparse_products_learn_whether_dead_gradients_are_read(
    toy_run: MakeRun, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], skip_dead_gradients: bool | None
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # it takes long
    received = []

    @plugins.products.register("watching")
    def record_products(layers: dict[str, torch.nn.Linear], masks: Masks, *, skip_dead_gradients: bool) -> None:
        assert {name: layer.weight for name, layer in layers.items()} == masks.parameters
        received.append(skip_dead_gradients)

    toy_run("prune.max_steps=2", "prune.events=1", "prune.ramp=0.01", "teacher.max_steps=1", *sets, until="prune")
    assert received == ([] if skip_dead_gradients is None else [skip_dead_gradients])
