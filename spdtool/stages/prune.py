"""`spdtool prune`: phase 1, the student is pruned to the target sparsity while it is grafted and distilled.

Reads: `teacher/`. Writes: `prune/`, the student's first sparse checkpoint; its zeros are exactly the requested ones.
"""

from __future__ import annotations

from typing import Any

from spdtool.pruning.gradual import Pruner
from spdtool.pruning.masks import Masks
from spdtool.run import Run
from spdtool.schedules import prune_events
from spdtool.stages import student


def prune(run: Run) -> dict[str, Any]:
    """Prune a copy of the teacher; return the stage's metrics. Raises as `student.phase` does."""
    recipe, section = run.recipe, run.recipe.prune

    def make(masks: Masks, steps: int) -> Pruner:
        events = prune_events(
            max(1, round(section.ramp * steps)),
            section.events,
            recipe.sparsity,
            initial=masks.sparsity(),
            first=section.first,
            shape=section.schedule,
        )
        return student.pruner_of(recipe, masks, events)

    return student.phase(run, "prune", start="teacher", make_pruner=make)
