"""The plan: steps, weights, memory, and settings that it refuses before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdtool.errors import DeviceError, ModelError, RecipeError, UnknownName
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import save_model
from spdtool.recipe import STAGES
from spdtool.run.folder import Run
from spdtool.stages import estimate
from spdtool.stages import plan as planning
from spdtool.training import schedules

MakeRun = Callable[..., Run]


def test_the_plan_of_a_new_run(toy_run: MakeRun) -> None:
    planned = planning.make_plan(toy_run("prune.epochs=3", "finetune.max_steps=5", sparsity=0.3))
    stages = {stage.stage: stage for stage in planned.stages}
    assert planned.rows == {"train": 48, "dev": 24}
    assert list(stages) == list(STAGES)
    assert {name: stage.steps for name, stage in stages.items()} == {
        "teacher": 12, "prune": 18, "distill": 12, "finetune": 5, "export": None, "bench": None,
    }  # fmt: skip
    assert stages["finetune"].why == "as the recipe says; at most 5 steps"
    assert not any(stage.done for stage in stages.values())


def test_the_plan_says_how_the_rows_were_read(toy_run: MakeRun, toy_task: Callable[..., Any]) -> None:
    planned = planning.make_plan(toy_run())
    assert planned.reading == [
        "labels: 2 classes: bad 24, good 24; dev: bad 12, good 12; always the commonest: dev score 0.5000"
    ]
    assert planned.classes["train"] == {"bad": 24, "good": 24}
    assert planned.baseline == 0.5
    toy_task("stars", labels=())
    planned = planning.make_plan(toy_run(task="stars"))
    assert planned.reading[0].startswith("labels: regression, 0.")
    assert planned.baseline == 0


def test_the_plan_says_that_a_given_teachers_labels_have_no_names(
    toy_run: MakeRun, toys: ModuleType, tmp_path: Path
) -> None:
    save_model(toys.bert(), toys.tokenizer(), tmp_path / "given")
    notes = planning.make_plan(toy_run(given_teacher=str(tmp_path / "given"))).notes
    assert "the given teacher's labels are taken in their order: LABEL_0 is bad, LABEL_1 is good" in notes
    toys.bert(id2label={0: "good", 1: "Bad"}).save_pretrained(tmp_path / "given")
    assert not any("order" in note for note in planning.make_plan(toy_run(given_teacher=str(tmp_path / "given"))).notes)


def test_a_derived_learning_rate_is_shown(toy_run: MakeRun, toys: ModuleType) -> None:
    stages = planning.make_plan(toy_run("prune.learning_rate=none", "distill.learning_rate=2e-3")).stages
    rates = {stage.stage: stage.learning_rate for stage in stages}
    assert rates["prune"] == pytest.approx(0.384 / toys.bert().config.hidden_size)
    assert rates["distill"] == 2e-3
    assert rates["export"] is None


def test_the_weights_are_those_of_the_model(toy_run: MakeRun, toys: ModuleType) -> None:
    parameters = planning.make_plan(toy_run(sparsity=0.3)).parameters
    model = toys.bert()
    sizes = [weight.numel() for weight in find_prunable_weights(model).values()]
    assert parameters.all == sum(parameter.numel() for parameter in model.parameters())
    assert parameters.prunable == sum(sizes)
    assert parameters.zeros == sum(round(0.3 * size) for size in sizes)
    assert parameters.emptied == 0


def test_a_sparsity_that_empties_matrices_is_counted(toy_run: MakeRun) -> None:
    assert planning.make_plan(toy_run(sparsity=0.9999)).parameters.emptied == 12


def test_planning_writes_nothing_and_sees_what_is_done(toy_run: MakeRun, tmp_path: Path) -> None:
    planning.make_plan(toy_run())
    assert list(tmp_path.iterdir()) == []
    run = toy_run(until="prune")
    assert [stage.done for stage in planning.make_plan(run).stages] == [True, True, False, False, False, False]


def test_a_given_teacher_is_not_trained(toy_run: MakeRun, toys: ModuleType, tmp_path: Path) -> None:
    save_model(toys.bert(), toys.tokenizer(), tmp_path / "given")
    first = planning.make_plan(toy_run(given_teacher=str(tmp_path / "given"))).stages[0]
    assert (first.steps, first.why) == (None, f"given: {tmp_path / 'given'}")


@pytest.mark.parametrize(
    ("labels", "model", "message"),
    [
        (("bad", "good"), {"labels": 3}, "the model has 3 labels"),
        ((), {"labels": 3}, "the model has 3 labels; 'toy' is a regression task"),
        (("bad", "good"), {"id2label": {0: "cat", 1: "dog"}}, "the model calls its labels cat, dog"),
        (("bad", "good"), {"architectures": ["BertModel"]}, "is no fine-tuned classifier"),
    ],
)
def test_a_given_teacher_of_another_task_is_refused_by_the_plan(
    toy_run: MakeRun,
    toy_task: Callable[..., Any],
    toys: ModuleType,
    tmp_path: Path,
    labels: tuple[str, ...],
    model: dict[str, Any],
    message: str,
) -> None:
    toy_task(labels=labels)
    architectures = model.pop("architectures", None)
    teacher = toys.bert(**model)
    teacher.save_pretrained(tmp_path / "given")
    if architectures:
        file = tmp_path / "given" / "config.json"
        file.write_text(file.read_text("utf-8").replace("BertForSequenceClassification", *architectures), "utf-8")
    run = toy_run(given_teacher=str(tmp_path / "given"))
    for check in (planning.make_plan, planning.check_run):
        with pytest.raises(ModelError, match=message):
            check(run)


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("prune.criterion=magnitud", UnknownName, "criterion"),
        ("prune.pattern=nope", UnknownName, "pattern"),
        ('export.targets=["nope"]', UnknownName, "target"),
        ("prune.grafting.schedule=nope", UnknownName, "schedule"),
        ("finetune.grafting.schedule=nope", UnknownName, "schedule"),
        ("prune.events=9", RecipeError, "9 prune events do not fit in 8 optimiser steps"),
        ("precision=fp16", DeviceError, "fp16"),
    ],
)
def test_settings_that_a_later_stage_would_refuse_are_refused_by_the_plan(
    toy_run: MakeRun, assignment: str, error: type[Exception], message: str
) -> None:
    run = toy_run(assignment)
    with pytest.raises(error, match=message):
        planning.make_plan(run)
    with pytest.raises(error, match=message):
        planning.check_run(run)


def test_events_that_just_fit_are_accepted(toy_run: MakeRun) -> None:
    planning.check_run(toy_run("prune.events=8"))


def test_the_memory_estimate_grows_with_batch_size_and_attention_loss(toy_run: MakeRun, toys: ModuleType) -> None:
    model = toys.bert()

    def bytes_of(*sets: str) -> int:
        return estimate.estimate_memory(toy_run(*sets).recipe, model, model)

    optimizer_bytes = 4 * 5 * sum(parameter.numel() for parameter in model.parameters())
    assert bytes_of() > optimizer_bytes
    assert bytes_of("prune.batch_size=16") > bytes_of() > bytes_of("prune.accumulate=4")
    assert bytes_of("prune.loss.attention=1") > bytes_of()


@pytest.mark.parametrize(
    ("sparsity", "initial", "first"),
    [(0.9, 0.0, 0.7), (0.95, 0.0, 0.7), (0.5, 0.0, 0.4), (0.9, 0.5, 0.7), (0.9, 0.8, None), (0.0, 0.0, None)],
)
def test_the_first_jump_stays_below_the_target_and_above_what_is_zero_already(
    toys: ModuleType, sparsity: float, initial: float, first: float | None
) -> None:
    events = schedules.plan_prune_events(toys.recipe("prune.first=0.7", sparsity=sparsity), 100, initial=initial)
    assert events[-1][1] == sparsity
    assert len(events) == 3
    if first is None:
        assert events[0][0] > 0
    else:
        assert events[0] == (0, pytest.approx(first))


def test_the_first_jump_does_not_pass_by_a_student_that_is_to_be_left(toys: ModuleType) -> None:
    leave = (0.5, 0.7, 0.8, 0.9)
    events = schedules.plan_prune_events(
        toys.recipe("prune.first=0.7", f"prune.save_at={[*leave]}", sparsity=0.95), 100
    )
    assert events[0] == (0, 0.5)
    assert set(leave) <= {sparsity for _, sparsity in events}
    assert [step for step, _ in events] == sorted({step for step, _ in events})


def test_a_student_that_is_to_be_saved_beyond_its_shape_is_refused_by_the_plan(toy_run: Callable[..., Run]) -> None:
    shape = {"prune.heads": 0.5, "prune.neurons": 0.5, "sparsity": 0.9}
    plan = planning.make_plan(toy_run(folder="shape", **shape))
    final = plan.parameters.shape_sparsity
    assert final is not None
    assert final < 0.8
    run = toy_run(folder="beyond", **shape, **{"prune.save_at": [0.8]})
    with pytest.raises(RecipeError, match=f"sparsity 0.8 is not on the way of the prune events .* to {final:g}"):
        planning.make_plan(run)


def test_exchanges_without_regrowth_are_refused(toys: ModuleType) -> None:
    recipe = toys.recipe("prune.exchanges=2", "prune.freeze=0.9")
    with pytest.raises(RecipeError, match="change nothing"):
        planning.check_recipe(recipe, 48)
    planning.check_recipe(toys.recipe("prune.exchanges=1", "prune.freeze=1.0", "prune.regrowth=true"), 48)
