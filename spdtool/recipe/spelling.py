"""A recipe as the options of a command line: flags where there are some, `--set` for every other field."""

from __future__ import annotations

import json

from pydantic import JsonValue

from spdtool.errors import UnknownName
from spdtool.recipe import reading
from spdtool.recipe.fields import MAY_CHANGE, FieldChange, Recipe

FLAGS = {
    "task": "--task",
    "data": "--data",
    "text": "--text",
    "label": "--label",
    "test_share": "--test-share",
    "unlabeled": "--unlabeled",
    "model": "--model",
    "given_teacher": "--teacher",
    "sparsity": "--sparsity",
    "seed": "--seed",
    "metric": "--metric",
}
ALWAYS = ("task", "sparsity", "seed")  # a reader looks for these, even where they are the default


def recipe_options(recipe: Recipe) -> list[str]:
    """Return the options that make `recipe`, after `spdtool compress` or `spdtool teacher`."""
    flags = {}
    for name in FLAGS:
        value = getattr(recipe, name)
        changed = name in ALWAYS or value != Recipe.model_fields[name].default
        if changed and (name, value) != ("task", "local"):  # --data implies it
            flags[name] = value
    options = []
    for name, value in flags.items():
        if isinstance(value, tuple):
            value = ",".join(value)
        options += [FLAGS[name], str(value)]
    base_name = "default"
    if recipe.name in reading.recipe_names() and recipe.name != "default":
        base_name = recipe.name
        options += ["--recipe", base_name]
    if recipe.smoke:
        options.append("--smoke")
        flags["smoke"] = True
    base = reading.build_recipe(base_name, flags | {"task": recipe.task})
    for field, value, _ in recipe.diff(base):
        if field not in MAY_CHANGE:  # no result depends on it
            options += ["--set", assign(field, value)]
    return options


def assign(field: str, value: JsonValue) -> str:
    """Return the assignment that `--set` reads as this value."""
    # TOML has no null.
    return f"{field}=none" if value is None else f"{field}={json.dumps(value)}"


def list_changes(recipe: Recipe) -> list[FieldChange]:
    """List `(field, value, value there)` of every field that differs from the recipe of that name on the same task."""
    try:
        base = reading.build_recipe(recipe.name, {"task": recipe.task})
    except UnknownName:  # made by a program, or of a file that is gone
        base = reading.build_recipe("default", {"task": recipe.task})
    if recipe.smoke:
        base = reading.make_smoke(base)
    return [change for change in recipe.diff(base) if change[0] not in ("name", "task")]
