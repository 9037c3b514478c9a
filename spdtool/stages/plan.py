"""The plan of a run before anything is spent: stages, steps with their reasons, weights to prune, memory.

It refuses at once what a later stage would refuse after hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import plugins
from spdtool.data.dataset import UNLABELED, Rows, identify_rows
from spdtool.data.overview import LISTED_NAMES, leaked_unlabeled_rows
from spdtool.distillation.grafting import replacing_rate
from spdtool.distillation.layer_map import check_phases
from spdtool.errors import RecipeError
from spdtool.export.target import INSTALLED, required_targets
from spdtool.models.config import check_kind
from spdtool.models.layers import find_prunable_weights, model_shape
from spdtool.models.load import build_empty_teacher, label_names, load_tokenizer
from spdtool.models.structures import find_structures
from spdtool.models.student import (
    build_empty_student,
    check_positions,
    check_tokenizers,
    load_student_tokenizer,
    read_student_labels,
)
from spdtool.models.vocabulary import read_extra_texts
from spdtool.pruning.allocation import zeros_in
from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.structure import choose_shape, full_shape, shape_sparsity
from spdtool.pruning.structured import find_needs
from spdtool.recipe import STAGES
from spdtool.recipe.fields import Recipe
from spdtool.recipe.spelling import list_changes
from spdtool.recipe.training import Prune, Training
from spdtool.run.folder import Run
from spdtool.run.records import Plan, StagePlan, WeightCounts
from spdtool.stages.estimate import Estimator, Pair, count_epoch_tokens, count_inputs
from spdtool.stages.trial import try_families
from spdtool.tasks.prepare import find_task
from spdtool.tasks.task import Task
from spdtool.training.accelerator import create_accelerator
from spdtool.training.schedules import add_zeros_inside, plan_prune_events
from spdtool.training.statistics_collector import check_statistics
from spdtool.training.trackers import check_trackers

Splits = dict[str, Rows]


def make_plan(run: Run, redo: str | None = None) -> Plan:
    """Plan the stages of `run` with the cost of each; read the data, and only the configuration of the model.

    Args:
        redo: this stage and every later one are about to be discarded.

    Raises:
        DataError, ModelError: the data or the model cannot be used; an unknown architecture cannot be exported.
        UnknownName, RecipeError: see `check_recipe` and `load_pair`.
        DeviceError: see `create_accelerator`.
        RunMismatch: finished stages saw other rows.
    """
    recipe = run.recipe
    task = find_task(recipe)
    splits = task.read_rows(recipe)
    rows = {name: len(split) for name, split in splits.items()}
    check_recipe(recipe, count_epoch_rows(recipe, rows))
    accelerator = create_accelerator(recipe)
    check_rows(run, task, splits, redo)
    student, teacher = load_pair(recipe, task)
    if recipe.given_teacher is not None:
        task = task.widen(label_names(teacher))
    if not run.done("export"):
        # An architecture that nobody has tried is traced now, not after hours of training.
        try_families(recipe, task, (student.config, teacher.config))
    counts = _count_weights(recipe, student)
    if recipe.prune.is_structured:
        _check_events(recipe, count_epoch_rows(recipe, rows), counts.shape_sparsity)
    pair = Pair(student, teacher, load_teacher_tokenizer(recipe, task))
    inputs = {name: count_inputs(task, recipe, pair.tokenizer, split) for name, split in splits.items()}
    epoch_rows = count_epoch_rows(recipe, inputs)
    tokens = count_epoch_tokens(task, recipe, pair.tokenizer, splits, inputs)
    estimator = Estimator(run, inputs, tokens, pair, counts, accelerator.device)
    stages = []
    for stage in STAGES:
        model = teacher if stage == "teacher" else student
        stage_rows = inputs["train"] if stage == "teacher" else epoch_rows
        planned = _plan_stage(run, stage, stage_rows, model.config.hidden_size, counts.shape_sparsity)
        if stage == "export":
            planned.targets = [choice.name for choice in estimator.chosen]
        if not planned.done:
            planned.estimate = estimator.estimate_stage(stage)
        stages.append(planned)
    labeled = {name: split for name, split in splits.items() if name != UNLABELED}
    lines = [f"labels: {task.describe_labels(labeled)}"]
    notes = task.data_warnings(labeled) + leaked_unlabeled_rows(splits)
    # A file of the user: the columns were guessed, perhaps wrongly.
    if task.name == "local":
        lines.insert(0, f"data: {task.dataset.about}")
    return Plan(
        run=str(run.path),
        task=task.name,
        rows=rows,
        reading=lines,
        classes=task.count_classes(labeled),
        baseline=task.baseline(splits["dev"])["score"],
        score=task.describe_score(),
        model=_describe_model(recipe, student),
        notes=[*notes, *_label_notes(recipe, task, teacher), *_export_notes(run, recipe)],
        stages=stages,
        parameters=counts,
        estimate=estimator.estimate_run(sum(stage.estimate.seconds for stage in stages if stage.estimate)),
        changes=list_changes(recipe),
    )


def count_epoch_rows(recipe: Recipe, rows: Mapping[str, int]) -> int:
    """Return how many rows an epoch of the student has, with those without labels."""
    return rows["train"] + recipe.unlabeled_per_epoch(rows["train"], rows.get(UNLABELED, 0))


def check_recipe(recipe: Recipe, rows: int) -> None:
    """Refuse what a later stage would refuse after hours: unknown names, prune events that do not fit.

    Args:
        rows: of an epoch of the student; windows of them only make an epoch longer.

    Raises:
        UnknownName: no such criterion, pattern, target or schedule.
        RecipeError: the pattern cannot have so many zeros, the prune events do not fit into their
            stage, or the first target does not export the teacher.
    """
    plugins.criteria.get(recipe.prune.criterion)
    if recipe.prune.is_structured:  # the sparsity follows from the shape
        find_needs(recipe.prune)
        pattern = find_pattern(recipe.prune.pattern)
        if pattern.group > 1:
            raise RecipeError(
                f"the pattern {pattern.name} is no pattern for zeros inside a smaller student",
                "--set prune.pattern=1x4, or another pattern of blocks",
            )
    else:
        find_pattern(recipe.prune.pattern).check_sparsity(recipe.sparsity, recipe.prune.scope)
    required_targets(recipe.export)
    for phase in (recipe.prune, recipe.distill, recipe.finetune):
        replacing_rate(phase.grafting)
    if not recipe.prune.is_structured:  # the shape of a student says how far its events go
        _check_events(recipe, rows)
    if recipe.prune.exchanges and not recipe.prune.regrowth:
        raise RecipeError(
            f"{recipe.prune.exchanges} exchanges change nothing: without regrowth the dead stay dead",
            "add --set prune.regrowth=true, or leave prune.exchanges out",
        )
    check_trackers(recipe)
    read_extra_texts(recipe)


def _check_events(recipe: Recipe, rows: int, final: float | None = None) -> None:
    """Raise RecipeError if the prune events do not fit into their stage, or one has too few statistics.

    Args:
        rows: of an epoch of the student.
        final: sparsity of the shape of a structured student; None: that of the recipe.
    """
    events = plan_prune_events(recipe, recipe.prune.length(rows).steps, final=final)
    check_statistics(recipe.prune, events, copied=recipe.copies_teacher)


def check_run(run: Run, redo: str | None = None) -> None:
    """Check a run that has its teacher, before the stage `redo` is done again; raises as `make_plan` does."""
    task = find_task(run.recipe)
    splits = task.read_rows(run.recipe)
    check_recipe(run.recipe, count_epoch_rows(run.recipe, {name: len(split) for name, split in splits.items()}))
    create_accelerator(run.recipe)  # raises where the device is missing
    check_rows(run, task, splits, redo)
    load_pair(run.recipe, task)


def check_rows(run: Run, task: Task, splits: Splits, redo: str | None) -> None:
    """Raise RunMismatch if a finished stage before `redo` (None: any) saw other rows."""
    earlier = STAGES[: STAGES.index(redo)] if redo else STAGES  # the others are about to be dropped
    finished = list(filter(run.done, earlier))
    if finished:
        run.require_same_data(identify_rows(task.dataset, splits), finished)


def load_pair(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build student and teacher without weights; they fit each other and, where the teacher is given, the task.

    Raises:
        ModelError, RecipeError: one cannot be read, or they do not fit: see `models.student` and `Task.label_order`.
    """
    teacher = build_empty_teacher(recipe, task)
    if recipe.given_teacher is not None:
        check_kind(recipe.given_teacher, teacher.config, task)
        task = task.widen(label_names(teacher))
        task.label_order(label_names(teacher))
    student = build_empty_student(recipe, task, teacher)
    check_phases(recipe, model_shape(student), model_shape(teacher))
    check_positions(recipe, student, teacher)
    if recipe.student is not None:
        read_student_labels(recipe, task)
        check_tokenizers(load_student_tokenizer(recipe, task), load_teacher_tokenizer(recipe, task))
    return student, teacher


