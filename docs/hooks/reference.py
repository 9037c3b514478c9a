"""Generate the reference pages from the code, so that they can never be stale.

`PAGES` maps each page of docs/reference/ to the function that writes its Markdown. mkdocs calls `on_files` at every
build (see mkdocs.yml); tests/test_docs.py calls the functions one by one. Nothing here imports mkdocs at the top, so
that the tests need no documentation tools.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKING = ROOT / "plugins/spdtool-sparse-cpu/spdtool_sparse_cpu/packing.py"
LARGEST_SHOWN = 2**31  # a larger limit is that of the machine and helps nobody
EXIT_CODES = (
    (0, "The work is done."),
    (1, "A bug of spdtool. The traceback says where; please report it."),
    (2, "The request cannot be carried out as it was made, or its options are wrong. Nothing is half-written."),
    (3, "The work was done, and what came out is refused; or a trial of a sweep has failed."),
    (130, "Ctrl-C. The same command goes on from the last snapshot, or after the last finished target of an export."),
)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table, every cell escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def code(value: object) -> str:
    """Return a value as inline code."""
    return f"`{value}`"


def paragraphs(text: str | None) -> str:
    """Return a docstring or a help text as Markdown, angle brackets escaped outside code."""
    cleaned = inspect.cleandoc(text or "")
    words = cleaned.split("`")
    words[::2] = [word.replace("<", "&lt;") for word in words[::2]]
    return "`".join(words)


# ------------------------------------------------------------------------------------------------ command line


def commands() -> dict[str, Any]:
    """Return every command of the command line by name, in the order in which they are used."""
    from typer.main import get_command

    from spdtool.cli.main import app

    group: Any = get_command(app)
    return {name: group.commands[name] for name in group.list_commands(None)}


def annotations(name: str) -> dict[str, Any]:
    """Return the type of every option of a command, by the name of its parameter."""
    from spdtool.cli.main import app

    callback = next(each.callback for each in app.registered_commands if each.name == name)
    assert callback is not None
    return {key: value.annotation for key, value in inspect.signature(callback, eval_str=True).parameters.items()}


def option_row(parameter: Any, annotation: Any) -> tuple[str, ...]:
    """Return name, value, default and help of an option or argument."""
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    takes = "" if getattr(parameter, "is_flag", False) else kind(annotation)
    if takes.startswith("list of "):
        takes = f"{takes.removeprefix('list of ')}, more than once"
    default = ""
    if parameter.required:
        default = "required"
    elif isinstance(getattr(parameter, "show_default", None), str):
        default = code(parameter.show_default)
    elif parameter.default not in (None, False, (), []) and not callable(parameter.default):
        default = code(parameter.default)
    return ", ".join(map(code, names)), takes, default, paragraphs(parameter.help)


def command_line() -> str:
    """Write a section for each command: usage, help, arguments and options."""
    every = commands()
    parts = [
        "# Command line",
        "Start with `spdtool compress --task demo --sparsity 0.9`. "
        "Every command has `--json`, which writes JSON to standard output and everything else to standard error, "
        "and `--plugins-dir`. `spdtool COMMAND --help` prints what stands here. "
        "[Errors and exit codes](errors.md) has the exit codes.",
        table(
            ("command", "what it does"),
            ((f"[`{name}`](#spdtool-{name})", paragraphs(each.help)) for name, each in every.items()),
        ),
    ]
    for name, each in every.items():
        arguments = [p for p in each.params if p.param_type_name == "argument"]
        options = [p for p in each.params if p.param_type_name == "option"]
        usage = f"spdtool {name} [OPTIONS]" + "".join(
            f" {p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in arguments
        )
        parts += [f"## `spdtool {name}` {{#spdtool-{name}}}", paragraphs(each.help), f"```text\n{usage}\n```"]
        types = annotations(name)
        rows = [option_row(parameter, types[parameter.name]) for parameter in [*arguments, *options]]
        parts.append(table(("option", "value", "default", "meaning"), rows))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ recipe


def is_named_tuple(annotation: Any) -> bool:
    """Tell whether a type is a NamedTuple, which JSON stores as a list."""
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def kind(annotation: Any) -> str:
    """Return a type as a reader of a TOML file would say it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(inner[0])
    if origin is typing.Literal:
        return ", ".join(code(value) for value in inner)
    if origin in (typing.Union, UnionType):
        return " or ".join(kind(each) for each in inner if each is not NoneType)
    if origin is tuple and Ellipsis in inner:
        return f"list of {kind(inner[0])}"
    if origin is list:
        return f"list of {kind(inner[0])}"
    if is_named_tuple(annotation):
        return f"[{', '.join(annotation._fields)}]"
    if origin is tuple and inner:
        return f"[{', '.join(map(kind, inner))}]"
    if origin is dict:
        return f"map of {kind(inner[0])} to {kind(inner[1])}"
    known = {
        Path: "path",
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true` or `false`",
        NoneType: "nothing",
    }
    return known.get(annotation) or getattr(annotation, "__name__", str(annotation)).strip("_")


def bounds(metadata: Iterable[Any]) -> str:
    """Return the limits of a number, such as `>= 0`, from the constraints of its field."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    limits = []
    for constraint in metadata:
        for name, sign in signs:
            limit = getattr(constraint, name, None)
            if limit is not None and limit < LARGEST_SHOWN:
                limits.append(f"{sign} {limit}")
    return ", ".join(limits)


def toml(value: Any) -> str:
    """Return a value as one would write it after `--set field=`."""
    return "none" if value is None else json.dumps(value)


def is_section(annotation: Any) -> bool:
    """Tell whether a field of the recipe holds further fields."""
    from spdtool.recipe.section import Section

    return isinstance(annotation, type) and issubclass(annotation, Section)


def sections(section: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted path, section)` of the recipe and every section in it, with the values of Recipe()."""
    from spdtool.recipe.fields import Recipe

    section = Recipe() if section is None else section
    yield path, section
    for name, field in type(section).model_fields.items():
        if is_section(field.annotation):
            yield from sections(getattr(section, name), f"{path}.{name}".strip("."))


def recipe_fields() -> str:
    """Write a table of fields for each section of the recipe."""
    from spdtool.recipe import reading
    from spdtool.recipe.fields import flatten

    used = reading.build_recipe("default", {"task": "demo"}).values()
    usual = tomllib.loads(files("spdtool.recipe").joinpath("default.toml").read_text("utf-8"))
    named = set(flatten(usual))
    parts = [
        "# Recipe fields",
        "A run is decided by its recipe. Set any field with `--set section.field=value`, or in a TOML file for "
        "`--recipe FILE`. Later sources win: the defaults below, the task's own file, the recipe, the flags, `--set`. "
        "`spdtool recipes default` prints the same list in a terminal. "
        "A list takes one value, words between commas, or `'[1, 2]'`.",
    ]
    for path, section in sections():
        title = path or "The run"
        anchor = path.replace(".", "-") or "run"
        parts.append(f"{'#' * (2 + path.count('.'))} {code(path) if path else title} {{#{anchor}}}")
        parts.append(paragraphs(type(section).__doc__))
        rows = []
        for name, field in type(section).model_fields.items():
            if is_section(field.annotation):
                continue
            dotted = f"{path}.{name}".strip(".")
            default = code(toml(json.loads(section.model_dump_json())[name]))
            if dotted in named:
                default += f" (recipe `default`: {code(toml(used[dotted]))})"
            limits = bounds(field.metadata)
            values = kind(field.annotation) + (f", {limits}" if limits else "")
            rows.append((code(dotted), default, values, paragraphs(field.description)))
        parts.append(table(("field", "default", "values", "meaning"), rows))
    return "\n\n".join(parts)


def recipes() -> str:
    """Write a section for each packaged recipe: what it is for, and its file."""
    from spdtool.recipe import reading

    folder = files("spdtool.recipe")
    rows = [(f"[`{name}`](#{name})", paragraphs(reading.describe_recipe(name))) for name in reading.recipe_names()]
    parts = [
        "# Recipes",
        "Choose one with `--recipe NAME`, or give the path of a TOML file of yours. A recipe names only what differs "
        "from the [defaults of the fields](recipe-fields.md). [Results](../results.md) compares them.",
        "Grafting is off in `default`: the student runs alone in all three phases. `--recipe spd` turns it on.",
        table(("recipe", "what it is"), rows),
    ]
    for name in reading.recipe_names():
        text = folder.joinpath(f"{name}.toml").read_text("utf-8")
        parts += [f"## `{name}` {{#{name}}}", f"```toml\n{text}```"]
    parts += ["## Settings of a task", "A task may have settings of its own, under every recipe."]
    for file in sorted(folder.joinpath("task").iterdir(), key=lambda each: each.name):
        if file.name.endswith(".toml"):
            parts += [f"### `{file.name.removesuffix('.toml')}`", f"```toml\n{file.read_text('utf-8')}```"]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ registries


def built_in(registry: Any) -> list[Any]:
    """Return what spdtool and the plugins of this repository register, by name."""
    return [part for part in registry.entries() if part.source.startswith(("spdtool.", "spdtool-"))]


def tasks() -> str:
    """Write the table of tasks, and how files of the user are read."""
    from spdtool import plugins

    rows = [
        (code(part.name), paragraphs(part.value.about), ", ".join(part.value.metrics))
        for part in built_in(plugins.datasets)
    ]
    return "\n\n".join(
        [
            "# Tasks and data",
            "Choose a task with `--task NAME`, or give a file of yours with `--data`. "
            "`spdtool tasks` prints this list.",
            table(("task", "what it is", "metrics"), rows),
            (ROOT / "docs/hooks/your-data.md").read_text("utf-8"),
        ]
    )


def rounding_of(target: Any) -> str:
    """Return what a target rounds, in words."""
    if target.rounds_arithmetic:
        return "weights and arithmetic"
    return "weights" if target.rounds_weights else "nothing"


def targets() -> str:
    """Write the table of export targets, with what each says of itself."""
    from spdtool import plugins

    rows = []
    for part in built_in(plugins.targets):
        target = part.value
        by_default = "yes" if target.exported_by_default else ""
        providers = ", ".join(target.providers)
        rows.append((code(part.name), paragraphs(part.summary), providers, rounding_of(target), by_default))
    return "\n\n".join(
        [
            "# Export targets",
            "Name demanded targets in `export.targets` and optional ones in `export.optional`. "
            "[Choose an export target](../how-to/choose-a-target.md) says which one is for whom, and "
            "[The gates of an export](../explanation/gates.md) what each file has to pass.",
            table(("target", "what it writes", "runs on", "rounds", "exported if installed"), rows),
            "`sparse-cpu` comes with the plugin `spdtool-sparse-cpu`, which needs a C++ compiler.",
        ]
    )


def criteria() -> str:
    """Write the tables of criteria and patterns, with the statistics that each criterion needs."""
    from spdtool import plugins

    rows = [
        (code(part.name), paragraphs(part.summary), ", ".join(map(code, part.meta.get("needs", ()))))
        for part in built_in(plugins.criteria)
    ]
    patterns = [(code(part.name), paragraphs(part.summary)) for part in built_in(plugins.patterns)]
    return "\n\n".join(
        [
            "# Criteria and patterns",
            "A criterion scores weights; the lowest scores are pruned first. Choose one with "
            "`--set prune.criterion=NAME`. "
            "[Write a criterion](../how-to/write-a-criterion.md) explains the statistics.",
            table(("criterion", "score of a weight", "statistics"), rows),
            "A pattern says which weights may be pruned together: `--set prune.pattern=NAME`.",
            table(("pattern", "what it prunes"), patterns),
        ]
    )


# ------------------------------------------------------------------------------------------------ files


def docstring(file: Path) -> str:
    """Return the docstring of a module without importing it."""
    return ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""


def attribute_meanings(record: Any, known: Iterable[str] | None = None) -> dict[str, str]:
    """Return what the docstring of a record says of its fields (or of `known` ones), by name.

    A line such as `zeros, size: of the matrices. files: by path.` speaks of three fields.
    """
    block = " ".join(inspect.cleandoc(record.__doc__ or "").partition("Attributes:\n")[2].split())
    marks = []
    for mark in re.finditer(r"(?:^|(?<=[.;] ))(\w+(?:, \w+)*): ", block):
        names = mark.group(1).split(", ")
        if set(names) <= set(record.model_fields):
            marks.append((mark.start(), mark.end(), names))
    meanings = {}
    for place, (_, start, names) in enumerate(marks):
        end = marks[place + 1][0] if place + 1 < len(marks) else len(block)
        meanings |= dict.fromkeys(names, block[start:end].strip().rstrip(".;"))
    return {name: meaning for name, meaning in meanings.items() if known is None or name in known}


def records_in(annotation: Any) -> Iterator[Any]:
    """Yield every record type that an annotation names, in order."""
    from spdtool.run.records import Record

    if isinstance(annotation, type) and issubclass(annotation, Record):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from records_in(inner)


def reachable_records(root: Any) -> list[Any]:
    """Return a record type and every one that it holds, each once, in order of appearance."""
    listed = [root]
    for record in listed:  # the list grows while it is read
        for field in record.model_fields.values():
            listed += [inner for inner in records_in(field.annotation) if inner not in listed]
    return listed


def record_type(annotation: Any) -> str:
    """Return the type of a field of a record, with links to the records that it names."""
    text = kind(annotation)
    for record in records_in(annotation):
        text = text.replace(record.__name__, f"[{record.__name__}](#{record.__name__.lower()})")
    return text


def record_sections(root: Any, level: int = 2) -> str:
    """Write a section with a table of fields for a record and for every one that it holds."""
    from spdtool.run import records

    parts = []
    for record in reachable_records(root):
        about = inspect.cleandoc(record.__doc__ or "").partition("Attributes:")[0].strip()
        meanings = attribute_meanings(record)
        other = re.search(r"see `(\w+)`", about)  # a record with the same fields, explained there
        if other is not None and hasattr(records, other.group(1)):
            meanings = attribute_meanings(getattr(records, other.group(1)), record.model_fields) | meanings
        rows = []
        for name, field in record.model_fields.items():
            value = record_type(field.annotation) + ("" if field.is_required() else ", optional")
            meaning = paragraphs(field.description or meanings.get(name, ""))
            rows.append((code(name), value, meaning))
        heading = f"{'#' * level} {record.__name__} {{#{record.__name__.lower()}}}"
        parts += [heading, paragraphs(about), table(("field", "value", "meaning"), rows)]
    return "\n\n".join(parts)


def stage_json() -> str:
    """Write what a finished stage records of itself, and what run.json holds."""
    from spdtool.run import records

    return "\n\n".join(
        [
            "# stage.json",
            "A stage writes `stage.json` last. Its existence means that the stage is done. "
            "`spdtool inspect RUN --json` prints what it says of each stage. "
            "`run.json`, at the top of the run folder, holds the recipe.",
            record_sections(records.StageRecord),
            "## run.json",
            record_sections(records.RunRecord, level=3),
        ]
    )


def manifest_json() -> str:
    """Write what the manifest of a bundle says."""
    from spdtool.run import records

    return "\n\n".join(
        [
            "# manifest.json",
            "Every exported folder has a manifest. That of a [bundle](../how-to/serve.md) (format 2) says which "
            "variants it holds, what each runs on, and what it was measured to cost; that of a folder of one model "
            "(format 1) follows below. "
            "`files` has the sha256 of every file but the model card, which its owner edits. `digest`, a field "
            "beside those listed here, is the sha256 of all others as JSON with sorted keys.",
            record_sections(records.BundleManifest),
            record_sections(records.FolderManifest),
        ]
    )


def other_files() -> str:
    """Write what bench.json, sweep.json and the plan of `--dry-run --json` hold."""
    from spdtool.run import records

    return "\n\n".join(
        [
            "# Other JSON",
            "`bench/bench.json` has every round of every engine; `sweep.json` a row for each trial; "
            "`spdtool compress --dry-run --json` prints a plan.",
            "## bench.json",
            record_sections(records.BenchFile, level=3),
            "## sweep.json",
            record_sections(records.SweepRecord, level=3),
            "## The plan",
            record_sections(records.Plan, level=3),
        ]
    )


def packed_format() -> str:
    """Write the bytes of a packed matrix, as the packing module describes them."""
    return "\n\n".join(
        [
            "# Packed format",
            "The targets `sparse-cpu` and `sparse-cpu-int8` store each parameter of the encoder as one constant in "
            "this form. It keeps the values that are not zero, and the gaps between them. `spdtool unpack` turns "
            "a folder back into a Hugging Face checkpoint, without loss where every value is fp32.",
            paragraphs(docstring(PACKING)),  # its indented lines become code blocks
        ]
    )


# ------------------------------------------------------------------------------------------------ errors, Python


def error_tree() -> list[tuple[int, type[Exception]]]:
    """Return `(depth, class)` of every error of spdtool.errors, parents before children."""
    from spdtool.errors import SpdError

    def below(error: type[Exception], depth: int) -> Iterator[tuple[int, type[Exception]]]:
        yield depth, error
        for child in error.__subclasses__():
            if child.__module__ == "spdtool.errors":
                yield from below(child, depth + 1)

    return list(below(SpdError, 0))


def errors() -> str:
    """Write the exit codes and the tree of errors."""
    tree = "\n".join(f"{'    ' * depth}{error.__name__}" for depth, error in error_tree())
    rows = [
        (code(error.__name__), str(getattr(error, "exit_code", 2)), paragraphs(error.__doc__))
        for _, error in error_tree()
    ]
    return "\n\n".join(
        [
            "# Errors and exit codes",
            "An error that a user can cause is shown without a traceback: what was asked, what was found, what to try. "
            'With `--json` it is `{"error": ..., "message": ..., "hint": ...}`-like JSON. In Python it is an exception '
            "of the tree below; `error.message` and `error.hint` hold the two texts.",
            "## Exit codes",
            table(("code", "meaning"), ((str(number), meaning) for number, meaning in EXIT_CODES)),
            "An optional export target that is refused is left out and named; the exit code stays 0.",
            "## Errors",
            f"```text\n{tree}\n```",
            table(("error", "exit code", "meaning"), rows),
        ]
    )


def python_api() -> str:
    """Write the public names of the package for mkdocstrings, which fills them in: functions, then types."""
    import spdtool

    errors_of_users = {error.__name__ for _, error in error_tree()}
    public = [name for name in spdtool.__all__ if not name.startswith("_") and name not in errors_of_users]
    public.sort(key=lambda name: (name[0].isupper(), name))
    parts = [
        "# Python API",
        "`import spdtool` is light: each name is imported when it is first used. "
        "Whatever a command does, Python can do as well. The errors are on a [page of their own](errors.md).",
    ]
    for name in public:
        parts.append(f"::: spdtool.{name}")
        if name == "Recipe":  # its fields have a page, and the list of its members would bury the rest
            parts[-1] += "\n    options:\n      members: false"
            parts.append("[Recipe fields](recipe-fields.md) lists every field.")
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe-fields": recipe_fields,
    "recipes": recipes,
    "tasks": tasks,
    "targets": targets,
    "criteria": criteria,
    "stage-json": stage_json,
    "manifest-json": manifest_json,
    "other-files": other_files,
    "packed-format": packed_format,
    "errors": errors,
    "python-api": python_api,
}


def on_files(site_files: Any, config: Any) -> Any:
    """Add the generated pages to the site; mkdocs calls this once a build."""
    from mkdocs.structure.files import File

    for name, write in PAGES.items():
        site_files.append(File.generated(config, f"reference/{name}.md", content=write() + "\n"))
    return site_files
