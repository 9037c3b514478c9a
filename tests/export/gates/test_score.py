"""The gate on the dev score: flipped predictions and the budget."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from spdtool.data import tokens as data
from spdtool.export.gates.reference import DevLogits, DevSets
from spdtool.export.gates.score import DevComparison, compare_predictions, metric_over_budget
from spdtool.models.predict import Forward
from spdtool.tasks.task import Task


def test_flips_are_counted_in_every_dev_set(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task()
    rows = toys.rows(6)
    dev = DevSets(task, data.encode_splits(toys.tokenizer(), {"dev": rows, "dev_mm": rows}, 32))

    def forward(sign: float) -> Forward:
        def logits(batch: Any) -> np.ndarray:
            gold = batch["labels"].astype(np.float32) * 2 - 1
            return np.stack([-gold, gold * sign], axis=1)

        return logits

    comparison = compare_predictions(task, dev.predict(forward(1.0)), dev.predict(forward(-2.0)), dev.splits, 1e-4)
    assert comparison.checkpoint_scores == {"score": 1.0, "accuracy": 1.0, "accuracy_mm": 1.0}
    assert comparison.file_scores["accuracy"] == comparison.file_scores["accuracy_mm"] < 1
    assert comparison.flipped == 2 * 6 * (1 - comparison.file_scores["accuracy"])
    assert comparison.largest_change == 3.0


def test_a_regression_is_compared_by_its_values(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    task = toy_task(labels=())
    dev = DevSets(task, data.encode_splits(toys.tokenizer(), {"dev": toys.rows(6, labels=1)}, 32))

    def logits(shift: float) -> DevLogits:
        return dev.predict(lambda batch: batch["labels"][:, None] + np.float32(shift) * (batch["labels"] > 1)[:, None])

    assert compare_predictions(task, logits(0), logits(1e-6), dev.splits, 1e-4).flipped == 0
    assert compare_predictions(task, logits(0), logits(1e-2), dev.splits, 1e-4).flipped == 3


def test_one_prediction_is_never_over_the_budget() -> None:
    cases = [(0.98, 1, None), (0.98, 2, "accuracy"), (0.999, 9, None), (float("nan"), 0, "accuracy")]
    for score, worsened, expected in cases:
        comparison = DevComparison({"accuracy": score}, {"accuracy": 1.0}, worsened, 50, 0.1, worsened)
        assert metric_over_budget(comparison, 0.002) == expected, (score, worsened)
