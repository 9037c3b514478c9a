"""Single-label classification: label order of a model, losses, predictions, and class counts in the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from spdtool.data.dataset import Rows
from spdtool.errors import DataError, ModelError
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


def test_labels_map_one_to_one_exact_names_first(toy_task: ToyTask) -> None:
    cases = [
        (("A", "a"), ["A", "a"], [0, 1]),
        (("A", "a"), ["a", "A"], [1, 0]),
        (("not spam", "not-spam"), ["not-spam", "not spam"], [1, 0]),
        (("Yes", "no", "yes"), ["yes", "no", "Yes"], [2, 1, 0]),
        (("not-spam", "spam"), ["Spam", "Not spam"], [1, 0]),
        (("neg", "pos"), ["LABEL_0", "LABEL_1"], [0, 1]),
        (("0", "1"), ["entailment", "not_entailment"], [0, 1]),
        (("0", "1"), ["1", "0"], [1, 0]),
        (("0", "1", "2"), ["b", "a", "c"], [0, 1, 2]),
    ]
    for labels, names, order in cases:
        assert toy_task(labels=labels).label_order(names) == order, (labels, names)


def test_a_model_may_have_classes_that_no_row_has(toy_task: ToyTask) -> None:
    cases = [
        (("neg", "pos"), ["pos", "neutral", "neg"], ("neg", "pos", "neutral"), [2, 0, 1]),
        (("0", "2"), ["LABEL_0", "LABEL_1", "LABEL_2"], ("0", "2", "1"), [0, 2, 1]),
        (("0", "1"), ["0", "1", "2"], ("0", "1", "2"), [0, 1, 2]),
    ]
    for labels, names, widened, order in cases:
        task = toy_task(labels=labels, metrics=("accuracy", "f1")).widen(names)
        assert task.dataset.labels == widened
        assert task.label_order(names) == order
        assert task.dataset.metrics == ("accuracy", "f1_macro")
        for metric_name, metric in (("accuracy", "accuracy"), ("f1", "f1_macro")):
            narrow = toy_task(labels=labels, metrics=("accuracy", "f1"))
            narrow.metric = metric_name
            assert narrow.widen(names).metric == metric
        rows = splits_of([0, 1, 0], [1, 0])
        aligned = task.align_labels(rows, names)["dev"]
        assert 0 < task.baseline(aligned)["score"] < 1
        assert any("no row of train has the label" in line for line in task.data_warnings(rows))
    for labels, names in ((("a", "b"), ["b", "a"]), (("a", "b"), ["x", "y", "z"]), (("a", "b", "c"), ["a", "b"])):
        task = toy_task(labels=labels)
        assert task.widen(names) is task


def test_the_reason_for_another_number_of_labels_is_named(toy_task: ToyTask) -> None:
    cases = [
        (("bad", "bad ", "good"), ["bad", "good"], "surrounding spaces only: 'bad' and 'bad '"),
        (("caf\u00e9", "cafe\u0301", "bar"), ["bar", "caf\u00e9"], "their Unicode form only"),
        (("0", "1"), ["LABEL_0"], "--set regression=true"),
        (("a", "b"), ["a"], "fine-tuned on this task"),
    ]
    for labels, names, hint in cases:
        with pytest.raises(ModelError) as error:
            toy_task(labels=labels).label_order(names)
        assert hint in str(error.value.hint), labels
    with pytest.raises(ModelError) as error:
        toy_task(labels=()).label_order(["a", "b"])
    assert "regression=false" in str(error.value.hint)


def test_ambiguous_or_unknown_labels_are_refused_with_both_lists(toy_task: ToyTask) -> None:
    cases = [
        (("A", "a"), ["a", "b"]),
        (("a", "b"), ["A", "a"]),
        (("A", "a"), ["a", "a"]),
        (("not spam", "not-spam"), ["not_spam", "NOT SPAM"]),
        (("1", "2", "10"), ["neg", "neutral", "pos"]),
        (("neg", "pos"), ["positive", "negative"]),
        (("neg", "pos"), ["LABEL_1", "LABEL_0"]),
    ]
    for labels, names in cases:
        with pytest.raises(ModelError) as error:
            toy_task(labels=labels).align_labels({"train": Rows(["a"], None, [0])}, names)
        assert ", ".join(labels) in error.value.message
        assert ", ".join(names) in error.value.message
        assert "id2label" in str(error.value.hint)


def test_a_model_with_another_number_of_labels_is_refused(toy_task: ToyTask) -> None:
    for labels, names in ((("a", "b"), ["a", "b", "c"]), (("a", "b", "c"), ["x"])):
        with pytest.raises(ModelError, match=f"the model has {len(names)} labels"):
            toy_task(labels=labels).label_order(names)


def test_only_placeholders_and_numbers_match_by_position(toy_task: ToyTask) -> None:
    task = toy_task(labels=("bad", "good"))
    assert task.matches_by_position(["LABEL_0", "LABEL_1"])
    assert task.matches_by_position(["0", "1"])
    assert not task.matches_by_position(["good", "bad"])
    assert not toy_task(labels=("0", "1")).matches_by_position(["1", "0"])
    assert toy_task(labels=("0", "1")).matches_by_position(["no", "yes"])


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
    ]
    for labels, splits, expected in cases:
        warnings = toy_task(labels=labels).data_warnings(splits)
        assert len(warnings) == len(expected), warnings
        for line, start in zip(warnings, expected, strict=True):
            assert line.startswith(start)
