"""`spdtool prune`: phase 1, the student is pruned to the target sparsity while it is grafted and distilled.

Reads: `teacher/`. Writes: `prune/`, the student's first sparse checkpoint; its zeros are exactly the requested ones.
With `prune.save_at`, also `prune/students/<sparsity>/`: the student as it was at intermediate sparsities.
"""

from __future__ import annotations

from typing import Any

from spdtool.models.layers import find_prunable_layers
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages import student
from spdtool.training.saliency import check_saliency
from spdtool.training.schedules import event_schedule


def prune(run: Run) -> TrainingResult:
    """Prune a copy of the teacher; return the stage's result. Raises as `student.phase` does."""

    def make(model: Any, masks: Masks, steps: int) -> Pruner:
        events = event_schedule(run.recipe, steps, initial=masks.sparsity())
        check_saliency(run.recipe.prune, events, copied=run.recipe.student is None)
        return Pruner(masks, events, run.recipe.prune, run.recipe.sparsity, find_prunable_layers(model))

    return student.phase(run, "prune", start="teacher", make_pruner=make)
