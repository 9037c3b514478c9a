"""Every kind of task with more than a label a row goes through all stages, from rows to an answering folder.

A new kind is one row of `KINDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import spdtool
from spdtool import plugins
from spdtool.data.dataset import Dataset
from spdtool.run.folder import Run

pytestmark = pytest.mark.long  # every stage of every kind; the parts have tests of their own
STAGES = ("teacher", "prune", "distill", "finetune", "export")


class Kind(NamedTuple):
    """A toy data set of a kind, what is asked of the exported folder, and what an answer has to be like."""

    dataset: Callable[[ModuleType], Dataset]
    arguments: tuple[Any, ...]
    is_answer: Callable[[Any], bool]


KINDS = {
    "tokens": Kind(
        lambda toys: toys.tag_dataset(train=24, dev=12),
        ("good fine film",),
        lambda answer: all(set(each) == {"entity_group", "score", "word", "start", "end"} for each in answer),
    ),
    "spans": Kind(
        lambda toys: toys.question_dataset(train=24, dev=12, without=3),
        (["a good film"], ["the film was good"]),
        lambda answer: answer[0]["answer"] in "the film was good",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_goes_from_rows_to_a_folder_that_answers(toys: ModuleType, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    task = toys.register(kind.dataset(toys))
    epochs = [f"{stage}.epochs=1" for stage in STAGES[:4]]
    recipe = toys.recipe(*epochs, "prune.events=2", "export.sentences=4", "max_length=24", task=task.name)
    try:
        run = Run.for_recipe(tmp_path / "run", recipe)
        for stage in STAGES:
            getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)(run)
    finally:
        plugins.datasets.unregister(task.name)
    assert run.training_result("finetune").sparsity == pytest.approx(0.5, abs=0.01)
    exported = run.export_result().targets["onnx"].student
    assert exported is not None
    assert exported.dev == exported.checkpoint_dev
    answer = spdtool.load(tmp_path / "run/export/bundle")
    assert type(answer.decision) is task.decision
    assert kind.is_answer(answer(*kind.arguments))
