"""The commands of the stages: compress runs all that are missing, the others run one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool import console, ranks
from spdtool.cli.options import (
    Again,
    DryRun,
    ExistingRun,
    Processes,
    RecipeOptions,
    RunPath,
    Sets,
    command,
)

if TYPE_CHECKING:
    from spdtool.recipe.fields import Recipe
    from spdtool.run.folder import Run
    from spdtool.run.records import BenchResult, Plan, Result, StagePlan

PLAN_COLUMNS = ("stage", "state", "epochs", "steps", "learning rate", "why")
MIB = 2**20


@command
def compress(options: RecipeOptions, run: RunPath = None, dry_run: DryRun = False, processes: Processes = 1) -> object:
    """Run every stage that is not finished yet: teacher, prune, distill, finetune, export, bench."""
    from spdtool import stages
    from spdtool.run.folder import Run, default_path
    from spdtool.stages.plan import make_plan

    recipe = options.build()
    path = run or default_path(recipe)
    if dry_run:
        plan = make_plan(Run.at(path, recipe, dry=True))
        show_recipe(recipe)
        show_plan(plan, recipe)
        return plan.model_dump(mode="json", exclude={"recipe"}) | {"recipe": recipe.model_dump(mode="json")}

    def start(plan: Plan) -> None:
        show_plan(plan, recipe)
        launch_ranks(processes, recipe, path)  # for the training stages; this process does the others

    result = stages.compress(recipe=recipe, run=path, on_plan=start)
    if not result.finished:  # a rank that only trains
        return None
    shown = show_bench(Run.open(path))
    # Last, so that it is not scrolled away; exit code 3, though all other files are there.
    if result.refusal is not None:
        console.print_result(shown)
        raise result.refusal
    return shown


@command
def teacher(options: RecipeOptions, run: RunPath = None, again: Again = False, processes: Processes = 1) -> object:
    """Start a run: fine-tune the dense model on the task, or measure a given one."""
    from spdtool.run.folder import Run, default_path
    from spdtool.stages.plan import make_plan

    recipe = options.build()
    path = run or default_path(recipe)
    redo = "teacher" if again else None
    # Only looked at: nothing is written before the plan is accepted.
    planned = Run.at(path, recipe, redo=redo, dry=True)
    if (again or not planned.done("teacher")) and not ranks.has_launcher():
        show_plan(make_plan(planned, redo), recipe)
    return run_one("teacher", path, recipe, again, processes)


@command
def prune(run: ExistingRun, again: Again = False, sets: Sets = None, processes: Processes = 1) -> object:
    """Phase 1 of 3: prune the student to the target sparsity while it is trained."""
    return run_phase("prune", run, again, sets, processes)


@command
def distill(run: ExistingRun, again: Again = False, sets: Sets = None, processes: Processes = 1) -> object:
    """Phase 2 of 3: train the sparse student further; with grafting, among teacher layers."""
    return run_phase("distill", run, again, sets, processes)


@command
def finetune(run: ExistingRun, again: Again = False, sets: Sets = None, processes: Processes = 1) -> object:
    """Phase 3 of 3: fine-tune the sparse student."""
    return run_phase("finetune", run, again, sets, processes)


@command
def bench(run: ExistingRun, again: Again = False, sets: Sets = None) -> object:
    """Time the student against the dense teacher, side by side, and say what the zeros bought."""
    from spdtool.export import runtime
    from spdtool.run.folder import Run

    runtime.require_onnxruntime()  # before the stages' files are hashed
    run_phase("bench", run, again, sets)
    return show_bench(Run.open(run))


def run_phase(stage: str, path: Path, again: bool, sets: list[str] | None, processes: int = 1) -> object:
    """Run a stage of the run at `path` with further `--set` assignments; return its result as JSON values."""
    from spdtool.recipe.reading import override
    from spdtool.run.folder import Run
    from spdtool.stages.plan import check_run

    recipe = override(Run.open(path).recipe, sets or ())
    if again and ranks.is_main():
        planned = Run.at(path, recipe, redo=stage, dry=True)
        # Refuse before anything is dropped.
        if planned.done(stage):
            check_run(planned, stage)
    return run_one(stage, path, recipe, again, processes)


def run_one(stage: str, path: Path, recipe: Recipe, again: bool, processes: int) -> object:
    """Run `stage` unless it is done, in this process or in several; return its result as JSON values.

    Args:
        again: drop the stage and every later one first.
        processes: number of ranks to launch for it.
    """
    from spdtool import stages
    from spdtool.run.folder import Run

    redo = stage if again else None
    done = Run.at(path, recipe, redo=redo, dry=True).done(stage)
    if (again or not done) and launch_ranks(processes, recipe, path, redo):
        return dump_result(Run.open(path).result(stage))
    if again:
        drop_stage(stage, path)
    run = Run.at(path, recipe)
    # The main process drops the stage, perhaps not yet: another rank must not take it for done.
    if run.done(stage) and (ranks.is_main() or not again):
        console.say(f"{stage} is done in {console.escape(run.path)}; --again redoes it")
        return dump_result(run.result(stage))
    return dump_result(stages.run_stage(run, stage))


def dump_result(result: Result) -> object:
    """Return the JSON values of a stage's result."""
    return result.model_dump(mode="json")


