"""An export target that rounds the weights, written like a plugin: `Onnx` of a rounded checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from spdtool.export.graph.weights import StoredWeight
from spdtool.export.targets import Onnx
from spdtool.models.load import load_model
from spdtool.recipe.fields import Recipe


class Rounded(Onnx):
    """Export the student with weights rounded to the format of `export.values`."""

    roles = ("student",)
    providers = ("cpu",)
    rounds_weights = True
    library: dict[str, str] | None = None  # record of the library in its manifest
    values = "fp32"  # of the last export

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Export a checkpoint whose weights are rounded."""
        with tempfile.TemporaryDirectory() as scratch:
            rounded = Path(scratch) / "checkpoint"
            shutil.copytree(checkpoint, rounded)
            model = load_model(checkpoint)
            for weight in model.parameters():
                weight.data.copy_(rounded_to(self.storage_formats(recipe).matrices, weight.data))
            model.save_pretrained(rounded)
            files = Onnx().export(rounded, folder, recipe)
        self.values = self.storage_formats(recipe).matrices
        return files

    def library_record(self, folder: Path) -> dict[str, str] | None:
        """Return the library record that a test has set, or None."""
        return self.library

    def stored_weights(self, folder: Path) -> Iterator[StoredWeight]:
        """Yield the weights with their storage format, which their type in the file does not show."""
        for stored in super().stored_weights(folder):
            yield stored._replace(storage=self.values)


def rounded_to(storage: str, weight: torch.Tensor) -> torch.Tensor:
    """Round a weight to the format `storage`; nonzero numbers stay nonzero."""
    if storage == "fp32":
        return weight
    if storage == "fp16":
        return weight.half().float()
    scale = weight.abs().max() / 127 or torch.tensor(1.0)
    steps = (weight / scale).round()
    return torch.where((steps == 0) & (weight != 0), weight.sign(), steps) * scale
