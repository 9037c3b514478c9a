"""`spdtool distill`: phase 2, progressive grafting: the replacing rate rises until the student stands alone.

Reads: `teacher/`, `prune/`. Writes: `distill/`, with the zeros of `prune/`.
"""

from __future__ import annotations

from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages import student


def distill(run: Run) -> TrainingResult:
    """Graft the pruned student onto the teacher; return the stage's result. Raises as `student.phase` does."""
    return student.phase(run, "distill", start="prune", make_pruner=student.holding(run))
