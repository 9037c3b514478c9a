"""Choose the shape of a small student that reaches the goal of a recipe.

A table has the time of a layer at every shape (`bench.layer_times`), calibration gives the losses
(`pruning.structure`), and `pruning.search` finds the shape. Then a random encoder of that shape is
timed as a whole against the dense one, because caches make a sum of layers a few percent wrong. The
budget is corrected, and the search repeated.

The shape becomes `prune.shape` of the run's recipe: a run that was killed, or goes on on a busy
machine, keeps it. `goal.json` of the run tells how it was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import console
from spdtool.bench.layer_times import SpeedTrial, measure_layer_times
from spdtool.bench.profiles import TimedInput, check_profile, expected_fields, is_of_this_machine, read_profile
from spdtool.data.batches import evaluation_batches
from spdtool.data.cache import cache_folder
from spdtool.errors import RecipeError
from spdtool.goals.family import place_family
from spdtool.goals.sizes import MEGABYTE, count_bytes
from spdtool.models.layers import max_positions
from spdtool.models.load import build_empty_model, build_empty_teacher, label_names, load_model, load_tokenizer
from spdtool.models.predict import torch_forward
from spdtool.models.structures import find_structures
from spdtool.pruning.search import cost_of_shape, find_shape_within, loss_of_shape, smallest_cost
from spdtool.pruning.structure import (
    EncoderShape,
    LayerLosses,
    full_shape,
    observe_grams,
    possible_widths,
    removal_losses,
)
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import hash_json
from spdtool.run.records import LayerCosts, Ratio, ShapeChoice, ShapeProfile
from spdtool.run.storage import create_folder, write_json
from spdtool.tasks.prepare import find_task, prepare_rows

BATCH_SIZE = 32  # calibration rows of one forward pass
CHOICE = "goal.json"  # in the run folder
TRIALS = 4  # whole encoders that are timed until one is as fast as asked for
# A trial that is faster by more than this has lost more than it had to.
SURPLUS = 0.03
# The next trial aims a little higher: a speed-up of exactly N is missed every second time.
MARGIN = 1.01
LOSS_OF_NOTHING = 0.05  # added to the remaining share in a guessed loss: an empty part costs 20, half of it 0.45


class Budget(NamedTuple):
    """What a shape may cost, and what it costs."""

    costs: LayerCosts
    most: float


@dataclass(frozen=True)
class GoalTables:
    """What the shapes of an encoder cost, as far as the goal of a recipe asks.

    Attributes:
        dense: the shape from which nothing is removed.
        profile: times; None: the goal is no speed-up.
        bytes: of the portable file.
        timed: input at which the speed-up is asked for.
    """

    dense: EncoderShape
    profile: ShapeProfile | None
    bytes: LayerCosts
    timed: TimedInput


def choose_goal_shape(recipe: Recipe, teacher: Path) -> ShapeChoice:
    """Choose the shape of the student that reaches the goal of a recipe.

    Args:
        teacher: folder of the dense teacher's checkpoint.

    Raises:
        RecipeError: no shape reaches the goal, or its profile does not fit.
        ModelError: heads and neurons of this family cannot be removed.
        DataError: the calibration rows cannot be read.
    """
    model = load_model(teacher)
    tables = make_tables(recipe, model)
    check_reachable(recipe, tables)
    with console.busy("computing what the removal of every head and neuron would lose"):
        losses = calibrate_losses(recipe, model, load_tokenizer(teacher))
    choice = search_shape(recipe, model, tables, losses)
    if not recipe.goal.family:
        return choice
    members = place_family(recipe.goal.family, choice, tables.dense, find_structures(model))
    return choice.model_copy(update={"family": members})


def calibrate_losses(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[LayerLosses]:
    """Compute what every number of heads and every width loses in each layer of the teacher, on training rows."""
    task, splits = prepare_rows(recipe, label_names(model))
    sample = splits["train"].sample(recipe.goal.calibration, recipe.seed)
    rows = task.encode(tokenizer, {"train": sample}, recipe)["train"]
    batches = (rows.collate(batch) for batch in evaluation_batches(rows, BATCH_SIZE))
    layers = find_structures(model)
    return removal_losses(layers, observe_grams(layers, torch_forward(model), batches, recipe.prune))


def goal_key(recipe: Recipe) -> str:
    """Hash what a choice depends on, so that another goal gets another one."""
    # Without what is only measured in the end, and without the answer itself.
    return hash_json(recipe.goal.model_dump(mode="json", exclude={"table", "max_drop", "tolerance"}))


def read_choice(folder: Path) -> ShapeChoice | None:
    """Read the choice that a run has recorded; None where there is none that can be read."""
    try:
        return ShapeChoice.model_validate(json.loads((folder / CHOICE).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def make_tables(recipe: Recipe, model: PreTrainedModel, *, measure: bool = True) -> GoalTables:
    """Read or measure the tables that the goal of a recipe needs.

    A table that was measured is kept in the user's cache folder, for the next run on this machine.

    Args:
        model: the dense one, with or without weights.
        measure: without, a table that does not exist yet is None.
    """
    goal, timed = recipe.goal, timed_input(recipe, model)
    profile = None
    if goal.speedup is not None and goal.profile is not None:
        profile = read_profile(Path(goal.profile))
        check_profile(profile, expected_fields(model, timed, given=True), goal.profile)
    elif goal.speedup is not None:
        profile = cached_profile(recipe, model, timed, measure=measure)
    return GoalTables(full_shape(find_structures(model)), profile, count_bytes(model), timed)


def timed_input(recipe: Recipe, model: PreTrainedModel) -> TimedInput:
    """Return the input at which a speed-up is asked for."""
    goal = recipe.goal
    length = goal.length or recipe.max_length
    return TimedInput(goal.batch, min(length, max_positions(model) or length), goal.threads, goal.runtime)


def cached_profile(recipe: Recipe, model: PreTrainedModel, timed: TimedInput, *, measure: bool) -> ShapeProfile | None:
    """Return the table of this machine, runtime and model from the cache, or measure it."""
    expected = expected_fields(model, timed)
    # By a hash of machine, runtime and model: another one gets a table of its own.
    file = cache_folder() / "profiles" / f"{hash_json(expected)}.json"
    if file.is_file():
        try:
            return read_profile(file)
        except RecipeError:  # of an older version
            file.unlink()
    if not measure:
        return None
    profile = measure_layer_times(model.config, timed, rounds=recipe.bench.rounds, seconds=recipe.bench.seconds)
    create_folder(file.parent)
    write_json(file, profile)
    return profile


def write_profile(recipe: Recipe, source: str, file: Path) -> ShapeProfile:
    """Time a layer of an encoder at every shape, and write the table to a file; return it.

    Args:
        recipe: its goal has the runtime, batch, length and threads.
        source: folder or hub name of the encoder.

    Raises:
        DeviceError: the runtime cannot be timed here.
        ModelError: the encoder cannot be read or exported.
    """
    model = build_empty_model(source, smoke=recipe.smoke)
    timed = timed_input(recipe, model)
    profile = measure_layer_times(model.config, timed, rounds=recipe.bench.rounds, seconds=recipe.bench.seconds)
    create_folder(file.absolute().parent)
    write_json(file, profile)
    return profile


def list_budgets(recipe: Recipe, tables: GoalTables, *, factor: float = 1.0) -> list[Budget]:
    """List the budgets of a goal: milliseconds, bytes, or both.

    Args:
        factor: by which the speed-up in the table must be larger than the one that is asked for.
    """
    goal, budgets = recipe.goal, []
    if goal.speedup is not None and tables.profile is not None:
        costs = tables.profile.costs
        budgets.append(Budget(costs, costs.of_dense(len(tables.dense)) / (goal.speedup * factor)))
    if goal.max_mb is not None:
        budgets.append(Budget(tables.bytes, goal.max_mb * MEGABYTE))
    return budgets


def check_reachable(recipe: Recipe, tables: GoalTables) -> None:
    """Refuse a goal that even the smallest shape misses.

    A smoke run goes on: the times of its small random model mean nothing.

    Raises:
        RecipeError: says what the smallest shape reaches.
    """
    losses = even_losses(tables.dense)
    for costs, most in list_budgets(recipe, tables):
        smallest = smallest_cost(losses, costs)
        if smallest <= most or recipe.smoke:
            continue
        if costs is tables.bytes:
            raise RecipeError(
                f"{recipe.goal.max_mb:g} MB were asked for; the smallest shape of this encoder has "
                f"{smallest / MEGABYTE:.1f} MB, of which the embeddings are the most",
                f"ask for --max-mb {smallest / MEGABYTE + 0.05:.1f} or more, or start from a smaller --model",
            )
        raise too_fast(recipe, tables, costs.of_dense(len(tables.dense)) / smallest)


def largest_speedup(recipe: Recipe) -> float:
    """Return the largest speed-up in the table of the recipe's encoder; its goal asks for any speed-up."""
    model = build_empty_teacher(recipe, find_task(recipe))
    tables = make_tables(recipe, model)
    assert tables.profile is not None
    costs = tables.profile.costs
    return costs.of_dense(len(tables.dense)) / smallest_cost(even_losses(tables.dense), costs)


