"""`spdtool finetune`: phase 3, the sparse student alone, still learning from the teacher.

Reads: `teacher/`, `distill/`. Writes: `finetune/`, the student that is exported.
"""

from __future__ import annotations

from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult
from spdtool.stages import student


def finetune(run: Run) -> TrainingResult:
    """Train the student alone; return the stage's result. Raises as `student.phase` does."""
    return student.phase(run, "finetune", start="distill", make_pruner=student.holding(run))