def load_teacher_tokenizer(recipe: Recipe, task: Task) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe's teacher; raises ModelError where there is none."""
    if task.dataset.build is not None and recipe.given_teacher is None:
        tokenizer: PreTrainedTokenizerBase = task.dataset.build(recipe.seed)[1]
        return tokenizer
    return load_tokenizer(recipe.given_teacher or recipe.model)


def _label_notes(recipe: Recipe, task: Task, teacher: PreTrainedModel) -> Sequence[str]:
    """Say how the labels of a given teacher are read, where its names do not tell."""
    names = label_names(teacher)
    if recipe.given_teacher is None or not task.matches_by_position(names):
        return ()
    pairs = [f"{name} is {label}" for name, label in zip(names, task.head_labels, strict=True)]
    return [f"the given teacher's labels are taken in their order: {', '.join(pairs[:LISTED_NAMES])}"]


def _export_notes(run: Run, recipe: Recipe) -> Sequence[str]:
    """Say that zeros save no time, where no installed target has operators that skip them."""
    if run.done("export") or recipe.export.optional != INSTALLED or plugins.library_targets():
        return ()
    return [
        "zeros save neither time nor bytes in plain onnxruntime, and no plugin with operators for sparse models is "
        f"installed: {plugins.install_hint('NAME')}"
    ]


