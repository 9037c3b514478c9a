"""One module per command: each reads earlier folders of a run and writes one more."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spdtool.run.folder import Run

if TYPE_CHECKING:
    from spdtool.run.records import Result


def run_stage(run: Run, stage: str) -> Result:
    """Carry out `stage` and return its result; its module, and torch with it, is imported only now."""
    result: Result = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)(run)
    return result
