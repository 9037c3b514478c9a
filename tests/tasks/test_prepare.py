"""Common to all kinds of task: lookup, rows, scores, and kinds of task from plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import transformers
from torch import Tensor

import spdtool
from spdtool import plugins
from spdtool.data.tokens import tokenize
from spdtool.errors import DataError, UnknownName
from spdtool.recipe.fields import Recipe
from spdtool.run.records import DataRecord
from spdtool.tasks.prepare import find_task, prepare_data, task_of
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.task import Task

ToyTask = Callable[..., Task]


def test_score_is_the_mean_of_the_metrics_of_the_data_set(toy_task: ToyTask) -> None:
    gold, predicted = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 0, 1, 1])
    scores = toy_task(metrics=("accuracy", "f1")).score_labels(np.eye(2)[predicted], gold)
    assert scores["accuracy"] == METRICS["accuracy"](gold, predicted)
    assert scores["f1"] == METRICS["f1"](gold, predicted)
    assert scores["score"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    assert list(scores) == ["score", "accuracy", "f1"]


def test_a_second_dev_set_has_a_suffix_and_does_not_count_in_the_score(toys: ModuleType, toy_task: ToyTask) -> None:
    splits = {"dev": tokenize(toys.tokenizer(), toys.rows(10), 16)}
    splits["dev_mm"] = tokenize(toys.tokenizer(), toys.rows(7, seed=3), 16)
    logits = {name: np.tile([0.0, 1.0], (len(rows), 1)) for name, rows in splits.items()}
    assert toy_task().score_splits(logits, splits) == {
        "score": 0.5,
        "accuracy": 0.5,
        "accuracy_mm": pytest.approx(3 / 7),
    }


def test_rows_are_cut_after_they_are_checked(toys: ModuleType, toy_task: ToyTask) -> None:
    toy_task(train=40)
    rows = find_task(toys.recipe(max_rows=10)).read_rows(toys.recipe(max_rows=10))
    assert len(rows["train"]) == len(rows["dev"]) == 10


def test_the_rows_are_handed_out_before_they_are_tokenized(toys: ModuleType, toy_task: ToyTask) -> None:
    toy_task(train=8, dev=4)

    def refuse(record: DataRecord) -> None:
        assert record.rows == {"train": 8, "dev": 4}
        raise DataError("other rows")

    with pytest.raises(DataError, match="other rows"):
        prepare_data(toys.recipe(), toys.tokenizer(), ["bad", "good"], refuse)


def test_every_kind_says_which_checkpoints_it_opens() -> None:
    for entry in plugins.task_kinds.entries():
        assert issubclass(entry.value, Task), entry.name
        config = transformers.BertConfig(problem_type=entry.value.problem_type)  # refuses what it does not know
        assert config.problem_type == entry.value.problem_type


def test_a_kind_that_is_not_supported_is_named(toys: ModuleType, toy_task: ToyTask) -> None:
    toys.register(toy_task().dataset)
    with pytest.raises(UnknownName, match="kind of task 'captions'") as error:
        task_of(replace(toy_task().dataset, kind="captions"))
    assert "classification" in str(error.value.hint)


def test_a_plugin_can_add_a_kind_of_task(toys: ModuleType, toy_task: ToyTask, clean_plugins: None) -> None:
    @plugins.task_kinds.register("shifted")
    class Shifted(spdtool.Task):
        """A class whose numbers start at 1."""

        def predictions(self, logits: np.ndarray) -> np.ndarray:
            return logits.argmax(axis=1) + 1

        def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.argmax(1) + 1 != labels).float().mean()

    toys.register(replace(toy_task().dataset, kind="shifted"))
    task = find_task(Recipe(task="toy"))
    assert type(task) is Shifted
    assert task.score_labels(np.eye(2), np.array([1, 2]))["accuracy"] == 1.0
    names = [entry.name for entry in plugins.task_kinds.entries()]
    assert {"classification", "regression", "shifted"} < set(names)
