"""`spdtool prune`: phase 1, prune the student to the target sparsity while it is grafted and distilled.

Reads: `teacher/`. Writes: `prune/`, the student's first sparse checkpoint; its zeros are exactly
the requested ones. With `prune.save_at`, also `prune/students/<sparsity>/`: the student as it was
at intermediate sparsities.
"""

from __future__ import annotations

from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages.phase import load_phase, train_phase
from spdtool.training.schedules import plan_prune_events
from spdtool.training.statistics_collector import check_statistics


def prune(run: Run) -> TrainingResult:
    """Prune a copy of the teacher, or the student that the recipe names; raises as `load_phase` and `train_phase`."""
    recipe = run.recipe
    phase = load_phase(run, "prune", start="teacher")
    shape = phase.choose_shape(recipe)
    final = None if shape is None else phase.shape_sparsity(shape)
    events = plan_prune_events(recipe, phase.length.steps, initial=phase.masks.sparsity(), final=final)
    check_statistics(recipe.prune, events, copied=recipe.copies_teacher)
    phase.prune_at(events, recipe, shape)
    return train_phase(run, "prune", phase)
