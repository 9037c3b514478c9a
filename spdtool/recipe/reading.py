"""Read a recipe: find it by name, apply flags and `--set`, shrink it for a smoke run, describe its fields."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spdtool.errors import RecipeError, UnknownName
from spdtool.recipe import TRAINING
from spdtool.recipe.fields import FIELDS_HINT, Recipe
from spdtool.recipe.section import Section

Settings = dict[str, Any]  # nested as in TOML

# Few steps, but each kind of step: a prune event, an evaluation, a timed round.
SMOKE_TRAINING: Settings = {"epochs": 1, "max_steps": 4, "batch_size": 8}
SMOKE_EXPORT: Settings = {"sentences": 4}
SMOKE_BENCH: Settings = {
    "batches": (1,),
    "lengths": (16,),
    "padded": (),
    "rounds": 2,
    "threads": (1,),
    "unfused": False,
    "int8": False,
    "variants": False,
    "compiled": False,
    "ledger": False,
}


def build_recipe(name: str = "default", flags: Mapping[str, object] | None = None, sets: Iterable[str] = ()) -> Recipe:
    """Build a recipe from four layers, the later one wins: the task's file, the recipe's, flags, sets.

    A task may have a file of its own, `recipe/task/<task>.toml`: the learning rate that suits its
    small model.

    Args:
        name: a packaged recipe, or the path of a TOML file.
        flags: dotted field names to values; None values are ignored.
        sets: assignments such as `prune.epochs=3`; values are read as TOML, else as plain text.

    Returns:
        The frozen recipe; a smoke run's is cut down to a few steps.

    Raises:
        UnknownName: no such recipe or field.
        RecipeError: a value of the wrong type or out of range.
    """
    flags = flags or {}
    method = read_settings(name)
    tree = read_task_settings(str(flags.get("task") or method.get("task", "")))
    _overlay(tree, method | {"name": Path(name).stem})
    for dotted, value in flags.items():
        # None: the flag was not given, and may not override the recipe's file.
        if value is not None:
            _assign(tree, dotted, value)
    for assignment in sets:
        _assign(tree, *_split(assignment))
    _add_block_defaults(tree)
    recipe = parse_recipe(tree)
    return make_smoke(recipe) if recipe.smoke else recipe


def _add_block_defaults(tree: Settings) -> None:
    """Ask for zeros in blocks and int8 training where a student of blocks is asked for, and nothing else was said."""
    goal = tree.get("goal")
    if isinstance(goal, dict) and goal.get("kind") == "blocks":
        for section, field, value in (("prune", "pattern", "1x4"), ("finetune", "quantize", "int8")):
            settings = tree.setdefault(section, {})
            if isinstance(settings, dict):
                settings.setdefault(field, value)


def request_recipe(
    task: str | None = None,
    *,
    recipe: str | None = None,
    sparsity: float | None = None,
    goal: Mapping[str, object] | None = None,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    text: Iterable[str] = (),
    label: str | None = None,
    test_share: float | None = None,
    unlabeled: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    metric: str | None = None,
    sets: Iterable[str] = (),
    smoke: bool = False,
    recorded: Recipe | None = None,
) -> Recipe:
    """Build the recipe of a request, as `spdtool compress` and `spdtool.compress` make it.

    Args:
        task: name of a task; None: the rows of `data`.
        recipe: a packaged recipe, or the path of a TOML file; None: `default`.
        sparsity: share of zeros among the weights of the encoder's matrices, in [0, 1).
        goal: fields of the section `goal`, such as `speedup`; None values are ignored.
        model: encoder to fine-tune, a folder or a hub name.
        teacher: fine-tuned model to use as it is, a folder or a hub name.
        data: file or folder to read instead of the hub.
        text: text columns of `data`, one or two; empty: guessed.
        label: label column of `data`; None: guessed.
        test_share: of the training rows, to be scored once at the end.
        unlabeled: file of texts that the teacher labels for the student.
        seed, device, metric: as the fields of the recipe with these names; None: unchanged.
        sets: assignments such as `prune.epochs=3`, which win over all others.
        smoke: cut the recipe down to a few steps.
        recorded: recipe of a run that exists; without task and data, what else is given changes it.

    Raises:
        RecipeError: neither a task nor data was given, or as `build_recipe` does.
    """
    flags: dict[str, object] = {
        "task": None if task is None else task.lower(),
        "data": _absolute(data),
        "text": tuple(text) or None,
        "label": label,
        "test_share": test_share,
        "unlabeled": _absolute(unlabeled),
        "model": _absolute(model),
        "given_teacher": _absolute(teacher),
        "sparsity": sparsity,
        "seed": seed,
        "device": device,
        "metric": metric,
        "smoke": smoke or None,
    }
    goal = {name: value for name, value in (goal or {}).items() if value is not None}
    if sparsity is not None and goal.keys() & {"speedup", "max_mb", "max_drop"}:
        raise RecipeError("a sparsity and a goal were given: a goal chooses what is removed", "leave one of them out")
    if "profile" in goal:
        goal["profile"] = _absolute(str(goal["profile"]))
    flags |= {f"goal.{name}": value for name, value in goal.items()}
    if task is None and data is None:
        if recorded is None:
            raise RecipeError("neither a task nor data was given", "name a task, such as demo, or a file of rows")
        if recipe is not None:
            raise RecipeError(
                f"the run has its recipe, and --recipe {recipe} names another",
                "leave it out to go on with that of the run, or name the task too and give another --run",
            )
        changed = override(recorded, sets, flags)
        return make_smoke(changed) if smoke and not recorded.smoke else changed
    flags["task"] = flags["task"] or "local"
    built = build_recipe(recipe or "default", flags, sets)
    return built.model_copy(update={"student": _absolute(built.student)})


def parse_recipe(tree: Settings) -> Recipe:
    """Validate nested dicts as a recipe; raises as `build_recipe` does."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # One at a time: a list of problems hides the one to mend first.
        problem = error.errors()[0]
        dotted = ".".join(map(str, problem["loc"]))
        value, kind = problem["input"], problem["type"]
        # No field: a validator of the whole recipe, or of a section, has refused a combination.
        if kind == "value_error" and isinstance(value, dict | Recipe):
            raise RecipeError(str(problem["ctx"]["error"]), FIELDS_HINT) from None
        if kind == "extra_forbidden":
            raise _unknown_field(dotted) from None
        if kind == "model_type":
            inner = [name for name, _ in list_fields() if name.startswith(f"{dotted}.")]
            message = f"{dotted} = {value!r}: {dotted} is a section, not a field"
            raise RecipeError(message, f"its fields are {', '.join(inner)}") from None
        message = f"{dotted} = {value!r}: {problem['msg'].lower()}"
        raise RecipeError(message, _field_hint(dotted)) from None


