"""Multi-label classification: losses by their formulas, thresholds, label order, and the stock pipeline."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data.dataset import Dataset, Rows
from spdtool.data.tokens import Encoded
from spdtool.errors import DataError, ModelError
from spdtool.recipe.training import Loss
from spdtool.tasks.decision import SeveralLabels, find_decision
from spdtool.tasks.multilabel import Multilabel
from spdtool.tasks.prepare import task_of

NAMES = ("anger", "joy", "fear")


def task(**fields: Any) -> Multilabel:
    dataset = Dataset("mine", "multilabel", ("text",), NAMES, ("f1_micro", "f1_macro", "map"), lambda _data, _seed: {})
    multilabel = task_of(replace(dataset, **fields))
    assert isinstance(multilabel, Multilabel)
    return multilabel


def encoded(labels: np.ndarray) -> Encoded:
    count = len(labels)
    return Encoded(
        {"input_ids": np.ones(count, np.int64)}, np.arange(count + 1), labels, {"input_ids": 0}, pad_left=False
    )


LOGITS = np.array([[2.0, -1.0, 0.5], [-3.0, 1.0, -0.5], [0.2, -0.2, 3.0], [-1.0, -2.0, -3.0]], np.float32)
GOLD = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], np.float32)


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("per_label", [False, True])
def test_the_logit_loss_is_the_divergence_of_each_label_mixed_with_the_gold_labels(
    hardness: float, per_label: bool
) -> None:
    teacher = torch.tensor(LOGITS.tolist()).flip(0)
    soft = gold = 0.0
    temperature = 2.0
    for row in range(4):
        for label in range(3):
            p = 1 / (1 + math.exp(-float(teacher[row, label]) / temperature))
            q = 1 / (1 + math.exp(-float(LOGITS[row, label]) / temperature))
            soft += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            probability = 1 / (1 + math.exp(-float(LOGITS[row, label])))
            gold -= math.log(probability if GOLD[row, label] else 1 - probability)
    divisor, factor = (12, 1.0) if per_label else (4, temperature**2)
    expected = hardness * soft / divisor * factor + (1 - hardness) * gold / divisor
    loss = Loss(temperature=temperature, hardness=hardness, per_label=per_label)
    student, labels = torch.tensor(LOGITS.tolist()), torch.tensor(GOLD.tolist())
    assert float(Multilabel.logit_loss(student, teacher, labels, loss)) == pytest.approx(expected, rel=1e-5)
    assert float(Multilabel.logit_loss(teacher, teacher, labels, Loss())) == pytest.approx(0, abs=1e-6)


def test_scores_are_of_the_answers_above_the_thresholds() -> None:
    multilabel = task()
    assert multilabel.score(LOGITS, encoded(GOLD))["f1_micro"] == 1.0, (
        "without thresholds by the best ones for the rows"
    )
    multilabel.adopt_settings({"thresholds": [0.0, 0.0, 0.0]})
    scores = multilabel.score(LOGITS, encoded(GOLD))
    assert scores["f1_micro"] == pytest.approx(2 * 4 / (5 + 5))
    assert scores["score"] == pytest.approx((scores["f1_micro"] + scores["f1_macro"] + scores["map"]) / 3)
    multilabel.adopt_settings({"thresholds": [1.0, 0.0, -0.6]})
    better = multilabel.score(LOGITS, encoded(GOLD))
    assert better["f1_micro"] == 1.0
    assert better["map"] == scores["map"], "a ranking knows no threshold"
    assert multilabel.answers(LOGITS, encoded(GOLD), NAMES) == [["anger", "fear"], ["joy", "fear"], ["fear"], []]
    assert multilabel.gold_answers(encoded(GOLD), NAMES) == multilabel.answers(LOGITS, encoded(GOLD), NAMES)
    classes = multilabel.score_classes(LOGITS, encoded(GOLD), NAMES)
    assert {name: (scores.f1, scores.rows) for name, scores in classes.items()} == {
        "anger": (1.0, 1),
        "joy": (1.0, 1),
        "fear": (1.0, 3),
    }


def test_a_loaded_folder_answers_by_the_exported_settings() -> None:
    multilabel = task()
    settings = multilabel.settings(LOGITS, encoded(GOLD))
    multilabel.adopt_settings(settings)
    decision = SeveralLabels(NAMES, settings)
    assert decision.decide(LOGITS) == multilabel.answers(LOGITS, encoded(GOLD), NAMES)
    np.testing.assert_allclose(decision.probabilities(LOGITS), multilabel.probabilities(LOGITS), atol=1e-6)
    assert multilabel.score(LOGITS, encoded(GOLD))["f1_macro"] == 1.0
    assert SeveralLabels(NAMES).decide(LOGITS) != decision.decide(LOGITS), "a lost threshold shows"


def test_invalid_settings_are_refused() -> None:
    for settings in ({"thresholds": [0.0]}, {"thresholds": "x"}, {"thresholds": [0, 0, None]}, {"temperature": 0}):
        with pytest.raises(ModelError, match="manifest.json has the"):
            SeveralLabels(NAMES, settings)  # type: ignore[arg-type]


def test_columns_follow_the_order_of_a_models_labels() -> None:
    rows = {"dev": Rows(["a", "b"], None, np.array([[1, 0, 0], [0, 1, 1]], np.uint8))}
    aligned = task().align_labels(rows, ["fear", "anger", "joy"])["dev"]
    assert np.asarray(aligned.labels).tolist() == [[0, 1, 0], [1, 0, 1]]


def test_a_label_that_only_a_model_has_gets_a_column_of_zeros() -> None:
    rows = {"dev": Rows(["a", "b"], None, np.array([[1, 0, 0], [0, 1, 1]], np.uint8))}
    names = ["awe", "fear", "anger", "joy"]
    widened = task().widen(names)
    assert set(widened.dataset.labels) == set(names)
    assert np.asarray(widened.align_labels(rows, names)["dev"].labels).tolist() == [[0, 0, 1, 0], [0, 1, 0, 1]]
    assert widened.count_classes(rows)["dev"] == {"anger": 1, "joy": 1, "fear": 1, "awe": 0}


def test_the_baseline_is_the_best_constant_answer() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])
    multilabel = task(metrics=("f1_micro",))
    assert multilabel.baseline(encoded(labels.astype(np.float32)))["score"] == pytest.approx(2 * 3 / (4 + 5))
    assert multilabel.baseline(Rows(["a"] * 4, None, labels))["score"] == pytest.approx(2 * 3 / (4 + 5))
    text = multilabel.describe_labels({"train": Rows(["a"] * 4, None, labels), "dev": Rows(["a"] * 4, None, labels)})
    assert text.startswith("3 labels, 1.25 a row: anger 3, joy 1, fear 1; dev: anger 3")


def test_warnings_count_rows_without_labels_and_labels_without_rows() -> None:
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    splits = {"train": Rows(["a", "b", "c"], None, labels), "dev": Rows(["d", "e", "f"], None, labels)}
    lines = task().data_warnings(splits)
    assert "1 of 3 training rows have none of the labels" in lines
    assert "no row of train has the label 'fear'" in lines
    with pytest.raises(DataError, match="has the same labels"):
        task().check_training_rows(Rows(["a", "b"], None, labels[[0, 0]]))


def test_changes_for_the_worse_are_rows_with_fewer_right_labels() -> None:
    after = LOGITS.copy()
    after[0, 0], after[2, 0] = -1.0, -1.0
    changed, worse = task().compare_predictions(LOGITS, after, encoded(GOLD), 0.0)
    assert (changed.tolist(), worse.tolist()) == ([True, False, True, False], [True, False, False, False])


def test_the_stock_pipeline_gives_the_same_probabilities(toys: ModuleType) -> None:
    from transformers import pipeline

    names = dict(enumerate(NAMES))
    model = toys.bert(labels=3, id2label=names, problem_type="multi_label_classification")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pipeline's own
        stock = pipeline("text-classification", model=model, tokenizer=toys.tokenizer(), top_k=None, device="cpu")
        texts = ["a good film", "the bad book was cold", "very kind"]
        answers = stock(texts)
    batch = toys.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits.numpy()
    decision = find_decision({"problem_type": "multi_label_classification", "id2label": names})(NAMES)
    probabilities = decision.probabilities(logits)
    assert probabilities is not None
    for row, answer in enumerate(answers):
        by_name = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([by_name[name] for name in NAMES], probabilities[row], atol=1e-5)


def test_unlabelled_rows_learn_from_the_teacher_alone() -> None:
    from spdtool.data.tokens import LABELED
    from spdtool.distillation.losses import distillation_loss
    from spdtool.distillation.outputs import ModelOutputs
    from spdtool.tasks.classification import Classification
    from spdtool.tasks.regression import Regression

    generator = torch.Generator().manual_seed(0)
    marks = torch.tensor([True, False, True, False, False])
    cases = (
        (Multilabel, 3, torch.randint(0, 2, (5, 3), generator=generator).float()),
        (Classification, 3, torch.randint(0, 3, (5,), generator=generator)),
        (Regression, 1, torch.randn(5, generator=generator)),
    )
    section = Loss(hardness=0.4, regression_hardness=0.4, hidden=0)
    teacher_only = section.model_copy(update={"hardness": 1.0, "regression_hardness": 1.0})
    for kind, width, labels in cases:
        student, teacher = (torch.randn(5, width, generator=generator) for _ in range(2))
        batch = {"attention_mask": torch.ones(5, 2), "labels": labels, LABELED: marks}
        outputs = [ModelOutputs(logits, None, None) for logits in (student, teacher)]
        loss = distillation_loss(*outputs, batch, section, logit_loss=kind.logit_loss)["loss"]
        expected = 0.0
        for row in range(5):
            row_slice = slice(row, row + 1)
            rows_section = section if marks[row] else teacher_only
            expected += (
                float(kind.logit_loss(student[row_slice], teacher[row_slice], labels[row_slice], rows_section)) / 5
            )
        assert float(loss) == pytest.approx(expected, rel=1e-5), kind
        changed_batch = batch | {"labels": torch.where(marks.view(-1, *[1] * (labels.ndim - 1)), labels, 1 - labels)}
        changed_loss = distillation_loss(*outputs, changed_batch, section, logit_loss=kind.logit_loss)["loss"]
        assert torch.equal(loss, changed_loss), "a label that means nothing counts"
