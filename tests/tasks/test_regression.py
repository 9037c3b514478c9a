"""Regression: the value itself is the prediction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from spdtool.data.dataset import Rows
from spdtool.errors import ModelError
from spdtool.tasks.task import Task

ToyTask = Callable[..., Task]


def test_the_prediction_is_the_value_itself(toy_task: ToyTask) -> None:
    gold = np.array([0.5, 2, 3.5], dtype=np.float32)
    task = toy_task(labels=(), metrics=("pearson", "spearman"))
    assert task.score_labels((gold * 2 + 1)[:, None], gold)["score"] == pytest.approx(1)


def test_the_baseline_is_the_mean(toy_task: ToyTask) -> None:
    assert toy_task(labels=()).baseline(Rows(["a", "b", "c"], None, [0.5, 1.5, 4.0]))["score"] == 0


def test_the_gold_loss_is_the_mean_squared_error(toy_task: ToyTask) -> None:
    loss = toy_task(labels=()).gold_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0]))
    assert float(loss) == 5.0


def test_a_model_with_more_than_one_output_is_refused(toy_task: ToyTask) -> None:
    task = toy_task(labels=())
    assert task.label_order(["anything"]) == [0]
    assert not task.matches_by_position(["LABEL_0"])
    with pytest.raises(ModelError, match="the model has 2 labels"):
        task.align_labels({"train": Rows(["a"], None, [0.5])}, ["a", "b"])


def test_a_value_changes_beyond_the_tolerance(toy_task: ToyTask) -> None:
    before, after = np.array([[1.0], [2.0]]), np.array([[1.05], [2.2]])
    changed, worsened = toy_task(labels=()).compare_predictions(before, after, Rows(["a", "b"], None, np.zeros(2)), 0.1)
    assert changed.tolist() == worsened.tolist() == [False, True]


def test_values_have_a_range_and_no_classes(toy_task: ToyTask) -> None:
    splits = {"train": Rows(["a", "b"], None, [0.1, 4.9]), "dev": Rows(["c"], None, [1.0])}
    task = toy_task(labels=())
    assert task.describe_labels(splits) == "regression, 0.1 to 4.9"
    assert task.count_classes(splits) == {}
    assert task.data_warnings(splits) == []
