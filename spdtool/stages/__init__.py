"""One module per command: each reads earlier folders of a run and writes one more."""

from __future__ import annotations

import importlib
from typing import Any

from spdtool.run.folder import Run


def run_stage(run: Run, stage: str) -> dict[str, Any]:
    """Carry out `stage` and return its metrics; its module, and torch with it, is imported only now."""
    metrics: dict[str, Any] = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)(run)
    return metrics
