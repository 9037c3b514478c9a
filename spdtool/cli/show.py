"""The commands that show and change nothing: inspect, tasks, recipes, plugins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from spdtool import console, plugins
from spdtool.cli.options import command
from spdtool.cli.plan import describe_grafting

TASK_KEYS = ("name", "about", "metrics", "source")
ENTRY_KEYS = ("kind", "name", "source", "about")
PLUGIN_KEYS = ("name", "where", "state")
STAGE_COLUMNS = ("stage", "state", "made from", "seconds", "steps", "dev", "sparsity")


@command
def inspect(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> object:
    """Show a run: its stages, what each was made from, and the sparsity of every layer."""
    from spdtool.cli.inspect import inspect_run
    from spdtool.run.folder import Run

    opened = Run.open(run)
    inspection = inspect_run(opened)
    rows = []
    for stage in inspection.stages:
        rows.append(tuple(stage.model_dump().values()))
    console.print_table(opened.recipe.mark_smoke(inspection.run), STAGE_COLUMNS, rows)
    if inspection.test is not None:
        console.print_lines("test score", inspection.test.lines())
    if inspection.layers:
        columns = ("weight", "zeros", "size", "sparsity")
        matrices = [tuple(matrix.model_dump().values()) for matrix in inspection.layers]
        console.print_table(f"zeros after {inspection.sparsest}", columns, matrices)
    return inspection.model_dump(mode="json")


@command
def tasks() -> object:
    """List the tasks."""
    rows = []
    for entry in plugins.datasets.entries():
        rows.append((entry.name, entry.value.about, ", ".join(entry.value.metrics), entry.source))
    console.print_table("tasks", ("name", "what it is", "metrics", "from"), rows)
    console.say("[dim]or files of yours, csv, tsv, jsonl or parquet: --data FILE --text a,b --label c[/]")
    kinds = [(entry.value.columns, entry.summary) for entry in plugins.task_kinds.entries() if entry.value.columns]
    console.print_lines("the kind of task follows from the rows of --data", kinds)
    return _records(TASK_KEYS, rows)


@command
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to show: every field, its value and what it means.")
    ] = None,
) -> object:
    """List the recipes, or show one with the meaning of every field that --set reaches."""
    from spdtool.recipe import reading

    if name is None:
        rows = [(known, reading.describe_recipe(known)) for known in reading.recipe_names()]
        console.print_table("recipes", ("name", "what it is"), rows)
        return dict(rows)
    recipe = reading.build_recipe(name)
    values = recipe.values()
    fields = [(field, values[field], meaning) for field, meaning in reading.list_fields()]
    console.print_table(f"recipe {name}", ("field", "value", "what it is"), fields)
    console.say(describe_grafting(recipe))
    return values


@command
def plugins_() -> object:  # `plugins` is the module
    """List everything that can be named in a recipe, where it came from, and the plugins that did not load."""
    rows = []
    for registry in plugins.REGISTRIES:
        for entry in registry.entries():
            rows.append((registry.kind, entry.name, entry.source, entry.summary))
    console.print_table("extensions", ("kind", "name", "from", "what it is"), rows)
    states = [(plugin.name, plugin.where, plugin.error or "loaded") for plugin in plugins.loaded_plugins()]
    if states:
        console.print_table("plugins", PLUGIN_KEYS, states)
    return {"parts": _records(ENTRY_KEYS, rows), "plugins": _records(PLUGIN_KEYS, states)}


def _records(keys: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[dict[str, object]]:
    return [dict(zip(keys, row, strict=True)) for row in rows]
