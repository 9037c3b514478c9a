"""A servable folder, made once: a toy student, its variants and what stands beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdtool import plugins
from spdtool.export.bundle.write import write_bundle
from spdtool.export.targets import Onnx
from spdtool.models.load import save_model
from spdtool.recipe.fields import Recipe

MEASURED: dict[str, Any] = {
    "files": ["onnx/model.onnx"],
    "bytes": 1,
    "sparsity": 0.5,
    "providers": ["cpu"],
    "dev": {"score": 0.75, "accuracy": 0.75},
    "checkpoint_dev": {"score": 0.5, "accuracy": 0.5},
    "flipped": 3,
    "rows": 12,
    "largest_difference": 1e-6,
}


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> tuple[Path, Path, Recipe, dict[str, Any]]:
    """`(export, checkpoint, recipe, metrics)` of a student of three labels on pairs, as the export stage has them."""
    folder = tmp_path_factory.mktemp("served")
    toys.register(toys.dataset("served", pairs=True, dev=24))
    try:
        names = {0: "no", 1: "maybe", 2: "yes"}
        model = toys.bert(labels=3, id2label=names, label2id={name: index for index, name in names.items()})
        save_model(model, toys.tokenizer(), folder / "checkpoint")
        recipe = toys.recipe('export.optional=["onnx-fp16"]', task="served")
        Onnx().export(folder / "checkpoint", folder / "export/student", recipe)
        Onnx().export(folder / "checkpoint", folder / "export/onnx-fp16/student", recipe)
        metrics = {"student": MEASURED, "onnx-fp16": {"student": MEASURED | {"largest_change": 0.01}}}
        assert write_bundle(folder / "export", folder / "checkpoint", recipe, metrics) is None
    finally:
        plugins.datasets.unregister("served")
    return folder / "export", folder / "checkpoint", recipe, metrics


@pytest.fixture(scope="session")
def servable(stage: tuple[Path, Path, Recipe, dict[str, Any]]) -> Path:
    """The bundle; read only: copy it before changing it."""
    return stage[0] / "bundle"


def _saying(bundle: Path, folder: Path, text: list[str] | None) -> Path:
    """A copy of the bundle whose manifest names these text columns; None: none, as an older one."""
    copied = shutil.copytree(bundle, folder)
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["text"]
    (copied / "manifest.json").write_text(json.dumps(manifest if text is None else manifest | {"text": text}))
    return copied


@pytest.fixture(scope="session")
def either(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as an older spdtool wrote it: a row may have a pair or none; read only."""
    return _saying(servable, tmp_path_factory.mktemp("either") / "bundle", None)


@pytest.fixture(scope="session")
def single(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, as if its task had one text in the column `sentence`; read only."""
    return _saying(servable, tmp_path_factory.mktemp("single") / "bundle", ["sentence"])
