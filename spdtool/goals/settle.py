"""Derive what a recipe leaves to its goal, and put it into the recipe of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spdtool import console, ranks
from spdtool.bench.profiles import is_of_this_machine
from spdtool.errors import RecipeError
from spdtool.goals.shape import CHOICE, choose_goal_shape, foresee_shape, goal_key, read_choice
from spdtool.goals.zeros import choose_sparsity
from spdtool.models import collectives
from spdtool.models.load import build_empty_teacher
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run.fingerprint import hash_json
from spdtool.run.folder import Run
from spdtool.run.records import FamilyMember
from spdtool.run.storage import create_folder, write_json
from spdtool.tasks.prepare import find_task
from spdtool.training.accelerator import create_accelerator


def needs_shape(recipe: Recipe, folder: Path) -> bool:
    """Tell whether the shape of a goal has yet to be chosen.

    Args:
        folder: of the run.
    """
    if not recipe.goal.is_set or recipe.goal.has_full_width or recipe.goal.searches:
        return False
    choice = read_choice(folder)
    if choice is not None and choice.key != goal_key(recipe):  # of another goal
        return True
    return not recipe.prune.shape


def settle_goal(run: Run) -> None:
    """Choose the shape of the student after the teacher was trained, unless that is done. Collective.

    The shape becomes `prune.shape` of the run's recipe. Raises as `choose_goal_shape`.
    """
    if run.recipe.goal.searches:
        raise RecipeError(
            f"{run.path} has the teacher of a search by --max-drop; its students lie in {run.path}/goals",
            f"go on with `spdtool compress --run {run.path}`",
        )
    if not needs_shape(run.recipe, run.path):
        return
    create_accelerator(run.recipe)  # of several ranks the others wait
    if ranks.is_main():
        choice = choose_goal_shape(run.recipe, run.use_input("teacher"))
        write_json(run.path / CHOICE, choice)
        # In the recipe, so that a later call goes on with it whatever the machine measures then.
        run.change_recipe(put_shape(run.recipe, choice.shape, choice.table, choice.family))
        expected = "" if choice.trial is None else f"; timed with random weights: {choice.trial}"
        console.say(f"goal: {choice.goal}: {choice.describe()}{expected}")
        for member in choice.family:
            console.say(f"on the way, {member.describe()}")
    collectives.barrier()
    run.recipe = Run.open(run.path).recipe  # all ranks read what the main one has written


def put_shape(
    recipe: Recipe, shape: list[tuple[int, int]], table: str | None, family: Sequence[FamilyMember] = ()
) -> Recipe:
    """Return the recipe with a shape, and the digest of the table by which it was chosen.

    Args:
        family: students on the way, which are saved too.
    """
    fields: dict[str, object] = {"prune.shape": shape, "goal.table": table}
    if family:
        fields["prune.save_at"] = sorted({*recipe.prune.save_at, *(member.sparsity for member in family)})
    return override(recipe, (), fields)


def adopt_recorded(recipe: Recipe, recorded: Recipe | None) -> Recipe:
    """Return the recipe with what a run has chosen for the same goal: the same command goes on with it.

    Args:
        recorded: recipe of the run; None: there is none yet.
    """
    if recorded is None or not recipe.goal.is_set or recorded.goal.table is None or recipe.goal.table is not None:
        return recipe
    if goal_key(recorded) != goal_key(recipe):
        return recipe
    if recipe.goal.has_full_width:
        return override(recipe, (), {"sparsity": recorded.sparsity, "goal.table": recorded.goal.table})
    fields: dict[str, object] = {"prune.shape": list(recorded.prune.shape), "goal.table": recorded.goal.table}
    if recipe.goal.family:  # these sparsities were chosen, too
        fields["prune.save_at"] = list(recorded.prune.save_at)
    return override(recipe, (), fields)


def settle_sparsity(recipe: Recipe, folder: Path) -> Recipe:
    """Choose the sparsity of a sparse student that a speed-up asks for, and record it in the run.

    Args:
        folder: of the run.

    Raises:
        SpdError: as `choose_sparsity`.
    """
    goal = recipe.goal
    if not goal.has_full_width or goal.speedup is None or goal.table is not None:
        return recipe
    sparsity, ratio = choose_sparsity(recipe)
    chosen = f"{sparsity:.0%} zeros in pattern {recipe.prune.pattern}"
    console.say(f"goal: {goal.describe()}: {chosen}; timed with random weights: {ratio}")
    digest = hash_json([sparsity, ratio.model_dump(mode="json")])
    settled = override(recipe, (), {"sparsity": sparsity, "goal.table": digest})
    # Now, so that every rank and a later call go on with it.
    create_folder(folder)
    Run.for_recipe(folder, settled).change_recipe(settled)
    return settled


def foresee_recipe(recipe: Recipe, folder: Path, guess: str, *, measure: bool) -> tuple[Recipe, list[str]]:
    """Return the recipe to plan with, whose shape is a guess where it is yet to be chosen, and lines for the plan.

    Args:
        folder: of the run.
        guess: to put in place of the digest of a table.
        measure: time the layers now, where no table exists.

    Raises:
        RecipeError: no shape reaches the goal, or its profile does not fit.
        ModelError: the model cannot be read, or heads and neurons of its family cannot be removed.
    """
    goal = recipe.goal
    lines: list[str] = []
    if goal.searches:
        return recipe, ["students of several sizes are tried, by bisection, each with this teacher"]
    if goal.has_full_width:
        pattern = "" if recipe.prune.pattern == "unstructured" else f" in blocks of {recipe.prune.pattern}"
        chosen = f"a sparse student of {recipe.sparsity:.0%} zeros{pattern}"
        return recipe, [
            chosen if goal.table else "a sparse student, whose sparsity is chosen by timing random encoders"
        ]
    if not needs_shape(recipe, folder):
        choice = read_choice(folder)
        return recipe, lines if choice is None else [*lines, choice.describe()]
    if goal.kind == "auto":
        lines.append("a small student: it is faster in every runtime")
    model = build_empty_teacher(recipe, find_task(recipe))
    foreseen = foresee_shape(recipe, model, measure=measure)
    # A plan must not claim a measurement that nobody has made.
    times = "as its table of times says" if foreseen.profile else "guessed from the number of weights"
    lines.append(f"about {foreseen.describe()}, {times}; chosen when the teacher is there")
    if goal.profile is not None and foreseen.profile is not None and not is_of_this_machine(foreseen.profile):
        lines.append(f"the times in {goal.profile} are of {foreseen.profile.machine}, not of this machine")
    return put_shape(recipe, foreseen.shape, guess), lines
