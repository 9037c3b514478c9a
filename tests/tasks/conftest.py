"""Fixtures for the kinds of task that read texts in windows: a toy of the kind, exported once through all gates.

A test module says which toy in a fixture of its own, `toy_kind`: a data set and a model for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from spdtool import plugins
from spdtool.data.dataset import Dataset
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.target import get_target
from spdtool.models.load import save_model
from spdtool.recipe.fields import Recipe
from spdtool.run.records import ExportedModel

ToyKind = tuple[Dataset, Any]
"""A data set and a tiny model for it."""


class ToyExport(NamedTuple):
    """A folder that the target `onnx` wrote, and the record of its gates."""

    folder: Path
    model: ExportedModel


@pytest.fixture(scope="module")
def recipe(toys: ModuleType, toy_kind: ToyKind) -> Iterator[Recipe]:
    """The recipe of the toy's data set, which is registered."""
    toys.register(toy_kind[0])
    yield toys.recipe(task=toy_kind[0].name)
    plugins.datasets.unregister(toy_kind[0].name)


@pytest.fixture(scope="module")
def checkpoint(toys: ModuleType, toy_kind: ToyKind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's model as a checkpoint."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    save_model(toy_kind[1], toys.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path, recipe: Recipe) -> Reference:
    """What the gates compare an exported file with."""
    return Reference(checkpoint, prepare_dev_sets(checkpoint, recipe), recipe)


@pytest.fixture(scope="module")
def toy_export(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> ToyExport:
    """The export of the checkpoint, through all gates."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    return ToyExport(folder, export_and_check(get_target("onnx"), reference, folder, ["cpu"]))


@pytest.fixture(scope="module")
def exported(toy_export: ToyExport) -> Path:
    """The exported folder."""
    return toy_export.folder
