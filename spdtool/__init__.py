"""spdtool: sparse encoders by progressive distillation, exported to ONNX and measured.

    result = spdtool.compress(task="mrpc", sparsity=0.9)
    classify = spdtool.load(result.bundle)

Importing the package is cheap: every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import version

    from spdtool.errors import (
        Corrupt,
        DataError,
        DeviceError,
        GateError,
        ModelError,
        PeerLost,
        PluginError,
        RecipeError,
        RunError,
        RunLocked,
        RunMismatch,
        SpdError,
        StageMissing,
        UnknownName,
    )
    from spdtool.export.load import load
    from spdtool.export.target import Target
    from spdtool.recipe.fields import Recipe
    from spdtool.recipe.reading import build_recipe
    from spdtool.run.folder import Run
    from spdtool.stages.api import CompressionResult, ExportedCheckpoint, compress, export_model
    from spdtool.tasks.task import Task

    __version__ = version("spdtool")

__all__ = [
    "CompressionResult",
    "Corrupt",
    "DataError",
    "DeviceError",
    "ExportedCheckpoint",
    "GateError",
    "ModelError",
    "PeerLost",
    "PluginError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "RunLocked",
    "RunMismatch",
    "SpdError",
    "StageMissing",
    "Target",
    "Task",
    "UnknownName",
    "__version__",
    "build_recipe",
    "compress",
    "export_model",
    "load",
]

# The module of every name that spdtool.errors does not have.
HOMES = {
    "CompressionResult": "spdtool.stages.api",
    "ExportedCheckpoint": "spdtool.stages.api",
    "Recipe": "spdtool.recipe.fields",
    "Run": "spdtool.run.folder",
    "Target": "spdtool.export.target",
    "Task": "spdtool.tasks.task",
    "build_recipe": "spdtool.recipe.reading",
    "compress": "spdtool.stages.api",
    "export_model": "spdtool.stages.api",
    "load": "spdtool.export.load",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        # Here, not at the top: importlib.metadata takes longer than all else in this file.
        return importlib.import_module("importlib.metadata").version("spdtool")
    if name not in __all__:
        raise AttributeError(f"module 'spdtool' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES.get(name, "spdtool.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
