"""How a plan is printed: twelve lines, then the fields that were changed, and all of it with `--all`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdtool import console
from spdtool.recipe import TRAINING

if TYPE_CHECKING:
    from spdtool.recipe.fields import Recipe
    from spdtool.run.records import Plan, StagePlan

STAGE_COLUMNS = ("stage", "state", "epochs", "steps", "learning rate", "seconds", "why")
CHANGE_COLUMNS = ("changed field", "value", "in the recipe")
LISTED_LABELS = 8  # that fit into a line or two


def show_plan(plan: Plan, recipe: Recipe, *, everything: bool = False) -> None:
    """Print what a run will do.

    Args:
        everything: also every class, the reason of every number of epochs, and every field of the recipe.
    """
    if recipe.smoke:
        console.say("[yellow]SMOKE RUN: a small random model and a few steps; its numbers mean nothing[/]")
    console.print_lines(f"{plan.run}: recipe {recipe.name}, {_describe_size(recipe)}", summarise_plan(plan, recipe))
    if plan.changes:
        console.print_table("changed", CHANGE_COLUMNS, [tuple(map(_show_value, change)) for change in plan.changes])
    for note in plan.notes:
        console.warn(note)
    if plan.parameters.emptied:
        emptied = plan.parameters.emptied
        console.warn(f"{recipe.sparsity:g} leaves no weight at all in {emptied} matrices of this model")
    if everything:
        for line in plan.reading:
            console.say(console.escape(line))
        console.print_table("stages", STAGE_COLUMNS, [_stage_row(stage) for stage in plan.stages])
        console.say(describe_grafting(recipe))
        show_recipe(recipe)


def _describe_size(recipe: Recipe) -> str:
    if recipe.goal.is_set:
        return recipe.goal.describe()
    if recipe.prune.is_structured:
        return recipe.size_label
    return f"{recipe.sparsity:.4g} sparsity"


def show_recipe(recipe: Recipe) -> None:
    """Print every field of a recipe."""
    console.print_table(f"recipe {recipe.name}", ("field", "value"), list(recipe.values().items()))


def summarise_plan(plan: Plan, recipe: Recipe) -> list[tuple[str, str]]:
    """Return the lines of a plan as names and texts."""
    rows = ", ".join(f"{count:,} {name}" for name, count in plan.rows.items())
    # A guess about the user's file stands in the first line, where it is seen.
    about = [line.removeprefix("data: ") for line in plan.reading if line.startswith("data: ")]
    weights, further = plan.parameters, "; --metric picks one" if "mean of" in plan.score else ""
    loss = "are removed" if recipe.removes_structures else "become zero"
    lines = [
        ("data", "; ".join([f"{plan.task}: {rows} rows", *about])),
        ("labels", _describe_labels(plan)),
        ("dev score", f"{plan.score}{further}; without reading a text: {plan.baseline:.4f}"),
        ("model", f"{plan.model}; {weights.zeros:,} of {weights.all:,} parameters {loss}"),
    ]
    if plan.goal:
        lines.append(("goal", "; ".join(plan.goal)))
    lines += [(stage.stage, _describe_stage(stage, recipe)) for stage in plan.stages if stage.stage in TRAINING]
    # one line for both: each has its name, because both end with a time
    last = [f"{stage.stage} {_describe_stage(stage, recipe)}" for stage in plan.stages[-2:]]
    lines.append(("export, bench", "; ".join(last)))
    return [*lines, ("time", _describe_time(plan)), *_describe_sizes(plan)]


def _describe_labels(plan: Plan) -> str:
    classes = plan.classes.get("train") if isinstance(plan.classes, dict) else None
    if not isinstance(classes, dict):
        return "; ".join(line.removeprefix("labels: ") for line in plan.reading if line.startswith("labels: "))
    names = [f"{name} {count:,}" for name, count in classes.items()]
    further = f" and {len(names) - LISTED_LABELS:,} more" if len(names) > LISTED_LABELS else ""
    return f"{len(names)} classes: {', '.join(names[:LISTED_LABELS])}{further}"


def describe_grafting(recipe: Recipe) -> str:
    """Say in which phases teacher layers stand in for the student's."""
    if not recipe.grafted_phases:
        return "grafting: off in this recipe"
    return f"grafting: on in {' and '.join(recipe.grafted_phases)}"


def _describe_stage(stage: StagePlan, recipe: Recipe) -> str:
    from spdtool.run.forecast import format_duration

    if stage.done:
        return "done"
    actions = []
    if stage.epochs is not None and stage.steps is not None:
        actions = [_count(stage.epochs, "epoch"), _count(stage.steps, "step")]
        actions += [f"learning rate {stage.learning_rate:.3g}"] if stage.learning_rate is not None else []
    elif stage.stage == "teacher":
        actions = [stage.why]
    if stage.prune_events:
        actions.append(_count(stage.prune_events, "prune event"))
    if stage.stage in recipe.grafted_phases:
        actions.append("grafting")
    actions += [f"to {', '.join(stage.targets)}"] if stage.targets else []
    actions += [_about(format_duration(stage.estimate.seconds))] if stage.estimate is not None else []
    return ", ".join(actions)


def _describe_time(plan: Plan) -> str:
    from spdtool.run.forecast import format_duration

    if all(stage.done for stage in plan.stages):
        return "none: every stage is done"
    # As text: two ends that read the same are no range.
    least, most = map(format_duration, plan.estimate.seconds)
    text = _about(most) if least == most else f"{least} to {most}"
    processes = "one process"
    if plan.estimate.processes > 1:
        # Processes on one CPU take its cores from each other.
        sharing = "with a GPU each" if plan.estimate.device == "cuda" else "that share the cores"
        processes = f"{plan.estimate.processes} processes {sharing}"
    return f"{text} in {processes}, from a trial of the model's matrix products on this {plan.estimate.device}"


def _describe_sizes(plan: Plan) -> list[tuple[str, str]]:
    estimate = plan.estimate
    disk = f"{console.format_bytes(estimate.disk_bytes)} for the run"
    disk += f", {console.format_bytes(estimate.peak_bytes)} meanwhile"
    if estimate.cache_bytes:
        disk += f", up to {console.format_bytes(estimate.cache_bytes)} of cache"
    files = [f"{name} {console.format_bytes(size)}" for name, size in estimate.files.items()]
    memory = f"about {console.format_bytes(estimate.memory_bytes)} of memory in training"
    if estimate.processes > 1:
        memory += " for each process"
    return [("disk", f"about {disk}; {memory}"), ("result", f"about {', '.join(files)}, from the number of parameters")]


def _count(number: float, noun: str) -> str:
    return f"{number:,.12g} {noun}" if number == 1 else f"{number:,.12g} {noun}s"


def _about(duration: str) -> str:
    return duration if duration.startswith("under") else f"about {duration}"


def _stage_row(stage: StagePlan) -> tuple[object, ...]:
    state = "done" if stage.done else "to do"
    rate = None if stage.learning_rate is None else f"{stage.learning_rate:.3g}"
    seconds = None if stage.estimate is None else round(stage.estimate.seconds)
    return console.phase_title(stage.stage), state, stage.epochs, stage.steps, rate, seconds, stage.why


def _show_value(value: object) -> object:
    return "none" if value is None else value
