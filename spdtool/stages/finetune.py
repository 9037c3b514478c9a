"""`spdtool finetune`: phase 3, the sparse student alone, still learning from the teacher.

Reads: `teacher/`, `distill/`. Writes: `finetune/`, the student that is exported.
"""

from __future__ import annotations

from typing import Any

from spdtool.run.folder import Run
from spdtool.stages import student


def finetune(run: Run) -> dict[str, Any]:
    """Train the student alone; return the stage's metrics. Raises as `student.phase` does."""
    return student.phase(run, "finetune", start="distill", make_pruner=student.holding(run))
