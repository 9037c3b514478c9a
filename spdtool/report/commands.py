"""The commands that make a run again, from its recipe: flags where there are some, `--set` for every other field."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from spdtool.errors import SpdError
from spdtool.recipe import STAGES
from spdtool.recipe import reading as recipes
from spdtool.recipe.fields import MAY_CHANGE, Recipe
from spdtool.run.folder import Run
from spdtool.sweep.rows import teacher_folder

FLAGS = {
    "task": "--task",
    "data": "--data",
    "text": "--text",
    "label": "--label",
    "model": "--model",
    "given_teacher": "--teacher",
    "sparsity": "--sparsity",
    "seed": "--seed",
}
ALWAYS = ("task", "sparsity", "seed")


def commands_of(run: Run) -> list[str]:
    """What to type to make the run again, that of its teacher's run first, as far as both are finished."""
    given = run.recipe.given_teacher
    home = teacher_folder(run).parent if run.done("teacher") else Path(given or "")
    before = _stages(Run.open(home)) if given and (home / "run.json").is_file() else []
    return [*before, *_stages(run)]


def recipe_options(recipe: Recipe) -> list[str]:
    """The options that make `recipe`, after `spdtool compress` or `spdtool teacher`."""
    flags = {name: getattr(recipe, name) for name in FLAGS if _told(recipe, name)}
    name = recipe.name if recipe.name in recipes.recipe_names() else "default"
    base = recipes.build_recipe(name, flags | ({"smoke": True} if recipe.smoke else {}))
    changed = [(field, mine) for field, mine, _ in recipe.diff(base) if field not in MAY_CHANGE]
    said = [word for field, value in flags.items() for word in (FLAGS[field], _flag(value))]
    said += [] if name == "default" else ["--recipe", name]
    said += ["--smoke"] if recipe.smoke else []
    return said + [word for field, value in changed for word in ("--set", f"{field}={_toml(value)}")]


def _stages(run: Run) -> list[str]:
    """`compress` for a run with every stage, else a command for each stage that it has."""
    finished = [stage for stage in STAGES if run.done(stage)]
    try:
        options = shlex.join([*recipe_options(run.recipe), "--run", str(run.path)])
    except SpdError as error:
        return [f"# run.json holds the recipe, which this version cannot spell: {error.message}"]
    if len(finished) == len(STAGES) or not finished:
        return [f"spdtool compress {options}"]
    later = [f"spdtool {stage} --run {shlex.quote(str(run.path))}" for stage in finished[1:]]
    return [f"spdtool teacher {options}", *later]


def _told(recipe: Recipe, name: str) -> bool:
    value = getattr(recipe, name)
    if name == "task":
        return value != "local"
    return name in ALWAYS or value != Recipe.model_fields[name].default


def _flag(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