def drop_stage(stage: str, path: Path) -> None:
    """Remove a stage and every later one."""
    from spdtool.run.folder import Run

    if (path / "run.json").exists():
        dropped = Run.open(path).discard(stage)
        if dropped:
            console.say(f"dropped {', '.join(dropped)}")


def launch_ranks(processes: int, recipe: Recipe, path: Path, redo: str | None = None) -> bool:
    """Do this command in several processes, if that is asked for and this is none of them.

    Args:
        path: the run folder.
        redo: stage to drop first, with every later one.

    Returns:
        Whether it was done.
    """
    size = ranks.world_size()
    if size > 1:
        if not ranks.has_launcher() and processes not in (1, size):
            console.warn(f"--processes {processes} is ignored: {size} were launched already")
        return False
    if processes == 1:
        return False
    from spdtool.training.launch import launch_with_restarts

    # Dropped here, once: ranks that are started again must not drop what the first have made.
    if redo is not None:
        drop_stage(redo, path)
    # The ranks run the same command.
    words = [word for word in sys.argv[1:] if word != "--again"]
    launch_with_restarts(processes, words, recipe.restarts)
    return True


def show_recipe(recipe: Recipe) -> None:
    """Print every field of a recipe."""
    console.print_table(f"recipe {recipe.name}", ("field", "value"), list(recipe.values().items()))


def show_plan(plan: Plan, recipe: Recipe) -> None:
    """Print what a run will do."""
    if recipe.smoke:
        console.say("[yellow]SMOKE RUN: a random two-layer model and a few steps; its numbers mean nothing[/]")
    rows = ", ".join(f"{count:,} {name}" for name, count in plan.rows.items())
    console.print_table(f"{plan.run}: {rows} rows", PLAN_COLUMNS, [_plan_row(stage) for stage in plan.stages])
    for line in plan.reading:
        console.say(console.escape(line))
    console.say(describe_grafting(recipe))
    for note in plan.notes:
        console.warn(note)
    weights = plan.parameters
    console.say(
        f"{weights.zeros:,} of {weights.prunable:,} weights of the encoder's linear layers become zero "
        f"({weights.all:,} parameters in all); about {plan.memory_bytes / MIB:,.0f} MiB of memory"
    )
    if weights.emptied:
        console.warn(f"{recipe.sparsity:g} leaves no weight at all in {weights.emptied} matrices of this model")


def describe_grafting(recipe: Recipe) -> str:
    """Say in which phases teacher layers stand in for the student's."""
    if not recipe.grafted_phases:
        return "grafting: off in this recipe"
    return f"grafting: on in {' and '.join(recipe.grafted_phases)}"


def _plan_row(stage: StagePlan) -> tuple[object, ...]:
    state = "done" if stage.done else "to do"
    rate = None if stage.learning_rate is None else f"{stage.learning_rate:.3g}"
    return console.phase_title(stage.stage), state, stage.epochs, stage.steps, rate, stage.why


def show_bench(run: Run) -> object:
    """Print the final table of a run and its verdict; return them as JSON values."""
    result: BenchResult = run.bench_result()
    console.print_table(run.recipe.mark_smoke(str(run.path)), result.columns, result.rows)
    for table in result.tables:
        console.print_table(table.title, table.columns, table.rows)
    console.say("")
    for line in result.verdict:
        console.say(console.escape(line))
    return result.model_dump(mode="json")
