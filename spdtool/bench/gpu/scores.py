"""The dev score of a checkpoint in torch, in the precisions that a GPU is fast in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spdtool.data.tokens import Batch
from spdtool.recipe.fields import Recipe

if TYPE_CHECKING:
    from spdtool.models.predict import Forward


class TorchScore(NamedTuple):
    """Dev score in a precision and of the checkpoint in float32; `passes`: within the budget of an fp16 export."""

    score: float | None
    checkpoint_score: float | None
    passes: bool


def score_precisions(
    checkpoint: Path, precisions: Sequence[str], recipe: Recipe, *, device: str
) -> dict[str, TorchScore]:
    """Score a checkpoint in each precision of torch.

    Raises:
        SpdError: the checkpoint or the rows of its task cannot be read.
    """
    from spdtool.export.gates.reference import prepare_dev_sets
    from spdtool.export.gates.score import compare_predictions, metric_over_budget
    from spdtool.export.target import StorageFormats

    dev = prepare_dev_sets(checkpoint, recipe)
    assert dev.task is not None, "a recipe names a task"
    expected = dev.predict(_open_precision(checkpoint, "fp32", device))
    budget = recipe.export.allowed_change(rounds=True, storage=StorageFormats("fp16", "fp16"))
    scores = {}
    for precision in precisions:
        logits = dev.predict(_open_precision(checkpoint, precision, device))
        comparison = compare_predictions(dev.task, expected, logits, dev.splits, recipe.export.tolerance)
        before, after = comparison.checkpoint_scores.get("score"), comparison.file_scores.get("score")
        scores[precision] = TorchScore(after, before, passes=metric_over_budget(comparison, budget) is None)
    return scores


def _open_precision(checkpoint: Path, precision: str, device: str) -> Forward:
    import torch

    from spdtool.models.load import load_model
    from spdtool.models.predict import torch_forward

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    model = load_model(checkpoint).to(device).to(types.get(precision, torch.float32))  # type: ignore[arg-type]
    forward = torch_forward(model, device)

    def predict(batch: Batch) -> np.ndarray:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            return forward(batch)
        finally:
            torch.set_float32_matmul_precision("highest")  # it is a setting of the whole process

    return predict
