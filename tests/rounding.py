"""An export target that rounds the weights, as a stranger would write it: `Onnx` of a checkpoint that is rounded."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from spdtool.export.target import MODEL_FILE
from spdtool.export.targets import Onnx
from spdtool.models.load import load_model
from spdtool.recipe.fields import Recipe


class Rounded(Onnx):
    """Weights rounded as `export.values` says; only the student."""

    roles = ("student",)
    providers = ("cpu",)
    rounds_weights = True
    library: dict[str, str] | None = None  # what its manifest says of a library

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Export a checkpoint whose weights are rounded, with a manifest beside it."""
        with tempfile.TemporaryDirectory() as scratch:
            rounded = Path(scratch) / "checkpoint"
            shutil.copytree(checkpoint, rounded)
            model = load_model(checkpoint)
            for weight in model.parameters():
                weight.data.copy_(rounded_to(recipe.export.values, weight.data))
            model.save_pretrained(rounded)
            files = Onnx().export(rounded, folder, recipe)
        manifest: dict[str, Any] = {"format": 1, "target": "rounded", "model": MODEL_FILE}
        manifest["files"] = {MODEL_FILE: {"bytes": files[0].stat().st_size}}
        if self.library is not None:
            manifest["library"] = self.library
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return files


def rounded_to(storage: str, weight: torch.Tensor) -> torch.Tensor:
    """Round a weight as `storage` does; what is not zero does not become zero."""
    if storage == "fp32":
        return weight
    if storage == "fp16":
        return weight.half().float()
    scale = weight.abs().max() / 127 or torch.tensor(1.0)
    steps = (weight / scale).round()
    return torch.where((steps == 0) & (weight != 0), weight.sign(), steps) * scale
