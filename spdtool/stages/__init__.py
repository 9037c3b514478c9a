"""One module per command: each reads earlier folders of a run and writes one more."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from spdtool.run.folder import Run


def function(stage: str) -> Callable[[Run], dict[str, Any]]:
    """What carries out `stage`; its module, and torch with it, is imported only now."""
    made: Callable[[Run], dict[str, Any]] = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)
    return made
