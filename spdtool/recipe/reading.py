"""Read a recipe: find it by name, apply flags and `--set`, describe its fields."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spdtool.errors import RecipeError, UnknownName
from spdtool.recipe.fields import SEE_FIELDS, Recipe, Section, flat


def resolve(name: str = "default", flags: dict[str, Any] | None = None, sets: Iterable[str] = ()) -> Recipe:
    """What the task says, under the recipe called `name` (or the TOML file at that path), the flags, the `--set`s.

    A task may have a file of its own, `recipes/task/<task>.toml`: what every recipe starts from on it, such as the
    learning rate that suits its small model.

    Args:
        flags: dotted field names to values; None values are ignored.
        sets: assignments such as `prune.epochs=3`; values are read as TOML, else as plain text.

    Raises:
        UnknownName: no such recipe or field.
        RecipeError: a value of the wrong type or out of range.
    """
    method = _read(name)
    tree = _read_task((flags or {}).get("task") or method.get("task", ""))
    _overlay(tree, method | {"name": Path(name).stem})
    for dotted, value in (flags or {}).items():
        if value is not None:
            _assign(tree, dotted, value)
    for assignment in sets:
        _assign(tree, *_split(assignment))
    recipe = parse(tree)
    return smoke(recipe) if recipe.smoke else recipe


def parse(tree: dict[str, Any]) -> Recipe:
    """A recipe from nested dicts; raises as `resolve` does."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        dotted = ".".join(str(part) for part in problem["loc"])
        if not problem["loc"]:
            raise RecipeError(str(problem["ctx"]["error"]), SEE_FIELDS) from None
        if problem["type"] == "extra_forbidden":
            raise _unknown_field(dotted) from None
        if problem["type"] == "model_type":
            inside = [key for key, _ in fields() if key.startswith(f"{dotted}.")]
            raise RecipeError(
                f"{dotted} = {problem['input']!r}: {dotted} is a section, not a field",
                f"its fields are {', '.join(inside)}",
            ) from None
        raise RecipeError(f"{dotted} = {problem['input']!r}: {problem['msg'].lower()}", _help_for(dotted)) from None


def amend(recipe: Recipe, sets: Iterable[str]) -> Recipe:
    """`recipe` with further `--set` assignments; raises as `resolve` does."""
    tree = recipe.model_dump()
    for assignment in sets:
        _assign(tree, *_split(assignment))
    return parse(tree)


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe cut down to a few steps, with the mark that keeps it from being taken for a result."""
    tree = recipe.model_dump() | {"smoke": True, "max_rows": min(recipe.max_rows or 64, 64)}
    tree["max_length"] = min(recipe.max_length, 32)
    for stage in ("teacher", "prune", "distill", "finetune"):
        tree[stage] = tree[stage] | {"epochs": 1, "max_steps": 4, "batch_size": 8}
        if "loss" in tree[stage] and not isinstance(tree[stage]["loss"]["layer_map"], str):  # a list for another depth
            tree[stage]["loss"] = tree[stage]["loss"] | {"layer_map": "uniform"}
    tree["prune"] = tree["prune"] | {"events": 2}
    tree["export"] = tree["export"] | {"sentences": 4}
    tree["bench"] = tree["bench"] | {"batches": (1,), "lengths": (16,), "padded": (), "rounds": 2, "threads": (1,)}
    tree["bench"] |= dict.fromkeys(("unfused", "int8", "variants", "compiled", "ledger"), False)
    return parse(tree)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.name[:-5] for file in files("spdtool.recipe").iterdir() if file.name.endswith(".toml"))


def about(name: str) -> str:
    """The first comment line of a packaged recipe."""
    text = files("spdtool.recipe").joinpath(f"{name}.toml").read_text("utf-8")
    return text.split("\n", 1)[0].lstrip("# ")


def fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`(dotted name, help)` of every field that `--set` reaches."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description or ""


def load(file: Path) -> Recipe:
    """The recipe that `run.json` holds."""
    return parse(json.loads(file.read_text("utf-8"))["recipe"])


def _read(name: str) -> dict[str, Any]:
    if name in names():
        return tomllib.loads(files("spdtool.recipe").joinpath(f"{name}.toml").read_text("utf-8"))
    path = Path(name)
    if not path.is_file():
        raise UnknownName("recipe", name, names(), "or give the path of a TOML file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def _read_task(task: str) -> dict[str, Any]:
    file = files("spdtool.recipe").joinpath("task", f"{task}.toml")
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}


def _overlay(tree: dict[str, Any], top: dict[str, Any]) -> None:
    for key, value in top.items():
        if isinstance(value, dict):
            _overlay(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise _unknown_field(dotted)
        tree = inner
    tree[last] = value


def _unknown_field(dotted: str) -> UnknownName:
    return UnknownName("recipe field", dotted, [key for key, _ in fields()], SEE_FIELDS)


def _split(assignment: str) -> tuple[str, Any]:
    dotted, equals, text = assignment.partition("=")
    if not equals:
        raise RecipeError(f"--set {assignment!r} is not of the form field=value", "for example --set prune.epochs=3")
    return dotted.strip(), _value(text.strip())


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _help_for(dotted: str) -> str | None:
    name, text = next(((name, text) for name, text in fields() if f"{dotted}.".startswith(f"{name}.")), (None, None))
    if name is None:
        return None
    usual = dict(flat(Recipe().model_dump(mode="json")))[name]
    return f"{name}: {text}" + (f"; for example --set {name}='{json.dumps(usual)}'" if isinstance(usual, list) else "")
