"""What a finished export has to say of demanded targets that were not shipped.

Importing this module loads neither torch nor onnx: a run whose stages are all done asks it too.
"""

from __future__ import annotations

import shlex

from spdtool.errors import GateError
from spdtool.run.folder import Run
from spdtool.run.records import ExportResult


def raise_if_refused(result: ExportResult, run: Run) -> None:
    """Raise GateError if a required target of the finished stage was refused, with every reason."""
    refused = []
    for name, reason in result.refused.items():
        if name in run.recipe.export.targets:
            refused.append(f"{name}: {reason}")
    if refused:
        raise GateError(
            f"not shipped: {'; '.join(refused)}",
            "everything else was exported, and the stage is done; to try anew with a wider budget: "
            f"`spdtool export --run {shlex.quote(str(run.path))} --again --set export.budget=0.01`",
        )
