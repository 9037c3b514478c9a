"""A few random alterations of exported folders; `make fuzz` tries hundreds for every kind of folder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from fuzz_folders import fuzz

from spdtool.export.targets import Onnx
from spdtool.models.load import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> list[Path]:
    """Two exported folders that differ in their weights and labels."""
    folder = tmp_path_factory.mktemp("altered")
    exported = []
    for seed, names in enumerate((("bad", "good"), ("no", "yes"))):
        model = toys.bert(seed=seed, id2label=dict(enumerate(names)), label2id={names[0]: 0, names[1]: 1})
        save_model(model, toys.tokenizer(), folder / f"checkpoint-{seed}")
        exported.append(folder / f"export-{seed}")
        Onnx().export(folder / f"checkpoint-{seed}", exported[-1], toys.recipe())
        toys.seal(exported[-1])
    return exported


def test_altered_folders_give_the_same_answer_or_are_refused(folders: list[Path]) -> None:
    folder, other_folder = folders
    outcomes, failures = fuzz(folder, [other_folder], count=80, seed=1)
    assert failures == []
    assert outcomes["refused"] > 20
    assert outcomes["same answer"] > 0, "what nobody reads may change"


def test_altered_folders_without_a_manifest_raise_no_traceback(folders: list[Path]) -> None:
    folder, other_folder = folders
    outcomes, failures = fuzz(folder, [other_folder], count=60, seed=2, unverified=True)
    assert failures == []
    assert outcomes["refused"] > 5
