"""The commands of the stages: compress runs all that are missing, the others run one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdtool import console, ranks
from spdtool.cli.options import (
    Again,
    DryRun,
    Everything,
    ExistingRun,
    Processes,
    RecipeOptions,
    RunPath,
    Sets,
    command,
)
from spdtool.cli.plan import show_plan
from spdtool.errors import GateError, RecipeError

if TYPE_CHECKING:
    from spdtool.recipe.fields import Recipe
    from spdtool.run.folder import Run
    from spdtool.run.records import BenchResult, Plan, Result


@command
def compress(
    options: RecipeOptions,
    run: RunPath = None,
    dry_run: DryRun = False,
    everything: Everything = False,
    processes: Processes = 1,
) -> object:
    """Run every stage that is not finished yet: teacher, prune, distill, finetune, export, bench.

    With --run alone it goes on with the recipe that the run has recorded.
    """
    from spdtool.run.folder import default_path
    from spdtool.stages.api import recorded_recipe

    recipe = options.build(recorded_recipe(run))
    return run_all(recipe, run or default_path(recipe), dry_run, everything, processes)


@command
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    sets: Sets = None,
    dry_run: DryRun = False,
    everything: Everything = False,
    processes: Processes = 1,
) -> object:
    """Go on with a run that was stopped, at whatever stage is next, with the recipe that it has recorded."""
    from spdtool.recipe.reading import override
    from spdtool.run.folder import Run

    return run_all(override(Run.open(run).recipe, sets or ()), run, dry_run, everything, processes)


def run_all(recipe: Recipe, path: Path, dry_run: bool, everything: bool, processes: int) -> object:
    """Run, or only plan, every stage that is missing at `path`; return the bench, or the plan, as JSON values."""
    from spdtool.data.local import check_header
    from spdtool.run.folder import Run
    from spdtool.stages.api import adopt_choice, compress, plan_run

    if recipe.goal.searches and processes > 1:
        raise RecipeError(
            "--max-drop without --speedup trains several students, and --processes is of one",
            "leave --processes out, or name the --speedup",
        )
    check_header(recipe)  # before torch is imported
    from spdtool.stages.estimate import plan_for_processes

    if dry_run:
        plan = plan_run(adopt_choice(recipe, path), path, measure=False)
        plan = plan_for_processes(plan, processes, sharded=recipe.shard)
        show_plan(plan, recipe, everything=everything)
        if not everything:
            console.say("[dim]--all shows every field of the recipe, and the reasons[/]")
        return plan.model_dump(mode="json", exclude={"recipe"}) | {"recipe": recipe.model_dump(mode="json")}

    def start(plan: Plan) -> None:
        show_plan(plan_for_processes(plan, processes, sharded=recipe.shard), recipe, everything=everything)
        launch_training(processes, recipe, path)  # for the training stages; this process does the others

    result = compress(recipe=recipe, run=path, on_plan=start)
    if not result.finished:  # a rank that only trains
        return None
    shown = show_bench(Run.open(result.run))
    # Last, so that it is not scrolled away; exit code 3, though all other files are there.
    if result.refusal is not None:
        console.print_result(shown)
        raise result.refusal
    return shown


@command
def teacher(options: RecipeOptions, run: RunPath = None, again: Again = False, processes: Processes = 1) -> object:
    """Start a run: fine-tune the dense model on the task, or measure a given one."""
    from spdtool.data.local import check_header
    from spdtool.run.folder import Run, default_path
    from spdtool.stages.api import plan_run, recorded_recipe

    recipe = options.build(recorded_recipe(run))
    check_header(recipe)  # before torch is imported
    from spdtool.stages.estimate import plan_for_processes

    path = run or default_path(recipe)
    redo = "teacher" if again else None
    # Only looked at: nothing is written before the plan is accepted.
    planned = Run.for_recipe(path, recipe, redo=redo, dry=True)
    if (again or not planned.done("teacher")) and not ranks.has_launcher():
        show_plan(plan_for_processes(plan_run(recipe, path, redo), processes, sharded=recipe.shard), recipe)
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
def bench(
    run: RunPath = None,
    again: Again = False,
    sets: Sets = None,
    profile: Annotated[
        Path | None, typer.Option(help="Only time a layer at every shape, and write the table to this file.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Encoder of --profile: folder or hub name.")] = None,
    on: Annotated[
        str | None,
        typer.Option(help="Runtime of --profile: onnxruntime, openvino or web.", show_default="onnxruntime"),
    ] = None,
) -> object:
    """Time the student against the dense teacher, side by side, and say what the zeros bought."""
    from spdtool.export import onnx_session
    from spdtool.run.folder import Run

    onnx_session.require_onnxruntime()  # before the stages' files are hashed
    if profile is not None:
        return profile_layers(profile, run, model, on, sets)
    if run is None or model is not None or on is not None:
        raise RecipeError(
            "a bench needs the folder of a run" if run is None else "--model and --on are of --profile only",
            "spdtool bench --run FOLDER, or spdtool bench --profile FILE --model FOLDER",
        )
    if not ranks.works_on("bench"):
        return None
    try:
        run_phase("bench", run, again, sets)
    except GateError as error:
        console.print_result(show_bench(Run.open(run)))
        raise error from None
    return show_bench(Run.open(run))


def profile_layers(file: Path, run: Path | None, model: str | None, on: str | None, sets: list[str] | None) -> object:
    """Time a layer of an encoder at every shape and write the table to `file`; return it as JSON values."""
    from spdtool.recipe.reading import build_recipe, override
    from spdtool.run.folder import Run

    if (run is None) == (model is None):
        raise RecipeError(
            "a profile is of one encoder", "give --model FOLDER, or --run with a run whose teacher is there"
        )
    flags = {"goal.runtime": on}
    if run is not None:
        recipe, source = override(Run.open(run).recipe, sets or (), flags), str(Run.open(run).use_input("teacher"))
    else:
        recipe, source = build_recipe("default", flags, sets or ()), str(model)
    from spdtool.goals.shape import write_profile

    profile = write_profile(recipe, source, file)
    console.print_table(f"{file}: milliseconds of a layer", *profile.table())
    return profile.model_dump(mode="json")


def run_phase(stage: str, path: Path, again: bool, sets: list[str] | None, processes: int = 1) -> object:
    """Run a stage of the run at `path` with further `--set` assignments; return its result as JSON values."""
    from spdtool.recipe.reading import override
    from spdtool.run.folder import Run
    from spdtool.stages.plan import check_run

    recipe = override(Run.open(path).recipe, sets or ())
    if again and ranks.is_main():
        planned = Run.for_recipe(path, recipe, redo=stage, dry=True)
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
    from spdtool.run.folder import Run
    from spdtool.stages.run_stages import run_stage

    redo = stage if again else None
    done = Run.for_recipe(path, recipe, redo=redo, dry=True).done(stage)
    if (again or not done) and launch_training(processes, recipe, path, redo):
        return dump_result(Run.open(path).result(stage))
    if again:
        drop_stage(stage, path)
    if not ranks.works_on(stage):  # under torchrun: one process exports and times
        return None
    run = Run.for_recipe(path, recipe)
    # The main process drops the stage, perhaps not yet: another rank must not take it for done.
    if run.done(stage) and (ranks.is_main() or not again):
        redo_command = f"spdtool {stage} --run {shlex.quote(str(run.path))} --again"
        console.say(f"{stage} is done in {console.escape(run.path)}; to redo it: {console.escape(redo_command)}")
        return dump_result(run.result(stage))
    return dump_result(run_stage(run, stage))


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


def launch_training(processes: int, recipe: Recipe, path: Path, redo: str | None = None) -> bool:
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


def show_bench(run: Run) -> object:
    """Print the final table of a run and its verdict; return them as JSON values."""
    result: BenchResult = run.bench_result()
    console.print_table(run.recipe.mark_smoke(str(run.path)), result.columns, result.rows)
    for table in result.tables:
        console.print_table(table.title, table.columns, table.rows)
    console.say("")
    for line in result.verdict:
        console.say(console.escape(line))
    quality = run.export_result().quality
    for name, text in quality.lines():
        console.say(console.escape(f"{name}: {text}"))
    final = None if quality.final is None else quality.final.model_dump(mode="json")
    return result.model_dump(mode="json") | {"test": final}