def override(recipe: Recipe, sets: Iterable[str], flags: Mapping[str, object] | None = None) -> Recipe:
    """Return `recipe` with further flags and `--set` assignments; arguments and errors are those of `build_recipe`."""
    tree = recipe.model_dump()
    for dotted, value in (flags or {}).items():
        if value is not None:
            _assign(tree, dotted, value)
    for assignment in sets:
        _assign(tree, *_split(assignment))
    return parse_recipe(tree)


def make_smoke(recipe: Recipe) -> Recipe:
    """Cut `recipe` down to a few steps, marked so that nobody takes its numbers for a result."""
    tree = recipe.model_dump() | {"smoke": True, "max_rows": min(recipe.max_rows or 64, 64)}
    tree["max_length"] = min(recipe.max_length, 64)  # a question of 40 tokens leaves room for its context
    for stage in TRAINING:
        tree[stage] |= SMOKE_TRAINING
        # A list names layers of the real model; the random one has two.
        if "loss" in tree[stage] and not isinstance(tree[stage]["loss"]["layer_map"], str):
            tree[stage]["loss"]["layer_map"] = "uniform"
    tree["prune"]["events"] = 2
    tree["export"] |= SMOKE_EXPORT
    tree["bench"] |= SMOKE_BENCH
    return parse_recipe(tree)


def recipe_names() -> list[str]:
    """Name the recipes that come with the package."""
    names = [file.name for file in files("spdtool.recipe").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def describe_recipe(name: str) -> str:
    """Return the first comment line of a packaged recipe."""
    text = files("spdtool.recipe").joinpath(f"{name}.toml").read_text("utf-8")
    return text.split("\n", 1)[0].lstrip("# ")


def list_fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield `(dotted name, help)` of every field that `--set` reaches."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from list_fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description or ""


def load_recipe(file: Path) -> Recipe:
    """Load the recipe that a `run.json` holds."""
    return parse_recipe(json.loads(file.read_text("utf-8"))["recipe"])


def read_settings(name: str) -> Settings:
    """Read the TOML of a packaged recipe, or of the file at that path; raises as `build_recipe` does."""
    if name in recipe_names():
        return tomllib.loads(files("spdtool.recipe").joinpath(f"{name}.toml").read_text("utf-8"))
    path = Path(name)
    if not path.is_file():
        raise UnknownName("recipe", name, recipe_names(), "or give the path of a TOML file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def read_task_settings(task: str) -> Settings:
    """Read the settings that lie under every recipe on `task`; most tasks have none."""
    file = files("spdtool.recipe").joinpath("task", f"{task}.toml")
    if not file.is_file():
        return {}
    return tomllib.loads(file.read_text("utf-8"))


def parse_value(text: str) -> object:
    """Read the value of a `--set` as TOML, or else as plain text; `none` is None."""
    # TOML has no null.
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _absolute(path: str | Path | None) -> str | None:
    """Make an existing path absolute, so that a run can go on from another folder; keep a hub name."""
    if path is None:
        return None
    if os.path.exists(path):
        return os.path.abspath(path)
    return str(path)


def _overlay(tree: Settings, top: Settings) -> None:
    for key, value in top.items():
        if isinstance(value, dict):
            _overlay(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _assign(tree: Settings, dotted: str, value: object) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise _unknown_field(dotted)
        tree = inner
    tree[field] = value


def _split(assignment: str) -> tuple[str, object]:
    dotted, equals, text = assignment.partition("=")
    if not equals:
        message = f"--set {assignment!r} is not of the form field=value"
        raise RecipeError(message, "for example --set prune.epochs=3")
    return dotted.strip(), parse_value(text.strip())


def _unknown_field(dotted: str) -> UnknownName:
    return UnknownName("recipe field", dotted, [name for name, _ in list_fields()], FIELDS_HINT)


def _field_hint(dotted: str) -> str | None:
    """Return the help of the field that `dotted` names, with an example where its value is a list."""
    for name, text in list_fields():
        # An item of a list has the index as a further word: bench.padded.0.
        if f"{dotted}.".startswith(f"{name}."):
            default = Recipe().values()[name]
            if isinstance(default, list):
                return f"{name}: {text}; for example --set {name}='{json.dumps(default)}'"
            return f"{name}: {text}"
    return None
