"""The gate on an exported folder: its config.json must equal that of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdtool.errors import GateError
from spdtool.export.gates.folder import check_configuration
from spdtool.models.config import SWITCHES
from spdtool.models.load import load_model, save_model


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def folders(encoder_folder: Path, tmp_path: Path, tiny_tokenizer: object) -> tuple[Path, Path]:
    """A checkpoint folder, and an export folder without its model file."""
    for name in ("checkpoint", "exported"):
        save_model(load_model(encoder_folder), tiny_tokenizer, tmp_path / name)
    return tmp_path / "checkpoint", tmp_path / "exported"


def test_switches_of_a_checkpoint_need_not_be_in_its_export(folders: tuple[Path, Path]) -> None:
    checkpoint, exported = folders
    assert "output_attentions" in SWITCHES
    edit_config(checkpoint, output_attentions=True, output_hidden_states=True, return_dict=False)
    check_configuration(exported, checkpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [("output_attentions", True), ("id2label", {"0": "LABEL_1", "1": "LABEL_0"}), ("vocab_size", 12)],
)
def test_another_answer_is_refused(folders: tuple[Path, Path], field: str, value: object) -> None:
    checkpoint, exported = folders
    edit_config(exported, **{field: value})
    with pytest.raises(GateError, match=field):
        check_configuration(exported, checkpoint)
