"""Checkpoints of other tools: those that open, and the reason why one does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from spdtool.errors import ModelError
from spdtool.models.load import load_model, save_model

QUERY = "bert.encoder.layer.0.attention.self.query"
# Names that each tool adds to a checkpoint, and what the refusal has to say.
FOREIGN = (
    ("SparseML, int8", f"{QUERY}.quant.activation_post_process.scale", "trained with rounded weights"),
    ("nn_pruning", f"{QUERY}.mask_module.context_modules.0.mask_scores", "weights themselves are still dense"),
    ("movement pruning", f"{QUERY}.mask_scores", "weights themselves are still dense"),
    ("torch's masks", f"{QUERY}.weight_mask", "masks lie beside dense weights"),
    ("BERT-of-Theseus", "bert.encoder.scc_layer.0.output.dense.weight", "successor"),
    ("CoFi", "layer_transformation.weight", "sizes of their own"),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "sound"
    save_model(toys.bert(), toys.tokenizer(), folder)
    return folder


def change(sound: Path, folder: Path, weight: str | None = None, **fields: object) -> Path:
    """Copy a checkpoint with one more weight, or other fields of config.json."""
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((sound / "config.json").read_text("utf-8")) | fields
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if weight is not None:
        weights = load_file(sound / "model.safetensors")
        save_file({**weights, weight: torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_cannot_be_used_is_refused_with_the_tool_and_the_reason(sound: Path, tmp_path: Path) -> None:
    for number, (tool, weight, reason) in enumerate(FOREIGN):
        folder = change(sound, tmp_path / str(number), weight)
        with pytest.raises(ModelError, match=reason) as error:
            load_model(folder)
        assert "migrate.md" in str(error.value.hint), tool
    with pytest.raises(ModelError, match="replaced its layer normalization"):
        load_model(change(sound, tmp_path / "norm", layer_norm_type="no_norm"))
    with pytest.raises(ModelError, match="movement pruning"):
        load_model(change(sound, tmp_path / "masked", model_type="masked_bert"))


def test_zeros_of_others_open_as_they_are(sound: Path, tmp_path: Path) -> None:
    folder = change(sound, tmp_path / "zeros", sparsity_recipe="recipe.yaml")  # a field that nobody knows
    weights = load_file(sound / "model.safetensors")
    weights[f"{QUERY}.weight"][:, ::2] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(folder).state_dict()[f"{QUERY}.weight"], weights[f"{QUERY}.weight"])
