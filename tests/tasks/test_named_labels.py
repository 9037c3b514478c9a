"""Label names: those of a data set are matched with those of a model, one to one, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spdtool.data.dataset import Rows
from spdtool.errors import ModelError
from spdtool.tasks.named_labels import soften
from spdtool.tasks.task import Task

ToyTask = Callable[..., Task]


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
        rows = {
            "train": Rows(["train 0", "train 1", "train 2"], None, [0, 1, 0]),
            "dev": Rows(["dev 0", "dev 1"], None, [1, 0]),
        }
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


def test_softened_distributions_are_float32_whatever_the_logits() -> None:
    logits = torch.tensor([[0.0, 2.0], [4.0, 0.0]], dtype=torch.bfloat16)
    softened, target = soften(logits, -logits, 2.0)
    assert softened.dtype == target.dtype == torch.float32
    torch.testing.assert_close(softened.exp(), torch.tensor([[0.0, 1.0], [2.0, 0.0]]).softmax(-1))
    torch.testing.assert_close(target, torch.tensor([[0.0, -1.0], [-2.0, 0.0]]).softmax(-1))
