"""The command line: one short function per command. Each imports its stage inside, so that `--help` answers at once."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect as inspect_module
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spdtool import console, plugins, recipe
from spdtool.errors import DeviceError, RecipeError, RunError, SpdError
from spdtool.recipe import STAGES, Recipe
from spdtool.run import Run, default_path


class Commands(TyperGroup):
    """Keeps the words of a call, so that with `--json` wrong usage is told as JSON too."""

    words: tuple[str, ...] = ()

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Note the words, then go on as usual."""
        self.words = tuple(args)
        with self._usage_as_json():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the words name."""
        with self._usage_as_json():
            return super().invoke(ctx)

    @contextmanager
    def _usage_as_json(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if "--json" not in self.words or not hasattr(error, "format_message"):
                raise
            console.setup(as_json=True)
            console.fail(RecipeError(error.format_message(), "`spdtool COMMAND --help` lists the options"))
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
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
OF_NO_RUN: dict[str, Any] = {"rich_help_panel": "A checkpoint that belongs to no run"}
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
            console.warn("stopped; the same command goes on from the last snapshot, if the stage has made one")
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
        "data": _from_here(data),
        "text": tuple(column.strip() for column in text.split(",")) if text else None,
        "label": label,
        "model": _from_here(model),
        "given_teacher": _from_here(teacher),
        "sparsity": sparsity,
        "seed": seed,
        "device": device,
        "smoke": smoke or None,
    }
    return recipe.resolve(name, flags, sets or ())


def _from_here(path: str | None) -> str | None:
    """An existing path made absolute, so that the run can be resumed from another folder; a hub name as it is."""
    return os.path.abspath(path) if path and os.path.exists(path) else path


@command
def compress(chosen: Recipe, run: Folder = None, dry_run: DryRun = False) -> Any:
    """Run every stage that is not finished yet: teacher, prune, distill, finetune, export, bench."""
    path = run or default_path(chosen)
    planned = _show_plan(Run.at(path, chosen, dry=True), whole=dry_run)
    if dry_run:
        return planned | {"recipe": chosen.model_dump(mode="json")}
    _require_runtime()
    target = Run.at(path, chosen)
    for stage in STAGES:
        if target.done(stage):
            console.say(f"[dim]{stage}: done, skipped[/]")
        else:
            _make(stage, target)
    return _show_result(target)


@command
def teacher(chosen: Recipe, run: Folder = None, again: Again = False) -> Any:
    """Start a run: fine-tune the dense model on the task, or measure a given one."""
    path = run or default_path(chosen)
    target = Run.at(path, chosen, redo="teacher" if again else None, dry=True)
    if target.done("teacher") and not again:
        return _already("teacher", target)
    _show_plan(target)
    return _finished("teacher", path, chosen, again)


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
def export(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; or give --from.")] = None,
    again: Again = False,
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
    _refuse_mixture(run, checkpoint, again, [name for name, value in foreign.items() if value is not None])
    _require_runtime()
    if run is not None:
        return _run_stage("export", run, again, sets)
    assert checkpoint is not None
    with_task = task is not None or data is not None
    if not with_task and (text or label):
        raise RecipeError("--text and --label name columns of --data, which was not given", "add --data FILE")
    chosen = make_recipe(task=task or (None if data else "demo"), data=data, text=text, label=label, sets=sets)
    name = target or chosen.export.targets[0]
    from spdtool.stages.export import export_any

    folder = to or Path(f"{checkpoint.resolve().name}-{name}")
    return export_any(checkpoint, name, folder, chosen, with_task=with_task)


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
    folder: Annotated[Path, typer.Argument(help="Exported folder, such as RUN/export/sparse-cpu.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or new.")],
) -> Any:
    """Turn an exported folder back into a plain Hugging Face checkpoint."""
    from spdtool.export.unpack import unpack as restore

    read = restore(folder, out)
    console.say(f"{console.plain(read)} is unpacked to {console.plain(out)}")
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
    from spdtool.inspection import inspect_run

    opened = Run.open(run)
    shown = inspect_run(opened)
    console.table(
        opened.recipe.titled(shown["run"]),
        ("stage", "state", "made from", "seconds", "steps", "dev", "sparsity"),
        [
            tuple((row | {"made_from": (row["made_from"] or "").replace(", ", "\n")}).values())
            for row in shown["stages"]
        ],
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
        head = f"[{colour[check['status']]}]{check['status']:>4}[/]  [bold]{check['name']}[/]"
        console.say(f"{head}  {console.plain(check['found'])}")
        if check["advice"]:
            console.say(f"      [dim]{console.plain(check['advice'])}[/]")
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
    chosen = recipe.amend(Run.open(path).recipe, sets or ())
    target = Run.at(path, chosen, redo=stage if again else None, dry=True)
    if again and target.done(stage):
        from spdtool.planning import check_run

        check_run(target)  # before anything is dropped
    return _finished(stage, path, chosen, again)


def _finished(stage: str, path: Path, chosen: Recipe, again: bool) -> Any:
    """Do `stage`, or say that it is done; with `again` it and every later one are dropped first."""
    if again and (path / "run.json").exists():
        gone = Run.open(path).discard(stage)
        if gone:
            console.say(f"dropped {', '.join(gone)}")
    run = Run.at(path, chosen)
    return _already(stage, run) if run.done(stage) else _make(stage, run)


def _already(stage: str, run: Run) -> Any:
    console.say(f"{stage} is done in {console.plain(run.path)}; --again redoes it")
    return run.record(stage)["metrics"]


def _make(stage: str, run: Run) -> dict[str, Any]:
    console.say(f"[bold]{stage}[/]")
    metrics = _stage(stage)(run)
    console.say(f"{stage}: done in {run.record(stage)['seconds']:,.0f} s{_headline(metrics)}")
    return metrics


def _stage(stage: str) -> Callable[[Run], dict[str, Any]]:
    function: Callable[[Run], dict[str, Any]] = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)
    return function


def _headline(metrics: dict[str, Any]) -> str:
    parts = [f"dev {console.scores(metrics['dev'])}"] if isinstance(metrics.get("dev"), dict) else []
    if "sparsity" in metrics:
        parts.append(f"sparsity {metrics['sparsity']:.4f}")
    return "".join(f"; {part}" for part in parts)


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
    if size["emptied"]:
        console.warn(f"{run.recipe.sparsity:g} leaves no weight at all in {size['emptied']} matrices of this model")
    return planned


def _show_result(run: Run) -> dict[str, Any]:
    from spdtool.inspection import result_of

    shown = result_of(run)
    console.table(run.recipe.titled(str(run.path)), shown["columns"], shown["rows"])
    for table in shown.get("tables", ()):
        console.table(table["title"], table["columns"], table["rows"])
    console.say("")
    for line in shown["verdict"]:
        console.say(console.plain(line))
    return shown


def _require_runtime() -> None:
    """Fail before hours are spent, not after."""
    from spdtool.export import runtime

    runtime.require()


def _machine_error(error: Exception) -> SpdError | None:
    """What the machine ran out of or does not allow, if that is what happened."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return RunError(
            f"the disk is full: {error}", "free some space; the same command goes on from the last snapshot"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return DeviceError(f"out of device memory: {error}", "cut batches into pieces: --set prune.accumulate=2")
    if isinstance(error, MemoryError):
        return DeviceError(f"out of memory: {error}", "cut batches into pieces: --set prune.accumulate=2")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        return RunError(f"not possible here: {error}", "check the path and its permissions, or give another --run")
    return None
