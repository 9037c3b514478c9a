"""Search the fastest student that loses no more than a goal allows: by bisection, each with the same teacher.

RUN/teacher/            one teacher
RUN/goals/<goal>/       a run for each speed-up, or sparsity, that was tried; the last that held is finished
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool import console
from spdtool.errors import GateError, RecipeError
from spdtool.goals.promise import ROUNDING, count_points_lost
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run.fingerprint import hash_json

if TYPE_CHECKING:
    from spdtool.stages.api import CompressionResult

FOLDER = "goals"
# Thirteen: a bisection trains four students at most.
SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0)

CompressOne = Callable[[Recipe, Path, str], "CompressionResult"]
"""Runs a recipe in a folder until a stage."""


def compress_fastest(recipe: Recipe, path: Path, until: str, compress_one: CompressOne) -> CompressionResult:
    """Train a teacher, then students until the fastest is found whose dev score falls by no more than the goal allows.

    Of n speed-ups about log2(n) are tried: a slower student is taken to lose no more than a faster one.

    Args:
        path: run folder of the teacher.
        until: last stage of the student that is found.

    Raises:
        GateError: every student that was tried loses more.
        SpdError: as `compress` does.
    """
    goal = recipe.goal
    assert goal.max_drop is not None
    compress_one(recipe, path, "teacher")
    candidates = list_candidates(recipe)
    drops: dict[float, float] = {}
    low, high = 0, len(candidates)  # those before `low` hold, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        chosen = candidates[middle]
        drop = measure_drop(recipe, path, chosen, compress_one)
        if drop is not None:
            drops[chosen] = drop
            console.say(f"goal: {describe_candidate(recipe, chosen)}: {drop:.2f} points of dev score lost")
        if drop is not None and drop <= goal.max_drop + ROUNDING:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        tried = ", ".join(f"{describe_candidate(recipe, each)} loses {drop:.2f}" for each, drop in drops.items())
        raise GateError(
            f"at most {goal.max_drop:g} points of dev score were to be lost, and no student keeps that: {tried}",
            "allow more: --max-drop, or train longer: --set prune.epochs=... --set finetune.epochs=...",
        )
    # Trained by the bisection already: its stages up to finetune are skipped.
    best = candidates[low - 1]
    return compress_one(candidate_recipe(recipe, path, best), candidate_folder(recipe, path, best), until)


def measure_drop(recipe: Recipe, path: Path, candidate: float, compress_one: CompressOne) -> float | None:
    """Train the student of a candidate; return the points of dev score that it loses, or None: no shape is so fast."""
    try:
        result = compress_one(
            candidate_recipe(recipe, path, candidate), candidate_folder(recipe, path, candidate), "finetune"
        )
    except RecipeError as error:
        # No shape is so fast: a slower one is tried, as if this one had lost too much.
        console.warn(f"{describe_candidate(recipe, candidate)}: {error.message}")
        return None
    assert result.teacher is not None
    assert result.student is not None
    return count_points_lost(result.teacher, result.student)


def list_candidates(recipe: Recipe) -> list[float]:
    """List what is tried, the slowest first: speed-ups up to the largest that there is, or sparsities."""
    if recipe.goal.has_full_width:
        from spdtool.goals.zeros import SPARSITIES

        return list(SPARSITIES)
    from spdtool.goals.shape import largest_speedup

    largest = largest_speedup(override(recipe, (), {"goal.speedup": SPEEDUPS[0]}))
    candidates = [speedup for speedup in SPEEDUPS if speedup <= largest]
    if not candidates:
        raise RecipeError(
            f"without any head and neuron this encoder is {largest:.2f} times as fast; {SPEEDUPS[0]:g} is the least",
            "give a larger --model",
        )
    return candidates


def candidate_recipe(recipe: Recipe, path: Path, candidate: float) -> Recipe:
    """Return the recipe of one candidate, with the teacher of the search."""
    flags: dict[str, object] = {"given_teacher": str((path / "teacher").absolute())}
    if recipe.goal.has_full_width:
        # A digest in place of a table's says that the sparsity is chosen.
        flags |= {"sparsity": candidate, "goal.table": hash_json("searched")}
    else:
        flags |= {"goal.speedup": candidate}
    return override(recipe, (), flags)


def candidate_folder(recipe: Recipe, path: Path, candidate: float) -> Path:
    """Return the run folder of one candidate."""
    name = f"{candidate:g}" if recipe.goal.has_full_width else f"{candidate:g}x"
    return path / FOLDER / name


def describe_candidate(recipe: Recipe, candidate: float) -> str:
    """Name a candidate."""
    return f"{candidate:.0%} zeros" if recipe.goal.has_full_width else f"{candidate:g}x"
