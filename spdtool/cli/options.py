"""Options, the decorator and the error handling that all commands share.

Nothing here imports pydantic, numpy or torch: `--help` answers at once. Commands import what they
call when they run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer
from typer.core import TyperGroup

from spdtool import console, plugins
from spdtool.errors import RecipeError, SpdError, Stopped, explain_machine_error
from spdtool.recipe import STAGES

if TYPE_CHECKING:
    from spdtool.recipe.fields import Recipe

Command = Callable[..., object]
Context = Any  # newer versions of typer bring a click of their own

# The order of the commands in `--help`: as they are used.
WORKFLOW = (
    *("compress", "resume", *STAGES, "report", "sweep"),
    *("predict", "serve", "serve-check", "inspect", "unpack", "clean"),
)


class CommandGroup(TyperGroup):
    """The group of all commands: sorts them, and reports wrong usage as JSON with `--json`."""

    words: tuple[str, ...] = ()

    def make_context(self, info_name: str | None, args: list[str], parent: Context = None, **extra: Any) -> Context:
        """Remember the words of the call, then parse them."""
        self.words = tuple(args)
        with self._usage_as_json():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Context) -> object:
        """Run the command that the words name."""
        with self._usage_as_json():
            return super().invoke(ctx)

    def list_commands(self, ctx: Context) -> list[str]:
        """List the commands in the order of WORKFLOW, others after them."""
        names = super().list_commands(ctx)
        workflow = [name for name in WORKFLOW if name in names]
        return workflow + [name for name in names if name not in WORKFLOW]

    @contextmanager
    def _usage_as_json(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Only click's errors of usage have this method.
            if "--json" not in self.words or not hasattr(error, "format_message"):
                raise
            console.configure(as_json=True)
            hint = "`spdtool COMMAND --help` lists the options"
            console.print_error(RecipeError(error.format_message(), hint))
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # bugs keep Python's own traceback
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a fine-tuned encoder sparse, keep its score, export it to ONNX and measure what came out.",
    epilog="Start with: spdtool compress --task demo --sparsity 0.9",
)


def print_version(wanted: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if wanted:
        typer.echo(f"spdtool {metadata.version('spdtool')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit."),
]


@app.callback()
def start(version: Version = False) -> None:  # its callback has done the work
    """Accept the options that stand before a command."""


class _Panel(TypedDict):
    rich_help_panel: str


Data = Annotated[str | None, typer.Option(help="File or folder to read instead of the hub.")]
Model = Annotated[str | None, typer.Option(help="Encoder to fine-tune: folder or hub name.")]
RunPath = Annotated[Path | None, typer.Option("--run", help="Run folder.", show_default="runs/<task>-<sparsity>")]
ExistingRun = Annotated[Path, typer.Option("--run", help="Run folder.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any recipe field: --set prune.epochs=3.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
Everything = Annotated[
    bool, typer.Option("--all", help="Print the whole plan: every field, every class, every reason.")
]
Processes = Annotated[
    int,
    typer.Option("--processes", min=1, help="Train in this many processes, on as many devices."),
]
Again = Annotated[bool, typer.Option("--again", help="Redo the stage, dropping it and every later one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, everything else on standard error.")]
PluginsDir = Annotated[
    Path | None,
    typer.Option(help="Also load the *.py files of this folder.", envvar="SPDTOOL_PLUGINS"),
]
GOAL = "A goal in place of --sparsity"
NO_RUN = _Panel(rich_help_panel="A checkpoint that belongs to no run")


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """Options that make a recipe; a command that takes them gets each as an option of its own."""

    task: Annotated[str | None, typer.Option("--task", help="Task; `spdtool tasks` lists them.")] = None
    data: Data = None
    text: Annotated[str | None, typer.Option("--text", help="Text columns of --data, one or two: a,b.")] = None
    label: Annotated[str | None, typer.Option(help="Label column of --data.")] = None
    model: Model = None
    teacher: Annotated[str | None, typer.Option("--teacher", help="Fine-tuned model to use as it is.")] = None
    test_share: Annotated[
        float | None, typer.Option(help="Share of the training rows to score once, at the end, where no file is.")
    ] = None
    unlabeled: Annotated[
        Path | None, typer.Option(help="Texts without labels, which the teacher labels for the student.")
    ] = None
    sparsity: Annotated[float | None, typer.Option(help="Share of the encoder's weights to set to zero.")] = None
    speedup: Annotated[
        float | None,
        typer.Option(help="Goal: so many times faster than the dense teacher.", rich_help_panel=GOAL),
    ] = None
    max_mb: Annotated[float | None, typer.Option(help="Goal: a file of at most so many MB.", rich_help_panel=GOAL)] = (
        None
    )
    max_drop: Annotated[
        float | None, typer.Option(help="Goal: at most so many points of dev score lost.", rich_help_panel=GOAL)
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of student: small, sparse, blocks or auto.", rich_help_panel=GOAL, show_default="auto"),
    ] = None
    on: Annotated[
        str | None,
        typer.Option(
            help="Runtime of --speedup: onnxruntime, openvino, cuda or web.",
            rich_help_panel=GOAL,
            show_default="onnxruntime",
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(help="Times of a layer, from `spdtool bench --profile`.", rich_help_panel=GOAL),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Recipe name or TOML file; `spdtool recipes` lists them.", show_default="default"
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda (which refuses to fall back).")] = None
    metric: Annotated[
        str | None,
        typer.Option(help="The task's metric that picks the best checkpoint.", show_default="mean of its metrics"),
    ] = None
    sets: Sets = None
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps on a small random model; no result.")] = False

    def build(self, recorded: Recipe | None = None) -> Recipe:
        """Build the recipe that the options ask for; raises as `recipe.reading.request_recipe` does.

        Args:
            recorded: recipe of a run that exists, to go on with where neither --task nor --data is given.
        """
        from spdtool.recipe.reading import request_recipe

        if self.task is None and self.data is None and recorded is None:
            hint = "for example --task demo (`spdtool tasks` lists the tasks), or --run with a run to go on with"
            raise RecipeError("neither --task nor --data was given", hint)
        recipe = request_recipe(
            self.task,
            data=self.data,
            text=split_words(self.text),
            label=self.label,
            test_share=self.test_share,
            unlabeled=self.unlabeled,
            model=self.model,
            teacher=self.teacher,
            sparsity=self.sparsity,
            goal={
                "speedup": self.speedup,
                "max_mb": self.max_mb,
                "max_drop": self.max_drop,
                "kind": self.kind,
                "runtime": self.on,
                "profile": self.profile,
            },
            recipe=self.name,
            seed=self.seed,
            device=self.device,
            metric=self.metric,
            sets=self.sets or (),
            smoke=self.smoke,
            recorded=recorded,
        )
        if self.teacher and self.model and recipe.student != "pretrained":
            console.warn(f"--model {self.model} is ignored: the teacher is given, and the student starts as its copy")
        return recipe


def command(function: Command) -> Command:
    """Register `function` as a command of its name.

    Its value is printed as JSON with `--json`; errors of the user lose their traceback. Every
    command also gets --plugins-dir and --json. A parameter whose type is a dataclass, such as
    `RecipeOptions`, becomes the options that are its fields.
    """
    signature = inspect.signature(function, eval_str=True)
    # Typer reads the options from the signature: the wrapper gets one that lists them all.
    groups: dict[str, type[Any]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            groups[name] = kind
            parameters |= inspect.signature(kind, eval_str=True).parameters
        else:
            parameters[name] = parameter
    parameters |= inspect.signature(_shared_options, eval_str=True).parameters

    @functools.wraps(function)
    def run(plugins_dir: Path | None, as_json: bool, **options: Any) -> None:
        console.configure(as_json=as_json)  # first: errors are printed the same way
        with _exit_on_error():
            plugins.use_folder(plugins_dir)
            for name, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group)]
                options[name] = group(**{field: options.pop(field) for field in fields})
            value = function(**options)
            # None: the command has printed its rows one by one.
            if value is not None:
                console.print_result(value)

    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    run.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
    app.command(function.__name__.rstrip("_").replace("_", "-"))(run)
    return run


def _shared_options(plugins_dir: PluginsDir = None, as_json: Json = False) -> None:
    """Carry the options that every command has."""


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Turn errors of the user and of the machine into a message and an exit code; bugs keep their traceback."""
    try:
        yield
    except SpdError as error:
        console.print_error(error)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        console.warn(stopped.message)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        console.warn("stopped; the same command goes on from the last snapshot, if the stage has made one")
        raise typer.Exit(130) from None  # as a shell reports SIGINT
    except Exception as error:
        known = explain_machine_error(error)
        if known is None:
            raise
        console.print_error(known)
        raise typer.Exit(known.exit_code) from None


def split_words(text: str | None) -> tuple[str, ...]:
    """Split `a, b` into words; None and empty words give none."""
    words = [word.strip() for word in (text or "").split(",")]
    return tuple(filter(None, words))