def too_fast(recipe: Recipe, tables: GoalTables, largest: float) -> RecipeError:
    """Make the error of a speed-up that no shape reaches, with the largest that one does."""
    goal = recipe.goal
    where = f"batch {goal.batch}, length {tables.timed.length}, {goal.threads or 'all'} threads in {goal.runtime}"
    return RecipeError(
        f"a speed-up of {goal.speedup:g} was asked for; without any head and neuron this encoder is {largest:.2f} "
        f"times as fast ({where})",
        f"ask for --speedup {largest * 0.98:.2g} or less" if largest > 1.05 else "give a larger --model",
    )


def search_shape(
    recipe: Recipe, model: PreTrainedModel, tables: GoalTables, losses: Sequence[LayerLosses]
) -> ShapeChoice:
    """Search the shape of least loss that reaches the goal, and time it where the runtime is at hand.

    Raises:
        RecipeError: no shape reaches the goal.
    """
    goal = recipe.goal
    # What another machine takes, only its table says.
    if goal.speedup is None or tables.profile is None or not is_of_this_machine(tables.profile):
        return record_choice(recipe, tables, find_by_tables(recipe, tables, losses), None)
    tried: dict[EncoderShape, Ratio] = {}
    factor, rounds, seconds = 1.0, recipe.bench.rounds, recipe.bench.seconds
    with (
        console.busy("timing random encoders of the shapes that were found"),
        SpeedTrial(model.config, len(tables.dense), tables.timed, rounds=rounds, seconds=seconds) as trial,
    ):
        for _ in range(TRIALS):
            shape = find_by_tables(recipe, tables, losses, factor=factor)
            if shape in tried:  # widths come in steps: a slightly smaller budget may give the same shape
                break
            tried[shape] = ratio = trial.measure(shape)
            if goal.speedup <= ratio.median <= goal.speedup * (1 + SURPLUS):
                break
            # As much as the trial missed by: the times of a whole encoder are nearly proportional.
            factor *= goal.speedup * MARGIN / ratio.median
    # The last trial need not be the best: the search stops where a shape comes again.
    best = pick_trial(tried, losses, goal.speedup)
    if tried[best].high < goal.speedup * (1 - goal.tolerance) and not recipe.smoke:
        raise too_fast(recipe, tables, tried[best].median)
    return record_choice(recipe, tables, best, tried[best])


