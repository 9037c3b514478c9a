"""A checkpoint as the reference of its exported files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spdtool.errors import ModelError
from spdtool.export.gates.reference import prepare_dev_sets
from spdtool.models.load import save_model
from spdtool.tasks.task import Task


def test_another_head_is_named_before_its_labels_are_blamed(
    toys: ModuleType, toy_task: Callable[..., Task], tmp_path: Path
) -> None:
    toy_task()
    heads = {
        "BertForTokenClassification": toys.tagger(),
        "BertForQuestionAnswering": toys.span_finder(),
    }
    for name, model in heads.items():
        folder = tmp_path / name
        save_model(model, toys.tokenizer(), folder)
        with pytest.raises(ModelError, match=rf"is .* \({name}\); the task 'toy' needs"):
            prepare_dev_sets(folder, toys.recipe())
