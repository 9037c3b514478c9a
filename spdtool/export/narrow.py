"""The export target `transformers`: a checkpoint for PyTorch, as narrow as a stock class can be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spdtool.export.graph.weights import POSITIONS, StoredWeight, describe_positions, expand_weight
from spdtool.export.target import Target
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.models.predict import Forward, torch_forward
from spdtool.models.shrink import WIDTH_FIELDS, narrow
from spdtool.plugins import targets
from spdtool.recipe.fields import Recipe

WEIGHTS = "model.safetensors"


@targets.register("transformers")
class Transformers(Target):
    """A checkpoint that stock transformers opens, as narrow as one feed-forward width for all layers allows."""

    opened_by = "session"
    changed_fields = WIDTH_FIELDS

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:  # noqa: ARG002
        """Write the checkpoint with the smallest `intermediate_size` that all of its layers fit in.

        Raises:
            ModelError: the checkpoint cannot be read.
        """
        model, positions = narrow(load_model(checkpoint))
        save_model(model, load_tokenizer(checkpoint), folder)
        file = folder / WEIGHTS
        metadata = {"format": "pt"}
        if positions:
            metadata[POSITIONS] = json.dumps({name: describe_positions(axes) for name, axes in positions.items()})
            save_file(load_file(file), file, metadata)
        return [file]

    def session(self, folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:  # noqa: ARG002
        """Open the folder in PyTorch, as a user of transformers would."""
        model = load_model(folder, eager=True)
        model.to(provider)  # type: ignore[arg-type]
        return torch_forward(model, provider)

    def stored_weights(self, folder: Path) -> Iterator[StoredWeight]:
        """Yield every parameter at full width."""
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            positions = json.loads((file.metadata() or {}).get(POSITIONS, "{}"))
        for name, parameter in load_model(folder).named_parameters():
            stored = StoredWeight(name, parameter.detach().numpy())
            yield expand_weight(stored, positions[name]) if name in positions else stored
