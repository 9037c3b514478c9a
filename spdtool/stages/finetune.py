"""`spdtool finetune`: phase 3, the sparse student alone, still learning from the teacher.

Reads: `teacher/`, `distill/`. Writes: `finetune/`, the student that is exported.
"""

from __future__ import annotations

from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages.phase import load_phase, train_phase
from spdtool.stages.trim import trim_vocabulary


def finetune(run: Run) -> TrainingResult:
    """Train the student alone; raises as `load_phase` and `train_phase`."""
    phase = load_phase(run, "finetune", start="distill")
    phase.keep_zeros(run.recipe, run.training_result("prune"))
    trims = run.recipe.finetune.vocabulary == "data"
    return train_phase(run, "finetune", phase, trim_vocabulary if trims else None)
