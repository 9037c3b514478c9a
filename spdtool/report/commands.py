"""The commands that make a run again, from its recipe: flags where there are some, `--set` for every other field."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from spdtool.errors import SpdError
from spdtool.recipe import STAGES, reading
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
ALWAYS = ("task", "sparsity", "seed")  # a reader looks for these, even where they are the default


def commands_of(run: Run) -> list[str]:
    """Return what to type to make the run again, after that of its teacher's run, as far as both are finished."""
    commands: list[str] = []
    given = run.recipe.given_teacher
    if given:
        teacher_run = Path(given)
        if run.done("teacher"):
            teacher_run = teacher_folder(run).parent
        if (teacher_run / "run.json").is_file():
            commands += _stage_commands(Run.open(teacher_run))
    return commands + _stage_commands(run)


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
            text = "none"  # TOML has no null
            if value is not None:
                text = json.dumps(value)
            options += ["--set", f"{field}={text}"]
    return options


def _stage_commands(run: Run) -> list[str]:
    """Return `compress` for a run with every stage, else a command for each stage that it has."""
    finished = [stage for stage in STAGES if run.done(stage)]
    try:
        options = shlex.join([*recipe_options(run.recipe), "--run", str(run.path)])
    except SpdError as error:
        return [f"# run.json holds the recipe, which this version cannot spell: {error.message}"]
    if len(finished) == len(STAGES) or not finished:
        return [f"spdtool compress {options}"]
    further = [f"spdtool {stage} --run {shlex.quote(str(run.path))}" for stage in finished[1:]]
    return [f"spdtool teacher {options}", *further]
