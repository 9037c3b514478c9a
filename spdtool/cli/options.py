"""What every command of the command line shares: its options, the recipe that they make, and how errors are told.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import errno
import functools
import inspect as inspect_module
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spdtool import console, plugins
from spdtool.errors import DeviceError, RecipeError, RunError, SpdError
from spdtool.recipe import STAGES
from spdtool.recipe import reading as recipe
from spdtool.recipe.fields import Recipe

WORKFLOW = ("compress", *STAGES, "report", "sweep", "predict", "serve", "serve-check", "inspect", "unpack")


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

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which they are used, however they were registered."""
        names: list[str] = super().list_commands(ctx)
        return sorted(names, key=lambda name: WORKFLOW.index(name) if name in WORKFLOW else len(WORKFLOW))

    @contextmanager
    def _usage_as_json(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if "--json" not in self.words or not hasattr(error, "format_message"):
                raise
            console.configure(as_json=True)
            console.print_error(RecipeError(error.format_message(), "`spdtool COMMAND --help` lists the options"))
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
Processes = Annotated[int, typer.Option("--processes", min=1, help="Train in this many processes, on as many devices.")]
Again = Annotated[bool, typer.Option("--again", help="Redo the stage, dropping it and every later one.")]
OF_NO_RUN: dict[str, Any] = {"rich_help_panel": "A checkpoint that belongs to no run"}
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, everything else on standard error.")]
PluginsDir = Annotated[
    Path | None, typer.Option(help="Also load the *.py files of this folder.", envvar="SPDTOOL_PLUGINS")
]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function` as a command of its name: its value becomes JSON, errors of the user's lose their traceback.

    Every command also gets --plugins-dir and --json; one that takes `chosen` gets the options that make a recipe.
    """
    own = inspect_module.signature(function, eval_str=True)
    making = inspect_module.signature(make_recipe, eval_str=True).parameters

    @functools.wraps(function)
    def run(plugins_dir: Path | None, as_json: bool, **options: Any) -> None:
        console.configure(as_json=as_json)
        try:
            plugins.use_folder(plugins_dir)
            if "chosen" in own.parameters:
                options["chosen"] = make_recipe(**{name: options.pop(name) for name in making})
            value = function(**options)
            if value is not None:  # a command that wrote its rows one by one
                console.print_result(value)
        except SpdError as error:
            console.print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.warn("stopped; the same command goes on from the last snapshot, if the stage has made one")
            raise typer.Exit(130) from None
        except Exception as error:
            known = _machine_error(error)
            if known is None:
                raise
            console.print_error(known)
            raise typer.Exit(known.exit_code) from None

    shared = inspect_module.signature(_shared_options, eval_str=True).parameters
    parameters = {name: value for name, value in own.parameters.items() if name != "chosen"}
    if "chosen" in own.parameters:
        parameters = dict(making) | parameters
    every = [value.replace(kind=value.KEYWORD_ONLY) for value in (parameters | dict(shared)).values()]
    run.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    return app.command(function.__name__.rstrip("_").replace("_", "-"))(run)


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
    chosen = recipe.build_recipe(name, flags, sets or ())
    if teacher and model and chosen.student != "pretrained":
        console.warn(f"--model {model} is ignored: the teacher is given, and the student starts as its copy")
    return chosen.model_copy(update={"student": _from_here(chosen.student)})


def _from_here(path: str | None) -> str | None:
    """An existing path made absolute, so that the run can be resumed from another folder; a hub name as it is."""
    return os.path.abspath(path) if path and os.path.exists(path) else path


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
