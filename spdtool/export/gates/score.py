"""The last gate, the dev metric: what an exported file makes of the dev sets beside what its checkpoint does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdtool.data import tokens as data
from spdtool.data.tokens import Encoded
from spdtool.errors import GateError
from spdtool.models import predict as evaluation
from spdtool.models.layers import max_positions
from spdtool.models.load import label_names, load_model, load_tokenizer
from spdtool.models.predict import Forward
from spdtool.recipe.fields import Recipe
from spdtool.tasks import CheckRows, Task, prepare_data

DevLogits = dict[str, np.ndarray]  # dev set -> logits [rows, labels]


@dataclass(frozen=True)
class DevSets:
    """What an export is compared on: the task and its dev sets; without a task, one dev set without rows.

    Attributes:
        train: rows to calibrate on; None where there is no task.
    """

    task: Task | None
    sets: dict[str, Encoded]
    train: Encoded | None = None

    def predict(self, forward: Forward) -> DevLogits:
        """What a model says of every dev set."""
        return {name: evaluation.predict(forward, rows) for name, rows in self.sets.items()}


@dataclass(frozen=True)
class DevComparison:
    """What an exported file makes of the dev sets: both sides' metrics, flipped predictions, largest logit change.

    Attributes:
        worse: predictions that were right and are not any more; of a regression, all that moved.
    """

    metrics: dict[str, float]
    checkpoint: dict[str, float]
    flipped: int
    rows: int
    difference: float
    worse: int = 0


class ScoreBudgetExceeded(GateError):
    """The files are sound, and their roundings cost more of the dev metric than the budget."""


def prepare_dev_sets(checkpoint: Path, recipe: Recipe, note: CheckRows | None = None) -> DevSets:
    """The dev sets of the recipe's task and some of its training rows, encoded for the checkpoint.

    Args:
        note: as `check_rows` in `prepare_data`.

    Raises:
        DataError, ModelError: data, tokenizer and model do not fit together.
    """
    model = load_model(checkpoint)
    task, splits = prepare_data(recipe, load_tokenizer(checkpoint), label_names(model), note)
    dev = {name: rows for name, rows in splits.items() if name.startswith("dev")}
    data.check_lengths(dev, max_positions(model))
    data.check_vocabulary(dev, model.config.vocab_size)
    train = splits["train"]
    return DevSets(task, dev, train.sample(recipe.export.calibration, recipe.seed))


def compare_predictions(
    task: Task, before: DevLogits, after: DevLogits, dev: dict[str, Encoded], tolerance: float
) -> DevComparison:
    """What changed from the checkpoint's logits to the file's; a regression counts as flipped beyond `tolerance`."""
    flipped, worse, largest = 0, 0, 0.0
    for name, rows in dev.items():
        changed, worsened = task.compare_predictions(before[name], after[name], rows.labels, tolerance)
        flipped += int(changed.sum())
        worse += int(worsened.sum())
        largest = max(largest, float(np.abs(after[name] - before[name]).max()))
    metrics, checkpoint = (task.score_splits(logits, dev) for logits in (after, before))
    return DevComparison(metrics, checkpoint, flipped, sum(len(rows) for rows in dev.values()), largest, worse)


def metric_over_budget(change: DevComparison, budget: float) -> str | None:
    """The name of the first metric that changed by more than the budget; one prediction alone is never too much.

    On 400 rows one prediction is a quarter of a point, and what flips it may be the last bit of a logit.
    """
    for name, value in change.metrics.items():
        if not math.isfinite(value) or (abs(value - change.checkpoint[name]) > budget and change.worse > 1):
            return name
    return None


def check_budget(change: DevComparison, budget: float, metrics: dict[str, Any], *, rounds: bool, coarse: bool) -> None:
    """Raise ScoreBudgetExceeded where a metric changed by more than the budget; says what was rounded."""
    name = metric_over_budget(change, budget)
    if name is None:
        return
    hint = f"export.budget is {budget:g}"
    if rounds:
        stored = f"export.values={metrics['values']} and export.embeddings={metrics['embeddings']} round the weights"
        if coarse:
            stored = f"its weights and its arithmetic are {metrics['values']}"
        hint += f"; {stored}: store them more exactly, raise the budget, or leave the target out with export.skip"
    raise ScoreBudgetExceeded(
        f"the exported file has {name} {change.metrics[name]:.4f} on the dev set; its checkpoint has "
        f"{change.checkpoint[name]:.4f} ({change.flipped} of {change.rows} predictions flipped, "
        f"{change.worse} for the worse)",
        hint,
    )


def measured(change: DevComparison, metrics: dict[str, Any], *, rounds: bool) -> dict[str, Any]:
    """The part of the metrics that the dev sets give; rounding moves the logits, and that is no fault of the file."""
    found: dict[str, Any] = {
        "dev": change.metrics,
        "checkpoint_dev": change.checkpoint,
        "flipped": change.flipped,
        "worse": change.worse,
        "rows": change.rows,
    }
    if rounds:
        found["largest_change"] = change.difference
    elif change.difference > metrics["largest_difference"]:
        found |= {"largest_difference": change.difference, "largest_difference_at": "the dev set"}
    return found