def find_by_tables(
    recipe: Recipe, tables: GoalTables, losses: Sequence[LayerLosses], *, factor: float = 1.0
) -> EncoderShape:
    """Find the shape of least loss within the budgets of a goal; `factor` as of `list_budgets`."""
    return find_within_budgets(list_budgets(recipe, tables, factor=factor), losses)


def find_within_budgets(budgets: Sequence[Budget], losses: Sequence[LayerLosses]) -> EncoderShape:
    """Find the shape of least loss within every budget; a budget below the smallest shape asks for that shape."""
    # A trial that was too slow may ask for less than there is.
    limits = [max(budget.most, smallest_cost(losses, budget.costs)) for budget in budgets]
    return find_shape_within(losses, [budget.costs for budget in budgets], limits)


def pick_trial(tried: dict[EncoderShape, Ratio], losses: Sequence[LayerLosses], speedup: float) -> EncoderShape:
    """Pick the shape that loses the least of those that were fast enough, else the fastest."""
    fast = [shape for shape, ratio in tried.items() if ratio.median >= speedup]
    if fast:
        return min(fast, key=lambda shape: loss_of_shape(shape, losses))
    # None was fast enough: the tolerance of the goal decides whether this one passes.
    return max(tried, key=lambda shape: tried[shape].median)


def record_choice(recipe: Recipe, tables: GoalTables, shape: EncoderShape, trial: Ratio | None) -> ShapeChoice:
    """Make the record of a choice."""
    profile, expected = tables.profile, None
    table = hash_json(tables.bytes.model_dump(mode="json")) if profile is None else profile.digest
    if profile is not None:
        expected = profile.costs.of_dense(len(shape)) / cost_of_shape(shape, profile.costs)
    return ShapeChoice(
        key=goal_key(recipe),
        goal=recipe.goal.describe(),
        shape=[(layer.heads, layer.neurons) for layer in shape],
        dense=(tables.dense[0].heads, tables.dense[0].neurons),
        table=table,
        profile=profile,
        expected=expected,
        trial=trial,
        bytes=round(cost_of_shape(shape, tables.bytes)),
    )


def even_losses(dense: EncoderShape) -> list[LayerLosses]:
    """Losses before anything was calibrated: the same in every layer, and steeper the fewer structures remain."""
    losses = []
    for layer in dense:
        heads = [_guess_loss(count / layer.heads) for count in range(layer.heads + 1)]
        widths = possible_widths(layer.neurons)
        losses.append(LayerLosses(heads, {width: _guess_loss(width / layer.neurons) for width in widths}))
    return losses


def _guess_loss(remaining: float) -> float:
    """Guess the loss of a layer whose share `remaining` of heads or neurons stays."""
    # Measured losses jump where nothing stays. A guess that did not would empty one part of all layers.
    return (1 - remaining) ** 2 / (remaining + LOSS_OF_NOTHING)


def foresee_shape(recipe: Recipe, model: PreTrainedModel, *, measure: bool) -> ShapeChoice:
    """Guess the shape for the plan, with the same losses in every layer.

    Args:
        model: the dense one, with or without weights.
        measure: time the layers, where no table exists; without, times are guessed from the number of weights.

    Raises:
        RecipeError: no shape reaches the goal, or its profile does not fit.
    """
    tables = make_tables(recipe, model, measure=measure)
    check_reachable(recipe, tables)
    losses, budgets = even_losses(tables.dense), list_budgets(recipe, tables)
    if recipe.goal.speedup is not None and tables.profile is None:
        weights = tables.bytes.model_copy(update={"outside": 0.0})
        budgets.append(Budget(weights, weights.of_dense(len(tables.dense)) / recipe.goal.speedup))
    return record_choice(recipe, tables, find_within_budgets(budgets, losses), None)
