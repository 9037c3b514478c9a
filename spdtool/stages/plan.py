"""What a recipe will do, before it does it: stages, steps with their reasons, weights to prune, memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from spdtool import plugins
from spdtool.data.dataset import Rows, identify_rows
from spdtool.data.overview import LISTED_NAMES
from spdtool.distillation.grafting import replacing_rate
from spdtool.distillation.layer_map import check_phases
from spdtool.errors import RecipeError
from spdtool.export.precheck import check_exportable
from spdtool.export.target import required_targets
from spdtool.models.layers import find_prunable_weights, model_shape
from spdtool.models.load import build_empty_teacher, label_names, load_tokenizer
from spdtool.models.student import (
    build_empty_student,
    check_positions,
    check_tokenizers,
    load_student_tokenizer,
    read_student_labels,
)
from spdtool.pruning.allocation import zeros_in
from spdtool.recipe import STAGES
from spdtool.recipe.fields import Recipe, Training
from spdtool.run.folder import Run
from spdtool.run.records import Plan, StagePlan, WeightCounts
from spdtool.tasks import Task, find_task
from spdtool.training.accelerator import create_accelerator
from spdtool.training.saliency import check_saliency
from spdtool.training.schedules import plan_prune_events

FLOAT = 4  # bytes
ADAM_MOMENTS = 2
RELATIONS = 4  # maps of token-to-token relations that are kept for a layer: two of the student's, two of the teacher's
SAVED_PER_TOKEN = 16  # widths of activation that a transformer layer keeps for its backward pass, roughly


def make_plan(run: Run, redo: str | None = None) -> Plan:
    """The stages of `run` with what each will cost; reads the data, and only the configuration of the model.

    Args:
        redo: this stage and every later one are about to be discarded.

    Raises:
        DataError, ModelError: the data or the model cannot be used; an unknown architecture cannot be exported.
        UnknownName, RecipeError, DeviceError: see `check` and `check_student`.
        RunMismatch: finished stages saw other rows.
    """
    recipe = run.recipe
    task = find_task(recipe)
    splits = task.read_rows(recipe)
    rows = {name: len(split) for name, split in splits.items()}
    check_recipe(recipe, rows["train"])
    check_rows(run, task, splits, redo)
    student, teacher = load_pair(recipe, task)
    matrices = [weight.numel() for weight in find_prunable_weights(student).values()]
    if not run.done("export"):
        check_exportable(recipe, (student.config, teacher.config))
    baseline = task.baseline(np.asarray(splits["dev"].labels))["score"]
    return Plan(
        run=str(run.path),
        rows=rows,
        reading=describe_rows(task, splits),
        classes=task.count_classes(splits),
        baseline=baseline,
        notes=[*task.data_warnings(splits), *_by_position(recipe, task, teacher)],
        stages=[
            _stage(run, stage, rows["train"], (teacher if stage == "teacher" else student).config.hidden_size)
            for stage in STAGES
        ],
        parameters=WeightCounts(
            all=sum(parameter.numel() for parameter in student.parameters()),
            prunable=sum(matrices),
            zeros=sum(zeros_in(size, recipe.sparsity) for size in matrices),
            emptied=sum(zeros_in(size, recipe.sparsity) == size for size in matrices),
        ),
        memory_bytes=estimate_memory(recipe, student, teacher),
    )


def describe_rows(task: Task, splits: dict[str, Rows]) -> list[str]:
    """Say how the rows were read, a line each."""
    line = f"labels: {task.describe_labels(splits)}"
    source = [f"data: {task.dataset.about}"] if task.name == "local" else []
    return [*source, line]


def _by_position(recipe: Recipe, task: Task, teacher: Any) -> list[str]:
    """How the labels of a given teacher are read, where its names do not tell."""
    names = label_names(teacher)
    if recipe.given_teacher is None or not task.matches_by_position(names):
        return []
    pairs = [f"{name} is {label}" for name, label in zip(names, task.head_labels, strict=True)][:LISTED_NAMES]
    return [f"the given teacher's labels are taken in their order: {', '.join(pairs)}"]


def check_recipe(recipe: Recipe, rows: int) -> None:
    """Refuse now what a later stage would refuse after hours: names, prune events that do not fit, the device.

    Args:
        rows: of the training set.

    Raises:
        UnknownName: no such criterion, pattern, target or schedule.
        RecipeError: the prune events do not fit into their stage, or the first target does not export the teacher.
        DeviceError: the device is not there.
    """
    plugins.criteria.get(recipe.prune.criterion)
    plugins.patterns.get(recipe.prune.pattern)
    required_targets(recipe.export)
    for phase in (recipe.prune, recipe.distill, recipe.finetune):
        replacing_rate(phase.grafting)
    events = plan_prune_events(recipe, recipe.prune.length(rows).steps)
    check_saliency(recipe.prune, events, copied=recipe.student is None)
    if recipe.prune.exchanges and not recipe.prune.regrowth:
        raise RecipeError(
            f"{recipe.prune.exchanges} exchanges change nothing: without regrowth the dead stay dead",
            "add --set prune.regrowth=true, or leave prune.exchanges out",
        )
    create_accelerator(recipe)


def check_run(run: Run, redo: str | None = None) -> None:
    """`check` for a run that has its teacher already, before the stage `redo` is done again; raises as `plan` does."""
    task = find_task(run.recipe)
    splits = task.read_rows(run.recipe)
    check_recipe(run.recipe, len(splits["train"]))
    check_rows(run, task, splits, redo)
    load_pair(run.recipe, task)


def check_rows(run: Run, task: Task, splits: dict[str, Rows], redo: str | None) -> None:
    """Raise RunMismatch if a finished stage before `redo` (None: any) saw other rows."""
    kept = [stage for stage in STAGES[: STAGES.index(redo) if redo else None] if run.done(stage)]
    if kept:
        run.require_same_data(identify_rows(task.dataset, splits), kept)


def load_pair(recipe: Recipe, task: Task) -> tuple[Any, Any]:
    """Outlines of student and teacher, which fit each other and, where the teacher is given, the task.

    Raises:
        ModelError, RecipeError: one cannot be read, or they do not fit: see `models.student` and `Task.label_order`.
    """
    teacher = build_empty_teacher(recipe, task)
    if recipe.given_teacher is not None:
        task.label_order(label_names(teacher))
    student = build_empty_student(recipe, task, teacher)
    check_phases(recipe, model_shape(student), model_shape(teacher))
    check_positions(recipe, student, teacher)
    if recipe.student is not None:
        read_student_labels(recipe, task)
        if task.dataset.build is not None and recipe.given_teacher is None:
            taught = task.dataset.build(recipe.seed)[1]
        else:
            taught = load_tokenizer(recipe.given_teacher or recipe.model)
        check_tokenizers(load_student_tokenizer(recipe, task), taught)
    return student, teacher


def estimate_memory(recipe: Recipe, model: Any, teacher: Any = None) -> int:
    """Estimated peak bytes of the student's phases: two models, gradients, AdamW's moments, saved activations.

    Args:
        model: the student.
        teacher: None: one like it.
    """
    weights, its = (sum(weight.numel() for weight in made.parameters()) for made in (model, teacher or model))
    section = recipe.prune
    rows = -(-section.batch_size // section.accumulate)
    tokens = rows * recipe.max_length
    config = model.config
    per_token = SAVED_PER_TOKEN * config.hidden_size
    if section.loss.attention > 0:
        per_token += 3 * config.num_attention_heads * recipe.max_length
    if section.loss.relation > 0:
        per_token += RELATIONS * section.loss.relation_heads * recipe.max_length
    layers = config.num_hidden_layers
    if section.grafting.kind == "blend":  # gradients pass through the teacher's layers too
        layers *= 2
    return FLOAT * (its + weights * (1 + 1 + ADAM_MOMENTS) + tokens * per_token * layers)


def _stage(run: Run, stage: str, rows: int, width: int) -> StagePlan:
    section = run.recipe.section(stage)
    planned = StagePlan(stage=stage, done=run.done(stage))
    if stage == "teacher" and run.recipe.given_teacher is not None:
        planned.why = f"given: {run.recipe.given_teacher}"
    elif isinstance(section, Training):
        length = section.length(rows)
        planned.epochs, planned.steps, planned.why = length.epochs, length.steps, length.reason
        planned.learning_rate = section.peak(width)
    return planned
