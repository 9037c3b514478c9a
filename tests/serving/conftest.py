"""A servable folder, made once: a toy student, its variants and what stands beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from spdtool import plugins
from spdtool.export.bundle.write import write_bundle
from spdtool.export.targets import Onnx
from spdtool.models.load import save_model
from spdtool.recipe.fields import Recipe
from spdtool.run.records import ExportedModel, ExportResult, TargetExport

FIGURES = {
    "files": ["onnx/model.onnx"],
    "bytes": 1,
    "zeros": 1,
    "size": 2,
    "sparsity": 0.5,
    "positions": 64,
    "providers": ["cpu"],
    "dev": {"score": 0.75, "accuracy": 0.75},
    "checkpoint_dev": {"score": 0.5, "accuracy": 0.5},
    "flipped": 3,
    "rows": 12,
    "largest_difference": 1e-6,
}


class ExportedRun(NamedTuple):
    """What the export stage has when it writes the bundle."""

    folder: Path
    checkpoint: Path
    recipe: Recipe
    result: ExportResult


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> ExportedRun:
    """A student of three labels on pairs, exported by two targets, and its bundle."""
    folder = tmp_path_factory.mktemp("served")
    toys.register(toys.dataset("served", pairs=True, dev=24))
    try:
        names = {0: "no", 1: "maybe", 2: "yes"}
        model = toys.bert(labels=3, id2label=names, label2id={name: index for index, name in names.items()})
        checkpoint = folder / "checkpoint"
        save_model(model, toys.tokenizer(), checkpoint)
        recipe = toys.recipe('export.optional=["onnx-fp16"]', task="served")
        Onnx().export(checkpoint, folder / "export/student", recipe)
        Onnx().export(checkpoint, folder / "export/onnx-fp16/student", recipe)
        plain = ExportedModel.model_validate(FIGURES)
        rounded = ExportedModel.model_validate(FIGURES | {"largest_change": 0.01})
        targets = {"onnx": TargetExport(student=plain), "onnx-fp16": TargetExport(student=rounded)}
        result = ExportResult(first="onnx", targets=targets)
        assert write_bundle(folder / "export", checkpoint, recipe, result) is None
    finally:
        plugins.datasets.unregister("served")
    return ExportedRun(folder / "export", checkpoint, recipe, result)


@pytest.fixture(scope="session")
def servable(exported: ExportedRun) -> Path:
    """The bundle; read only: copy it before changing it."""
    return exported.folder / "bundle"


def _copy_with_text(bundle: Path, folder: Path, text: dict[str, list[str]]) -> Path:
    """Copy the bundle, and let its manifest name other text columns, or none."""
    copy = shutil.copytree(bundle, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["text"]
    (copy / "manifest.json").write_text(json.dumps(manifest | text))
    return copy


@pytest.fixture(scope="session")
def either(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as an older spdtool wrote it: a row may have a pair or none; read only."""
    return _copy_with_text(servable, tmp_path_factory.mktemp("either") / "bundle", {})


@pytest.fixture(scope="session")
def single(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, as if its task had one text in the column `sentence`; read only."""
    return _copy_with_text(servable, tmp_path_factory.mktemp("single") / "bundle", {"text": ["sentence"]})
