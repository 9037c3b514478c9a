"""The command line: one short function per command. Each imports its stage inside, so that `--help` answers at once."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect as inspect_module
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spdtool import console, plugins, recipe
from spdtool.errors import DeviceError, RecipeError, RunError, SpdError
from spdtool.recipe import STAGES, Recipe
from spdtool.run import Run, default_path

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make a fine-tuned encoder sparse, keep its score, export it to ONNX and measure what came out.",
    epilog="Start with: spdtool compress --task demo --sparsity 0.9",
)

TaskName = Annotated[str | None, typer.Option("--task", help="Task; `spdtool tasks` lists them.")]
Data = Annotated[str | None, typer.Option(help="File or folder to read instead of the hub.")]
TextColumns = Annotated[str | None, typer.Option("--text", help="Text columns of --data, one or two: a,b.")]
Label = Annotated[str | None, typer.Option(help="Label column of --data.")]
Model = Annotated[str | None, typer.Option(help="Encoder to fine-tune: folder or hub name.")]
Given = Annotated[str | None, typer.Option("--teacher", help="Fine-tuned model to use as it is.")]
Sparsity = Annotated[float | None, typer.Option(help="Share of the encoder's weights to set to zero.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Recipe name or TOML file; `spdtool recipes` lists them.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is random.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda (which refuses to fall back).")]
Folder = Annotated[Path | None, typer.Option("--run", help="Run folder.", show_default="runs/<task>-<sparsity>")]
RunFolder = Annotated[Path, typer.Option("--run", help="Run folder.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any recipe field: --set prune.epochs=3.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few steps on a random two-layer model; no result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
Again = Annotated[bool, typer.Option("--again", help="Redo the stage, dropping it and every later one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, everything else on standard error.")]
PluginsDir = Annotated[
    Path | None, typer.Option(help="Also load the *.py files of this folder.", envvar="SPDTOOL_PLUGINS")
]


def main() -> None:
    """Entry point of the `spdtool` script."""
    app(prog_name="spdtool")


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function` as a command of its name: its value becomes JSON, errors of the user's lose their traceback.

    Every command also gets --plugins-dir and --json; one that takes `chosen` gets the options that make a recipe.
    """
    own = inspect_module.signature(function, eval_str=True)
    making = inspect_module.signature(make_recipe, eval_str=True).parameters

    @functools.wraps(function)
    def run(plugins_dir: Path | None, as_json: bool, **options: Any) -> None:
        console.setup(as_json=as_json)
        try:
            plugins.use_folder(plugins_dir)
            if "chosen" in own.parameters:
                options["chosen"] = make_recipe(**{name: options.pop(name) for name in making})
            console.result(function(**options))
        except SpdError as error:
            console.fail(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.warn("stopped; the same command goes on from the last snapshot")
            raise typer.Exit(130) from None
        except Exception as error:
            known = _machine_error(error)
            if known is None:
                raise
            console.fail(known)
            raise typer.Exit(known.exit_code) from None

    shared = inspect_module.signature(_shared_options, eval_str=True).parameters
    parameters = {name: value for name, value in own.parameters.items() if name != "chosen"}
    if "chosen" in own.parameters:
        parameters = dict(making) | parameters
    every = [value.replace(kind=value.KEYWORD_ONLY) for value in (parameters | dict(shared)).values()]
    run.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    return app.command(function.__name__.rstrip("_"))(run)


def _shared_options(plugins_dir: PluginsDir = None, as_json: Json = False) -> None:
    """The options that every command has."""


def make_recipe(
    task: TaskName = None,
    data: Data = None,
    text: TextColumns = None,
    label: Label = None,
    model: Model = None,
    teacher: Given = None,
    sparsity: Sparsity = None,
    name: RecipeName = "default",
    seed: Seed = None,
    device: Device = None,
    sets: Sets = None,
    smoke: Smoke = False,
) -> Recipe:
    """The recipe that the options ask for.

    Raises:
        RecipeError: neither a task nor data was given, or a setting is wrong.
    """
    if task is None and data is None:
        raise RecipeError(
            "neither --task nor --data was given", "for example --task demo; `spdtool tasks` lists the tasks"
        )
    flags = {
        "task": task.lower() if task else "local",
        "data": data,
        "text": tuple(column.strip() for column in text.split(",")) if text else None,
        "label": label,
        "model": model,
        "given_teacher": teacher,
        "sparsity": sparsity,
        "seed": seed,
        "device": device,
        "smoke": smoke or None,
    }
    return recipe.resolve(name, flags, sets or ())


@command
def compress(chosen: Recipe, run: Folder = None, dry_run: DryRun = False) -> Any:
    """Run every stage that is not finished yet: teacher, prune, distill, finetune, export, bench."""
    target = Run.at(run or default_path(chosen), chosen)
    planned = _show_plan(target, whole=dry_run)
    if dry_run:
        return planned | {"recipe": chosen.model_dump(mode="json")}
    _require_runtime()
    for stage in STAGES:
        if target.done(stage):
            console.say(f"[dim]{stage}: done, skipped[/]")
        else:
            console.say(f"[bold]{stage}[/]")
            _stage(stage)(target)
    return _show_result(target)


@command
def teacher(chosen: Recipe, run: Folder = None, again: Again = False) -> Any:
    """Start a run: fine-tune the dense model on the task, or measure a given one."""
    path = run or default_path(chosen)
    if again and (path / "run.json").exists():
        Run.open(path).discard("teacher")
    return _finished("teacher", Run.at(path, chosen))


@command
def prune(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Phase 1: prune the student to the target sparsity while it is grafted and distilled."""
    return _run_stage("prune", run, again, sets)


@command
def distill(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Phase 2: graft the student onto the teacher with a rising replacing rate."""
    return _run_stage("distill", run, again, sets)


@command
def finetune(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Phase 3: train the sparse student alone."""
    return _run_stage("finetune", run, again, sets)


@command
def export(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Write teacher and student as ONNX, each checked against its checkpoint."""
    _require_runtime()
    return _run_stage("export", run, again, sets)


@command
def bench(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Time the student against the dense teacher, side by side, and say what the zeros bought."""
    _require_runtime()
    _run_stage("bench", run, again, sets)
    return _show_result(Run.open(run))


@command
def inspect(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> Any:
    """Show a run: its stages, what each was made from, and the sparsity of every layer."""
    from spdtool.inspection import inspect_run

    shown = inspect_run(Run.open(run))
    console.table(
        f"{'SMOKE RUN, NO RESULT: ' if shown['smoke'] else ''}{shown['run']}",
        ("stage", "state", "made from", "seconds", "steps", "dev score", "sparsity"),
        [tuple(row.values()) for row in shown["stages"]],
    )
    if shown["layers"]:
        console.table(f"zeros after {shown['sparsest']}", ("weight", "zeros", "size", "sparsity"), shown["layers"])
    return shown


@command
def doctor() -> Any:
    """Say what is installed, and which device and provider really work."""
    from spdtool.doctor import examine

    checks = [asdict(check) for check in examine()]
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        console.say(f"[{colour[check['status']]}]{check['status']:>4}[/]  [bold]{check['name']}[/]  {check['found']}")
        if check["advice"]:
            console.say(f"      [dim]{check['advice']}[/]")
    if any(check["status"] == "fail" for check in checks):
        console.result(checks)
        raise typer.Exit(2)
    return checks


@command
def tasks() -> Any:
    """List the tasks."""
    rows = [(part.name, part.value.about, ", ".join(part.value.metrics), part.source) for part in plugins.tasks.parts()]
    console.table("tasks", ("name", "what it is", "metrics", "from"), rows)
    console.say("[dim]or any csv, tsv, jsonl or parquet file: --data FILE --text a,b --label c[/]")
    return [dict(zip(("name", "about", "metrics", "source"), row, strict=True)) for row in rows]


@command
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to show: every field, its value and what it means.")
    ] = None,
) -> Any:
    """List the recipes, or show one with the meaning of every field that --set reaches."""
    if name is None:
        rows = [(known, recipe.about(known)) for known in recipe.names()]
        console.table("recipes", ("name", "what it is"), rows)
        return dict(rows)
    chosen = recipe.resolve(name)
    values = dict(recipe.flat(chosen.model_dump(mode="json")))
    console.table(
        f"recipe {name}", ("field", "value", "what it is"), [(f, values[f], text) for f, text in recipe.fields()]
    )
    return values


@command
def plugins_() -> Any:
    """List every part that can be named in a recipe, where it came from, and the plugins that did not load."""
    rows = [
        (registry.kind, part.name, part.source, part.summary)
        for registry in plugins.REGISTRIES
        for part in registry.parts()
    ]
    console.table("parts", ("kind", "name", "from", "what it is"), rows)
    found = [(plugin.name, plugin.where, plugin.error or "loaded") for plugin in plugins.loaded()]
    if found:
        console.table("plugins", ("name", "where", "state"), found)
    return {
        "parts": [dict(zip(("kind", "name", "source", "about"), row, strict=True)) for row in rows],
        "plugins": [dict(zip(("name", "where", "state"), row, strict=True)) for row in found],
    }


def _run_stage(stage: str, path: Path, again: bool, sets: list[str] | None) -> Any:
    run = Run.open(path)
    if again:
        gone = run.discard(stage)
        if gone:
            console.say(f"dropped {', '.join(gone)}")
    return _finished(stage, Run.at(path, recipe.amend(run.recipe, sets or ())))


def _finished(stage: str, run: Run) -> Any:
    if run.done(stage):
        console.say(f"{stage} is done in {run.path}; --again redoes it")
        return run.record(stage)["metrics"]
    if stage == "teacher":
        _show_plan(run)
    metrics = _stage(stage)(run)
    console.say(f"{stage}: done in {run.path / stage}" + _headline(metrics))
    return metrics


def _stage(stage: str) -> Callable[[Run], dict[str, Any]]:
    function: Callable[[Run], dict[str, Any]] = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)
    return function


def _headline(metrics: dict[str, Any]) -> str:
    parts = [f"dev {console.scores(metrics['dev'])}"] if isinstance(metrics.get("dev"), dict) else []
    if "sparsity" in metrics:
        parts.append(f"sparsity {metrics['sparsity']:.4f}")
    return f"  ({'; '.join(parts)})" if parts else ""


def _show_plan(run: Run, *, whole: bool = False) -> dict[str, Any]:
    from spdtool.planning import plan

    planned = plan(run)
    if run.recipe.smoke:
        console.say("[yellow]SMOKE RUN: a random two-layer model and a few steps; its numbers mean nothing[/]")
    if whole:
        values = recipe.flat(run.recipe.model_dump(mode="json"))
        console.table(f"recipe {run.recipe.name}", ("field", "value"), list(values))
    rows = ", ".join(f"{count:,} {name}" for name, count in planned["rows"].items())
    console.table(
        f"{run.path}: {rows} rows",
        ("stage", "state", "epochs", "steps", "why"),
        [(s["stage"], "done" if s["done"] else "to do", s["epochs"], s["steps"], s["why"]) for s in planned["stages"]],
    )
    size = planned["parameters"]
    console.say(
        f"{size['zeros']:,} of {size['prunable']:,} weights of the encoder's linear layers become zero "
        f"({size['all']:,} parameters in all); about {planned['memory_bytes'] / 2**20:,.0f} MiB of memory"
    )
    return planned


def _show_result(run: Run) -> dict[str, Any]:
    from spdtool.inspection import result_of

    shown = result_of(run)
    title = f"{'SMOKE RUN, NO RESULT: ' if run.recipe.smoke else ''}{run.path}"
    console.table(title, shown["columns"], shown["rows"])
    for line in shown["verdict"]:
        console.say(line)
    return shown


def _require_runtime() -> None:
    """Fail before hours are spent, not after."""
    from spdtool.export import runtime

    runtime.require()


def _machine_error(error: Exception) -> SpdError | None:
    """What the machine ran out of, if that is what happened."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        return RunError(
            f"the disk is full: {error}", "free some space; the same command goes on from the last snapshot"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return DeviceError(f"out of device memory: {error}", "cut batches into pieces: --set prune.accumulate=2")
    if isinstance(error, PermissionError):
        return RunError(f"not allowed: {error}", "check the permissions of the run folder")
    return None
