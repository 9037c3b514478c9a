"""The command line: one short function per command. Each imports its stage inside, so that `--help` answers at once."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spdtool import console, plugins
from spdtool import ranks as processes
from spdtool.cli import serve as _serving  # noqa: F401  # registers its commands
from spdtool.cli.options import (
    OF_NO_RUN,
    Again,
    DryRun,
    Folder,
    Model,
    Processes,
    RunFolder,
    Sets,
    app,
    command,
    make_recipe,
)
from spdtool.errors import GateError, RecipeError
from spdtool.recipe import STAGES
from spdtool.recipe import reading as recipe
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run, default_path


def main() -> None:
    """Entry point of the `spdtool` script."""
    try:
        app(prog_name="spdtool")
    except SystemExit as ended:
        if processes.world_size() == 1 or not isinstance(ended.code, int):
            raise
        processes.exit_rank(ended.code)


@command
def compress(chosen: Recipe, run: Folder = None, dry_run: DryRun = False, several: Processes = 1) -> Any:
    """Run every stage that is not finished yet: teacher, prune, distill, finetune, export, bench."""
    path = run or default_path(chosen)
    planned = _show_plan(Run.at(path, chosen, dry=True), whole=dry_run)
    if dry_run:
        return planned.model_dump(mode="json") | {"recipe": chosen.model_dump(mode="json")}
    _require_runtime()
    _launched(several, chosen)  # for the training stages; the rest is ours
    target = Run.at(path, chosen)
    refused: GateError | None = None
    for stage in STAGES:
        if not processes.works_on(stage):
            return None
        if target.done(stage):
            console.say(f"[dim]{stage}: done, skipped[/]")
            continue
        try:
            _make(stage, target)
        except GateError as error:
            if not target.done(stage):
                raise
            refused = error  # of a variant that nothing later needs: it is told again at the end
    result = _show_result(target)
    if refused is not None:
        raise refused
    return result


@command
def teacher(chosen: Recipe, run: Folder = None, again: Again = False, several: Processes = 1) -> Any:
    """Start a run: fine-tune the dense model on the task, or measure a given one."""
    path = run or default_path(chosen)
    target = Run.at(path, chosen, redo="teacher" if again else None, dry=True)
    if target.done("teacher") and not again:
        return _already("teacher", target)
    _show_plan(target, redo="teacher" if again else None)
    if _launched(several, chosen, again=("teacher", path) if again else None):
        return Run.open(path).training_result("teacher").model_dump(mode="json")
    return _finished("teacher", path, chosen, again)


@command
def prune(run: RunFolder, again: Again = False, sets: Sets = None, several: Processes = 1) -> Any:
    """Phase 1: prune the student to the target sparsity while it is grafted and distilled."""
    return _run_stage("prune", run, again, sets, several)


@command
def distill(run: RunFolder, again: Again = False, sets: Sets = None, several: Processes = 1) -> Any:
    """Phase 2: graft the student onto the teacher with a rising replacing rate."""
    return _run_stage("distill", run, again, sets, several)


@command
def finetune(run: RunFolder, again: Again = False, sets: Sets = None, several: Processes = 1) -> Any:
    """Phase 3: train the sparse student alone."""
    return _run_stage("finetune", run, again, sets, several)


@command
def export(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; or give --from.")] = None,
    again: Again = False,
    layout: Annotated[
        str | None, typer.Option(help="Write the bundle of --run to --to for a server or a hub: triton or hub.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--from", help="Any fine-tuned classifier, whoever pruned it.", **OF_NO_RUN)
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Export target; `spdtool plugins` lists them.", show_default="onnx", **OF_NO_RUN)
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="./<checkpoint's name>-<target>", **OF_NO_RUN)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Compare on the dev set of this task too.", **OF_NO_RUN)] = None,
    data: Annotated[str | None, typer.Option(help="Read its rows from this file or folder.", **OF_NO_RUN)] = None,
    text: Annotated[str | None, typer.Option(help="Text columns of --data, one or two: a,b.", **OF_NO_RUN)] = None,
    label: Annotated[str | None, typer.Option(help="Label column of --data.", **OF_NO_RUN)] = None,
    sets: Sets = None,
) -> Any:
    """Write teacher and student of a run (or any checkpoint) for a runtime, each checked against its checkpoint."""
    foreign = {"--target": target, "--to": to, "--task": task, "--data": data, "--text": text, "--label": label}
    given = [name for name, value in foreign.items() if value is not None]
    _refuse_mixture(run, checkpoint, again, [name for name in given if layout is None or name != "--to"])
    if layout is not None:
        return _write_layout(run, layout, to, again, sets)
    _require_runtime()
    if run is not None:
        return _run_stage("export", run, again, sets)
    assert checkpoint is not None
    with_task = task is not None or data is not None
    if not with_task and (text or label):
        raise RecipeError("--text and --label name columns of --data, which was not given", "add --data FILE")
    chosen = make_recipe(task=task or (None if data else "demo"), data=data, text=text, label=label, sets=sets)
    name = target or chosen.export.targets[0]
    from spdtool.stages.export import export_checkpoint

    folder = to or Path(f"{checkpoint.resolve().name}-{name}")
    exported = export_checkpoint(checkpoint, name, folder, chosen, with_task=with_task)
    return {"folder": str(folder), "target": name} | exported.model_dump(mode="json", exclude_none=True)


def _write_layout(run: Path | None, layout: str, to: Path | None, again: bool, sets: list[str] | None) -> Any:
    """Write the bundle of a finished export in the layout of a server or a hub."""
    if run is None or to is None or again:
        raise RecipeError(
            "--layout writes the bundle of a finished export", "spdtool export --layout triton --run RUN --to FOLDER"
        )
    from spdtool.export.bundle.layouts import write_layout

    opened = Run.open(run)
    written = write_layout(Run(opened.path, recipe.override(opened.recipe, sets or ())), layout, to)
    console.say(f"{console.escape(to)}: {len(written['files'])} files in the layout {layout}")
    return written


def _refuse_mixture(run: Path | None, checkpoint: Path | None, again: bool, foreign: list[str]) -> None:
    """Raise RecipeError unless exactly one of --run and --from is given, and nothing that belongs to the other."""
    either = "--run FOLDER exports a run; --from CHECKPOINT exports any other model"
    if run is not None and checkpoint is not None:
        raise RecipeError("--run and --from exclude each other", either)
    if run is None and checkpoint is None:
        raise RecipeError("neither --run nor --from was given", either)
    if run is not None and foreign:
        raise RecipeError(f"{', '.join(foreign)} belongs to --from", "a run has its own: use --set, or leave it out")
    if checkpoint is not None and again:
        raise RecipeError("--again belongs to --run", "give another folder: --to FOLDER")


@command
def unpack(
    folder: Annotated[Path, typer.Argument(help="Exported folder, such as RUN/export/student.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or new.")],
) -> Any:
    """Turn an exported folder back into a plain Hugging Face checkpoint."""
    from spdtool.export.bundle.unpack import unpack_checkpoint

    read = unpack_checkpoint(folder, out)
    console.say(f"{console.escape(read)} is unpacked to {console.escape(out)}")
    return {"folder": str(read), "checkpoint": str(out)}


@command
def bench(run: RunFolder, again: Again = False, sets: Sets = None) -> Any:
    """Time the student against the dense teacher, side by side, and say what the zeros bought."""
    _require_runtime()
    _run_stage("bench", run, again, sets)
    return _show_result(Run.open(run))


@command
def inspect(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> Any:
    """Show a run: its stages, what each was made from, and the sparsity of every layer."""
    from spdtool.cli.inspect import inspect_run

    opened = Run.open(run)
    shown = inspect_run(opened)
    console.print_table(
        opened.recipe.mark_smoke(shown["run"]),
        ("stage", "state", "made from", "seconds", "steps", "dev", "sparsity"),
        [
            tuple((row | {"made_from": (row["made_from"] or "").replace(", ", "\n")}).values())
            for row in shown["stages"]
        ],
    )
    if shown["layers"]:
        console.print_table(
            f"zeros after {shown['sparsest']}", ("weight", "zeros", "size", "sparsity"), shown["layers"]
        )
    return shown


@command
def sweep(
    tasks: Annotated[str, typer.Option(help="Tasks: cola,sst2.")],
    recipes: Annotated[str, typer.Option(help="Recipe names or TOML files: default,reference.")] = "default",
    sparsities: Annotated[str, typer.Option(help="Shares of zeros: 0.8,0.9.")] = "0.9",
    seeds: Annotated[str, typer.Option(help="Seeds; each has a teacher of its own: 0,1,2.")] = "0,1,2",
    data: Annotated[
        str | None, typer.Option(help="Folder with a folder for each task, or task=folder,...", show_default="the hub")
    ] = None,
    model: Model = None,
    epochs: Annotated[
        float | None, typer.Option(help="Sum of the student's epochs that every recipe is scaled to.")
    ] = None,
    sets: Sets = None,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same command goes on with it.")] = Path(
        "runs/sweep"
    ),
    bench: Annotated[bool, typer.Option("--bench", help="Also export and time every student.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Run trials at once on Ray: `local`, or the address of a cluster.")
    ] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-trial", min=0, help="Processors of a trial on Ray.")] = 1,
    gpus: Annotated[
        float, typer.Option("--gpus-per-trial", min=0, help="GPUs of a trial on Ray; 0.5: two share one.")
    ] = 0,
    behind: Annotated[
        float | None,
        typer.Option(
            "--stop-behind", min=0, help="On Ray: stop a trial this many points behind the median of its task."
        ),
    ] = None,
) -> Any:
    """Compare recipes x sparsities x seeds x tasks, all with the same teachers; tables and Pareto plots."""
    from spdtool import sweep as trials
    from spdtool.report.figures import save_pareto_figures
    from spdtool.sweep import summary

    if bench:
        _require_runtime()
    runner = _trial_runner(ray, cpus, gpus, behind)
    planned = trials.plan_trials(
        recipes=_words("--recipes", recipes),
        sparsities=_numbers("--sparsities", sparsities, float),
        seeds=_numbers("--seeds", seeds, int),
        tasks=_words("--tasks", tasks),
        out=out,
        data=data,
        model=model,
        sets=sets or (),
        epochs=epochs,
        bench=bench,
    )
    rows = trials.run_sweep(planned, out, lambda line: console.say(console.escape(line)), runner)
    save_pareto_figures(rows, out)
    summaries = summary.summarise(rows)
    if summaries:
        title = f"SMOKE SWEEP, NO RESULT: {out}" if any(row.smoke for row in rows) else str(out)
        console.print_table(title, *summary.table(summaries))
        console.print_table("average over tasks", *summary.averages_table(summaries))
    for failure in summary.failures(rows):
        console.warn(failure)
    if any(row.status == "failed" for row in rows):
        console.print_result([row.model_dump(mode="json") for row in rows])
        raise typer.Exit(3)
    return [row.model_dump(mode="json") for row in rows]


def _trial_runner(ray: str | None, cpus: float, gpus: float, behind: float | None) -> Any:
    """Return what runs the trials of a sweep: this process, one after the other, or Ray."""
    from spdtool.sweep import run_in_turn

    if ray is None:
        if behind is not None:
            raise RecipeError("--stop-behind compares trials that run at once", "add --ray local")
        return run_in_turn
    from spdtool.sweep.on_ray import Cluster

    return Cluster(None if ray == "local" else ray, cpus, gpus, behind)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError(f"{option} is empty", f"{option} a,b")
    return words


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(word) for word in _words(option, text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise RecipeError(f"{option} {text!r} is no list of {what}", "separate them by commas") from None


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of a sweep.")],
    to: Annotated[Path | None, typer.Option(help="Page to write.", show_default="RUN/report/report.html")] = None,
) -> Any:
    """Write one HTML page of a run, of several, or of a sweep, with its figures as PNG files beside it."""
    from spdtool.report.page import write_page

    written = write_page(runs, to)
    console.say(f"{console.escape(written.file)} and {len(written.images)} figures")
    return {"page": str(written.file), "images": [str(image) for image in written.images]}


@command
def doctor() -> Any:
    """Say what is installed, and which device and provider really work."""
    from spdtool.cli.doctor import examine

    checks = [asdict(check) for check in examine()]
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        head = f"[{colour[check['status']]}]{check['status']:>4}[/]  [bold]{check['name']}[/]"
        console.say(f"{head}  {console.escape(check['found'])}")
        if check["advice"]:
            console.say(f"      [dim]{console.escape(check['advice'])}[/]")
    if any(check["status"] == "fail" for check in checks):
        console.print_result(checks)
        raise typer.Exit(2)
    return checks


@command
def tasks() -> Any:
    """List the tasks."""
    rows = [
        (part.name, part.value.about, ", ".join(part.value.metrics), part.source) for part in plugins.datasets.entries()
    ]
    console.print_table("tasks", ("name", "what it is", "metrics", "from"), rows)
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
        rows = [(known, recipe.describe_recipe(known)) for known in recipe.recipe_names()]
        console.print_table("recipes", ("name", "what it is"), rows)
        return dict(rows)
    chosen = recipe.build_recipe(name)
    values = chosen.values()
    console.print_table(
        f"recipe {name}", ("field", "value", "what it is"), [(f, values[f], text) for f, text in recipe.list_fields()]
    )
    return values


@command
def plugins_() -> Any:
    """List every part that can be named in a recipe, where it came from, and the plugins that did not load."""
    rows = [
        (registry.kind, part.name, part.source, part.summary)
        for registry in plugins.REGISTRIES
        for part in registry.entries()
    ]
    console.print_table("parts", ("kind", "name", "from", "what it is"), rows)
    found = [(plugin.name, plugin.where, plugin.error or "loaded") for plugin in plugins.loaded_plugins()]
    if found:
        console.print_table("plugins", ("name", "where", "state"), found)
    return {
        "parts": [dict(zip(("kind", "name", "source", "about"), row, strict=True)) for row in rows],
        "plugins": [dict(zip(("name", "where", "state"), row, strict=True)) for row in found],
    }


def _run_stage(stage: str, path: Path, again: bool, sets: list[str] | None, several: int = 1) -> Any:
    chosen = recipe.override(Run.open(path).recipe, sets or ())
    target = Run.at(path, chosen, redo=stage if again else None, dry=True)
    if again and processes.is_main() and target.done(stage):
        from spdtool.stages.plan import check_run

        check_run(target, stage)  # before anything is dropped
    if (again or not target.done(stage)) and _launched(several, chosen, again=(stage, path) if again else None):
        return Run.open(path).result(stage).model_dump(mode="json")
    return _finished(stage, path, chosen, again)


def _launched(count: int, chosen: Recipe, again: tuple[str, Path] | None = None) -> bool:
    """Do this command in `count` processes, if that is asked for and we are none of them; return whether we did.

    Args:
        again: the stage to drop first, with every later one, and its run folder.
    """
    if processes.world_size() > 1 and not processes.has_launcher() and count not in (1, processes.world_size()):
        console.warn(f"--processes {count} is ignored: {processes.world_size()} were launched already")
    if count == 1 or processes.world_size() > 1:
        return False
    from spdtool.training.launch import launch_with_restarts

    if again is not None:  # by us: ranks that are started again must not drop what the first have made
        _drop(*again)
    launch_with_restarts(count, [word for word in sys.argv[1:] if word != "--again"], chosen.restarts)
    return True


def _drop(stage: str, path: Path) -> None:
    """Remove a stage and every later one."""
    if (path / "run.json").exists():
        gone = Run.open(path).discard(stage)
        if gone:
            console.say(f"dropped {', '.join(gone)}")


def _finished(stage: str, path: Path, chosen: Recipe, again: bool) -> Any:
    """Do `stage`, or say that it is done; with `again` it and every later one are dropped first."""
    if again:
        _drop(stage, path)
    run = Run.at(path, chosen)
    dropped = again and not processes.is_main()  # by the main process, perhaps not yet
    return _already(stage, run) if run.done(stage) and not dropped else _make(stage, run)


def _already(stage: str, run: Run) -> Any:
    console.say(f"{stage} is done in {console.escape(run.path)}; --again redoes it")
    return run.result(stage).model_dump(mode="json")


def _make(stage: str, run: Run) -> Any:
    console.say(f"[bold]{stage}[/]")
    from spdtool import stages

    result = stages.run_stage(run, stage)
    console.say(f"{stage}: done in {run.record(stage).seconds:,.0f} s{_headline(result)}")
    return result.model_dump(mode="json")


def _headline(result: Any) -> str:
    from spdtool.run.records import TrainingResult

    if not isinstance(result, TrainingResult):
        return ""
    sparsity = "" if result.sparsity is None else f"; sparsity {result.sparsity:.4f}"
    return f"; dev {console.format_scores(result.dev)}{sparsity}"


def _show_plan(run: Run, *, whole: bool = False, redo: str | None = None) -> Any:
    if processes.has_launcher():  # which has shown it
        return None
    from spdtool.stages.plan import make_plan

    planned = make_plan(run, redo)
    if run.recipe.smoke:
        console.say("[yellow]SMOKE RUN: a random two-layer model and a few steps; its numbers mean nothing[/]")
    if whole:
        values = run.recipe.values().items()
        console.print_table(f"recipe {run.recipe.name}", ("field", "value"), list(values))
    rows = ", ".join(f"{count:,} {name}" for name, count in planned.rows.items())
    console.print_table(
        f"{run.path}: {rows} rows",
        ("stage", "state", "epochs", "steps", "learning rate", "why"),
        [_planned_row(stage) for stage in planned.stages],
    )
    for line in planned.reading:
        console.say(console.escape(line))
    for note in planned.notes:
        console.warn(note)
    size = planned.parameters
    console.say(
        f"{size.zeros:,} of {size.prunable:,} weights of the encoder's linear layers become zero "
        f"({size.all:,} parameters in all); about {planned.memory_bytes / 2**20:,.0f} MiB of memory"
    )
    if size.emptied:
        console.warn(f"{run.recipe.sparsity:g} leaves no weight at all in {size.emptied} matrices of this model")
    return planned


def _planned_row(stage: Any) -> tuple[Any, ...]:
    rate = None if stage.learning_rate is None else f"{stage.learning_rate:.3g}"
    state = "done" if stage.done else "to do"
    return stage.stage, state, stage.epochs, stage.steps, rate, stage.why


def _show_result(run: Run) -> dict[str, Any]:
    result = run.bench_result()
    console.print_table(run.recipe.mark_smoke(str(run.path)), result.columns, result.rows)
    for table in result.tables:
        console.print_table(table.title, table.columns, table.rows)
    console.say("")
    for line in result.verdict:
        console.say(console.escape(line))
    return result.model_dump(mode="json")


def _require_runtime() -> None:
    """Fail before hours are spent, not after."""
    from spdtool.export import runtime

    runtime.require_onnxruntime()
