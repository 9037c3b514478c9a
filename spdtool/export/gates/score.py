"""The gate on the dev score: a file scores what its checkpoint scores, within the recipe's budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spdtool.data.tokens import Encoded
from spdtool.errors import GateError
from spdtool.export.gates.folder import open_classifier, opens_by_load, predict_from_texts
from spdtool.export.gates.reference import DevLogits, Reference
from spdtool.export.target import Target
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Scores, describe_prediction_change
from spdtool.tasks.task import Task


@dataclass(frozen=True)
class DevComparison:
    """An exported file and its checkpoint on the dev sets.

    Attributes:
        flipped: predictions that differ, among `rows`.
        largest_change: of a logit.
        worsened: predictions that were right and are wrong now; for regression, all that changed.
        number_change: `mean_change` and `rank_correlation` of dev, for regression.
    """

    file_scores: Scores
    checkpoint_scores: Scores
    flipped: int
    rows: int
    largest_change: float
    worsened: int = 0
    number_change: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """Say how predictions changed."""
        if self.number_change:
            change = describe_prediction_change(None, None, **self.number_change)
            return f"largest change {self.largest_change:.2g}, {change}"
        return f"{describe_prediction_change(self.flipped, self.rows, None, None)}, {self.worsened} for the worse"


class ScoreBudgetExceeded(GateError):
    """The files are sound, but rounding costs more of the dev score than the budget allows."""


def check_score(target: Target, reference: Reference, folder: Path, provider: str) -> DevComparison:
    """Compare the files in `folder` with the checkpoint on the dev sets.

    Raises:
        ScoreBudgetExceeded: names the first metric that changed by more than the budget, and what
            was rounded.
    """
    comparison = compare_on_dev_sets(target, reference, folder, provider)
    budget = allowed_change(target, reference.recipe)
    # Every metric is checked, not only their mean: a lost F1 can hide behind a good accuracy.
    metric = metric_over_budget(comparison, budget)
    if metric is None:
        return comparison
    hint = f"export.budget is {budget:g}"
    if target.rounds_weights:
        formats = target.storage_formats(reference.recipe)
        rounding = f"export.values={formats.matrices} and export.embeddings={formats.embeddings}"
        rounding += " round the weights"
        if target.rounds_arithmetic:
            rounding = f"its weights and its arithmetic are {formats.matrices}"
        hint += f"; {rounding}: store them more exactly, raise the budget, "
        hint += "or leave the target out with export.skip"
    raise ScoreBudgetExceeded(
        f"the exported file has {metric} {comparison.file_scores[metric]:.4f} on the dev set; "
        f"its checkpoint has {comparison.checkpoint_scores[metric]:.4f} "
        f"({comparison.describe()})",
        hint,
    )


def compare_on_dev_sets(target: Target, reference: Reference, folder: Path, provider: str) -> DevComparison:
    """Predict the dev sets with the files in `folder`, from texts by `spdtool.load`, and compare with the checkpoint.

    Raises:
        GateError: tokens or answers are others than those of the checkpoint.
    """
    dev, tolerance = reference.dev, reference.recipe.export.tolerance
    assert dev.task is not None, "there is no score without a task"
    if dev.texts and opens_by_load(target, reference):
        classifier = open_classifier(folder, provider)
        file_logits = predict_from_texts(classifier, dev, reference.recipe.max_length, reference.label_names)
    else:
        file_logits = dev.predict(target.session(folder, provider))
    return compare_predictions(dev.task, reference.dev_logits(provider), file_logits, dev.splits, tolerance)


def compare_predictions(
    task: Task,
    checkpoint_logits: DevLogits,
    file_logits: DevLogits,
    splits: dict[str, Encoded],
    tolerance: float,
) -> DevComparison:
    """Score both sides and count the predictions that differ.

    Args:
        tolerance: a regression's prediction counts as another one beyond this difference.
    """
    compared, flipped, worsened, largest_change = 0, 0, 0, 0.0
    for name, rows in splits.items():
        before, after = checkpoint_logits[name], file_logits[name]
        is_flipped, is_worse = task.compare_predictions(before, after, rows, tolerance)
        compared += len(is_flipped)
        flipped += int(is_flipped.sum())
        worsened += int(is_worse.sum())
        largest_change = max(largest_change, float(np.abs(after - before).max()))
    return DevComparison(
        file_scores=task.score_splits(file_logits, splits),
        checkpoint_scores=task.score_splits(checkpoint_logits, splits),
        flipped=flipped,
        rows=compared,
        largest_change=largest_change,
        worsened=worsened,
        number_change=task.measure_change(checkpoint_logits["dev"], file_logits["dev"]),
    )


def allowed_change(target: Target, recipe: Recipe) -> float:
    """Largest change of a dev metric that passes."""
    return recipe.export.allowed_change(rounds=target.rounds_weights, storage=target.storage_formats(recipe))


def metric_over_budget(comparison: DevComparison, budget: float) -> str | None:
    """Name the first metric that changed by more than the budget, or is not finite.

    A single prediction is never too much: on 400 rows it is a quarter of a point, and the last bit
    of a logit may decide it.
    """
    for name, value in comparison.file_scores.items():
        change = abs(value - comparison.checkpoint_scores[name])
        # A file that is better by more than the budget passes too, unless it lost right answers.
        if not math.isfinite(value) or (change > budget and comparison.worsened > 1):
            return name
    return None
