"""What a recipe will do, before it does it: stages, steps with their reasons, weights to prune, memory."""

from __future__ import annotations

from typing import Any

from spdtool import encoders, plugins, tasks, training
from spdtool.export import targets
from spdtool.pruning.patterns import zeros_in
from spdtool.recipe import STAGES, Recipe, Training
from spdtool.run import Run
from spdtool.schedules import prune_events, replacing_rate

FLOAT = 4  # bytes
ADAM_MOMENTS = 2
SAVED_PER_TOKEN = 16  # widths of activation that a transformer layer keeps for its backward pass, roughly


def plan(run: Run) -> dict[str, Any]:
    """The stages of `run` with what each will cost; reads the data, and only the configuration of the model.

    Returns:
        `stages` (stage, done, epochs, steps, why), `rows`, `parameters` (all, prunable, zeros; matrices emptied)
        and `memory_bytes` (an estimate of the peak of the training stages, to about a factor of 1.5).

    Raises:
        DataError, ModelError: the data or the model cannot be used.
        UnknownName, RecipeError, DeviceError: see `check`.
    """
    recipe = run.recipe
    task = tasks.resolve(recipe)
    rows = {name: len(split) for name, split in tasks.rows(task, recipe).items()}
    check(recipe, rows["train"])
    model = encoders.skeleton(recipe, task)
    matrices = [weight.numel() for weight in encoders.prunable_linears(model).values()]
    return {
        "run": str(run.path),
        "rows": rows,
        "stages": [_stage(run, stage, rows["train"]) for stage in STAGES],
        "parameters": {
            "all": sum(parameter.numel() for parameter in model.parameters()),
            "prunable": sum(matrices),
            "zeros": sum(zeros_in(size, recipe.sparsity) for size in matrices),
            "emptied": sum(zeros_in(size, recipe.sparsity) == size for size in matrices),
        },
        "memory_bytes": memory(recipe, model),
    }


def check(recipe: Recipe, rows: int) -> None:
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
    targets.demanded(recipe.export)
    for phase in (recipe.prune, recipe.distill, recipe.finetune):
        replacing_rate(phase.grafting.schedule)
    section = recipe.prune
    steps = max(1, round(section.ramp * section.steps_for(rows)))
    prune_events(steps, section.events, recipe.sparsity, first=section.first, shape=section.schedule)
    training.accelerator(recipe)


def check_run(run: Run) -> None:
    """`check` for a run that has its teacher already, before a stage of it is redone; raises as `plan` does."""
    check(run.recipe, len(tasks.rows(tasks.resolve(run.recipe), run.recipe)["train"]))


def memory(recipe: Recipe, model: Any) -> int:
    """Estimated peak bytes of the student's phases: two models, gradients, AdamW's moments, saved activations."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    section = recipe.prune
    rows = -(-section.batch_size // section.accumulate)
    tokens = rows * recipe.max_length
    config = model.config
    per_token = SAVED_PER_TOKEN * config.hidden_size
    if section.loss.attention > 0:
        per_token += 3 * config.num_attention_heads * recipe.max_length
    activations = tokens * per_token * config.num_hidden_layers
    return FLOAT * (weights * (2 + 1 + ADAM_MOMENTS) + activations)


def _stage(run: Run, stage: str, rows: int) -> dict[str, Any]:
    section = run.recipe.section(stage)
    known: dict[str, Any] = {"stage": stage, "done": run.done(stage), "epochs": None, "steps": None, "why": ""}
    if stage == "teacher" and run.recipe.given_teacher is not None:
        return known | {"why": f"given: {run.recipe.given_teacher}"}
    if isinstance(section, Training):
        epochs, why = section.epochs_for(rows)
        if section.max_steps is not None:
            why += f"; at most {section.max_steps} steps"
        return known | {"epochs": epochs, "steps": section.steps_for(rows), "why": why}
    return known
