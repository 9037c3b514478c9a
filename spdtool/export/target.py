"""Which export targets a recipe means, and what a target may have beside its three functions.

A stranger's target need not inherit from `Onnx`: these functions ask for each optional attribute, with its default.
`onnx.py` says what each one means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx as protobuf

from spdtool import plugins
from spdtool.data.tokens import Batch
from spdtool.errors import GateError, PluginError, RecipeError, SpdError, UnknownName
from spdtool.export.graph import fuse as fusion
from spdtool.models.predict import Forward
from spdtool.recipe.fields import Export, Recipe

ROLES = ("teacher", "student")
PROVIDERS = ("cpu", "cuda")


@dataclass(frozen=True)
class Chosen:
    """One target of a recipe.

    Attributes:
        optional: whether the export goes on without it where it cannot be used.
        prefix: of its folders inside the export stage; empty for the first target, its own name for every other.
    """

    name: str
    target: Any
    optional: bool
    prefix: str


def demanded(section: Export) -> list[Chosen]:
    """The recipe's `targets`, in order.

    Raises:
        UnknownName: nothing provides one of them.
        RecipeError: there is none, or the first one does not export the teacher, with which the bench compares.
    """
    if not section.targets:
        raise RecipeError("export.targets is empty", 'for example export.targets=["onnx"]')
    names = tuple(dict.fromkeys(section.targets))
    found = [Chosen(name, plugins.targets.get(name), False, "" if name == names[0] else name) for name in names]
    missing = set(ROLES) - set(roles(found[0].target))
    if missing:
        listed = ", ".join(f'"{name}"' for name in dict.fromkeys(("onnx", *names)))
        raise RecipeError(
            f"the target {names[0]!r} does not export the {' and '.join(sorted(missing))}: it cannot be the first one",
            f"export.targets=[{listed}]",
        )
    return found


def offered(section: Export) -> tuple[list[Chosen], dict[str, SpdError]]:
    """The recipe's `optional` targets that are installed; and by name, what would be said of those that are not."""
    found: list[Chosen] = []
    missing: dict[str, SpdError] = {}
    for name in dict.fromkeys(section.optional):
        if name in section.targets:
            continue
        try:
            found.append(Chosen(name, plugins.targets.get(name), True, name))
        except UnknownName as error:
            missing[name] = _absent(name) or error
    return found, missing


def _absent(name: str) -> PluginError | None:
    """What is said of a target of this project that is not installed; one that does not load is another matter."""
    distribution = plugins.official_distribution(name)
    if distribution is None or any(plugin.error for plugin in plugins.loaded_plugins()):
        return None
    return PluginError("its plugin is not installed", plugins.install_command(distribution))


def roles(target: Any) -> tuple[str, ...]:
    """Which of teacher and student it exports."""
    return tuple(getattr(target, "roles", ROLES))


def providers(target: Any) -> tuple[str, ...]:
    """The providers of onnxruntime on which its files run."""
    return tuple(getattr(target, "providers", PROVIDERS))


def rounds(target: Any) -> bool:
    """Whether its files hold other weights than the checkpoint."""
    return getattr(target, "weights", None) is not None


def weights(target: Any, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """`(parameter, float32 array)` as the files in `folder` hold them, one at a time; only where it `rounds`."""
    yield from target.weights(folder)


def libraries(target: Any, folder: Path) -> list[str]:
    """The libraries of custom operators that a session of the files in `folder` needs."""
    found = getattr(target, "libraries", None)
    return [str(path) for path in found(folder)] if found is not None else []


def storage(target: Any, recipe: Recipe) -> tuple[str, str]:
    """How a target that rounds stores the matrices and the embeddings."""
    found = getattr(target, "storage", None)
    return found(recipe) if found is not None else (recipe.export.values, recipe.export.embeddings)


def exact(target: Any, folder: Path) -> Forward | None:
    """The files with nothing rounded but their weights, where the target's arithmetic is coarse; else None."""
    found = getattr(target, "exact", None)
    return found(folder) if found is not None else None


def verify(target: Any, folder: Path, model: Any, batches: list[tuple[str, Batch]], provider: str) -> None:
    """Let a target look for the faults that only its files can have; raises GateError."""
    found = getattr(target, "verify", None)
    if found is not None:
        found(folder, model, batches, provider)


def parts(target: Any, checkpoint: Path, recipe: Recipe) -> list[str]:
    """The pieces of a model that the target can leave unrounded; none where it cannot choose."""
    found = getattr(target, "parts", None)
    return list(found(checkpoint, recipe)) if found is not None else []


def facts(target: Any, folder: Path) -> dict[str, Any]:
    """What else is to be said of the files."""
    found = getattr(target, "facts", None)
    return dict(found(folder)) if found is not None else {}


def calibrates(target: Any) -> bool:
    """Whether it needs rows of the task."""
    return bool(getattr(target, "calibrates", False))


def check_domains(target: Any, files: list[Path]) -> None:
    """Refuse operators of a domain that the target does not name.

    Raises:
        GateError: names the domain.
    """
    allowed = getattr(target, "domains", None)
    if allowed is None:
        return
    found = fusion.domains(protobuf.load(files[0], load_external_data=False)) - set(allowed)
    if found:
        raise GateError(f"{files[0].name} has operators of the domain {', '.join(sorted(found))}")
