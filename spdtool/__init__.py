"""spdtool: sparse encoders by progressive distillation, exported to ONNX and measured honestly.

`spdtool.load(folder)` opens what `spdtool export` wrote; `spdtool.Task` is the base class of a kind of task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdtool.serving.classifier import load as load
    from spdtool.tasks import Task as Task

__all__ = ["Task", "load"]


def __getattr__(name: str) -> Any:
    if name == "Task":
        from spdtool.tasks import Task

        return Task
    if name != "load":
        raise AttributeError(f"module 'spdtool' has no attribute {name!r}")
    from spdtool.serving.classifier import load  # not before it is asked for: the command line must answer at once

    return load