def _describe_model(recipe: Recipe, student: PreTrainedModel) -> str:
    config, source = student.config, recipe.model
    if recipe.student is not None:
        source = f"{recipe.model} as the student" if recipe.student == "pretrained" else recipe.student
    elif recipe.given_teacher is not None:
        source = recipe.given_teacher
    elif find_task(recipe).dataset.build is not None:
        source = "the task's own model"
    return f"{source}: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"


def _count_weights(recipe: Recipe, student: PreTrainedModel) -> WeightCounts:
    counts = WeightCounts(all=student.num_parameters(), prunable=0, zeros=0, emptied=0)
    if recipe.prune.is_structured:
        layers = find_structures(student)
        sparsity = shape_sparsity(layers, choose_shape(recipe.prune, full_shape(layers)))
        counts.prunable = sum(weight.numel() for weight in find_prunable_weights(student).values())
        counts.zeros = round(add_zeros_inside(sparsity, recipe.prune.zeros) * counts.prunable)
        counts.shape_sparsity = sparsity
        if recipe.prune.zeros:
            for name, weight in find_prunable_weights(student).items():
                find_pattern(recipe.prune.pattern).check_shape(name, tuple(weight.shape))
        return counts
    pattern = find_pattern(recipe.prune.pattern)
    for name, weight in find_prunable_weights(student).items():
        pattern.check_shape(name, tuple(weight.shape))
        zeros = zeros_in(weight.numel(), recipe.sparsity, pattern.block_size)
        counts.prunable += weight.numel()
        counts.zeros += zeros
        counts.emptied += zeros == weight.numel()
    return counts


def _plan_stage(run: Run, stage: str, rows: int, width: int, final: float | None) -> StagePlan:
    """Plan a stage on so many rows, of a model of that hidden width; `final` as in `plan_prune_events`."""
    section = run.recipe.section(stage)
    planned = StagePlan(stage=stage, done=run.done(stage))
    if stage == "teacher" and run.recipe.given_teacher is not None:
        planned.why = f"given: {run.recipe.given_teacher}"
    elif isinstance(section, Training):
        length = section.length(rows)
        planned.epochs, planned.steps, planned.why = length.epochs, length.steps, length.reason
        planned.learning_rate = section.peak(width)
        if isinstance(section, Prune):
            planned.prune_events = len(plan_prune_events(run.recipe, length.steps, final=final))
    return planned
