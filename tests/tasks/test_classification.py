"""Single-label classification: label order of a model, losses, predictions, and class counts in the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from spdtool.data.dataset import Rows
from spdtool.errors import DataError
from spdtool.tasks.task import Task

ToyTask = Callable[..., Task]


def splits_of(train: Sequence[int], dev: Sequence[int]) -> dict[str, Rows]:
    """Make splits with these labels and distinct texts."""
    first = [f"train {row}" for row in range(len(train))], [f"dev {row}" for row in range(len(dev))]
    return {"train": Rows(first[0], None, train), "dev": Rows(first[1], None, dev)}


def test_labels_follow_the_order_of_the_models_names(toy_task: ToyTask) -> None:
    task = toy_task(labels=("not_entailment", "entailment"))
    splits = {"train": Rows(["a", "b", "c"], None, [0, 1, 1])}
    aligned = task.align_labels(splits, ["ENTAILMENT", "not entailment"])
    assert list(aligned["train"].labels) == [1, 0, 0]
    assert splits["train"].labels == [0, 1, 1], "the rows that came in are as they were"
    for names in (["not-entailment", "entailment"], ["LABEL_0", "LABEL_1"]):
        assert task.align_labels(splits, names)["train"].labels == [0, 1, 1]


def test_the_positive_class_is_the_data_sets_wherever_the_model_has_it(toy_task: ToyTask) -> None:
    gold, predicted = [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]  # 1 is entailment
    for names in (["not_entailment", "entailment"], ["entailment", "not_entailment"]):
        task = toy_task(labels=("not_entailment", "entailment"), metrics=("f1",))
        order = task.label_order(names)
        aligned = task.align_labels(splits_of(gold, gold), names)["dev"]
        logits = np.eye(2)[[order[label] for label in predicted]]
        assert task.score_labels(logits, np.asarray(aligned.labels))["f1"] == pytest.approx(2 / 3), names


def test_one_class_alone_is_refused(toy_task: ToyTask) -> None:
    with pytest.raises(DataError, match="every training row of 'toy' has the label 'good'"):
        toy_task().check_training_rows(Rows(["a", "b"], None, [1, 1]))


def test_the_gold_loss_is_the_cross_entropy(toy_task: ToyTask) -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = -torch.log_softmax(logits, 1)[[0, 1], [0, 0]].mean()
    assert torch.equal(toy_task().gold_loss(logits, torch.tensor([0, 0])), expected)


def test_the_baseline_is_the_majority_class(toy_task: ToyTask) -> None:
    rows = Rows(list("abcde"), None, np.array([2, 1, 1, 0, 1]))
    task = toy_task(labels=("a", "b", "c"), metrics=("accuracy", "f1_macro"))
    assert task.baseline(rows) == task.score_labels(np.eye(3)[np.full(5, 1)], rows.labels)
    assert task.baseline(rows)["accuracy"] == 0.6


def test_a_changed_class_is_worse_only_where_it_was_right(toy_task: ToyTask) -> None:
    before, after, gold = np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[1, 1, 1, 1]], np.array([0, 1, 1, 0])
    changed, worsened = toy_task().compare_predictions(before, after, Rows(list("abcd"), None, gold), 0.1)
    assert changed.tolist() == [True, True, False, False]
    assert worsened.tolist() == [True, False, False, False]


def test_classes_are_counted_in_train_and_dev(toy_task: ToyTask) -> None:
    task, splits = toy_task(labels=("neg", "pos")), splits_of([0, 1, 1], [1])
    assert task.describe_labels(splits).startswith("2 classes: neg 1, pos 2; dev: neg 0, pos 1; always the commonest")
    assert task.count_classes(splits) == {"train": {"neg": 1, "pos": 2}, "dev": {"neg": 0, "pos": 1}}


def test_of_many_classes_the_first_are_listed(toy_task: ToyTask) -> None:
    names = tuple(f"c{number:02}" for number in range(30))
    line = toy_task(labels=names).describe_labels(splits_of(range(30), range(30)))
    assert line.startswith("30 classes: c00 1, c01 1,")
    assert "c07 1 and 22 more; always" in line


def test_likely_mistakes_in_the_data_are_reported(toy_task: ToyTask) -> None:
    cases: list[tuple[tuple[str, ...], dict[str, Rows], list[str]]] = [
        (("a", "b"), splits_of([0, 1], [0, 1]), []),
        (("a", "b"), splits_of([0, 1], [0, 0]), ["no row of dev has the label 'b'"]),
        (("a", "b", "c"), splits_of([1, 1], [0, 1]), ["no row of train has the label 'a', 'c'", "no row of dev has"]),
        (
            ("No", "no", "yes"),
            splits_of([0, 1, 2], [0, 1, 2]),
            ["the labels 'No', 'no' differ by case, spaces"],
        ),
        (("pos", " pos"), splits_of([0, 1], [0, 1]), ["the labels 'pos', ' pos' differ"]),
        (("NA", "b", "nan"), splits_of([0, 1, 2], [0, 1, 2]), ["the label 'NA', 'nan' is taken for a class"]),
        (
            ("a", "b"),
            {"train": Rows(["x", "y"], None, [0, 1]), "dev": Rows(["y", "z"], None, [0, 1])},
            ["1 of 2 dev rows have a text that is in train too"],
        ),
        (
            ("0,5", "1,5", "10 %"),
            splits_of([0, 1, 2], [0, 1, 2]),
            ["the labels '0,5', '1,5', '10 %' look like numbers"],
        ),
        (
            ("a", "b"),
            {"train": Rows(["x", "x", "y"], None, [0, 1, 1]), "dev": Rows(["w", "z"], None, [0, 1])},
            ["2 of 3 training rows have a text that stands there with another label too"],
        ),
        (("a", "b"), splits_of([0] * 29 + [1], [0, 1]), ["1 of the labels have one training row each: 'b'"]),
    ]
    for labels, splits, expected in cases:
        warnings = toy_task(labels=labels).data_warnings(splits)
        assert len(warnings) == len(expected), warnings
        for line, start in zip(warnings, expected, strict=True):
            assert line.startswith(start)
