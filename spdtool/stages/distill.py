"""`spdtool distill`: phase 2, progressive grafting: the replacing rate rises until the student stands alone.

Reads: `teacher/`, `prune/`. Writes: `distill/`, with the zeros of `prune/`.
"""

from __future__ import annotations

from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages.phase import load_phase, train_phase


def distill(run: Run) -> TrainingResult:
    """Graft the pruned student onto the teacher; raises as `load_phase` and `train_phase`."""
    phase = load_phase(run, "distill", start="prune")
    phase.keep_zeros(run.recipe, run.training_result("prune"))
    return train_phase(run, "distill", phase)
