"""Scores: predictions in the order of the rows, and each metric against its definition written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.models import predict as evaluation
from spdtool.models.predict import METRICS
from spdtool.tasks import Task

GOLD = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 1])
GUESS = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1])


def counts(gold: np.ndarray, guess: np.ndarray) -> tuple[int, int, int, int]:
    pairs = list(zip(gold.tolist(), guess.tolist(), strict=True))
    return pairs.count((1, 1)), pairs.count((0, 0)), pairs.count((0, 1)), pairs.count((1, 0))


def test_accuracy_f1_and_matthews_by_their_definitions() -> None:
    tp, tn, fp, fn = counts(GOLD, GUESS)
    assert METRICS["accuracy"](GOLD, GUESS) == pytest.approx((tp + tn) / 10)
    assert METRICS["f1"](GOLD, GUESS) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["matthews"](GOLD, GUESS) == pytest.approx((tp * tn - fp * fn) / root)
    other = 2 * tn / (2 * tn + fp + fn)
    assert METRICS["f1_macro"](GOLD, GUESS) == pytest.approx((METRICS["f1"](GOLD, GUESS) + other) / 2)


def test_correlations_by_their_definitions() -> None:
    gold, guess = np.array([0.0, 1, 2, 3, 5]), np.array([0.1, 0.9, 3.5, 2.9, 9])
    a, b = gold - gold.mean(), guess - guess.mean()
    assert METRICS["pearson"](gold, guess) == pytest.approx((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    ranks = np.array([0, 1, 3, 2, 4])
    assert METRICS["spearman"](gold, guess) == pytest.approx(METRICS["pearson"](np.arange(5.0), ranks))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("guess", [[2, 2, 2], [1, np.nan, 2], [1, np.inf, 2]])
def test_a_correlation_that_is_undefined_is_zero(name: str, guess: list[float]) -> None:
    assert METRICS[name](np.array([1.0, 2, 3]), np.array(guess)) == 0.0


@pytest.mark.parametrize("name", ["accuracy", "f1", "f1_macro", "matthews"])
@pytest.mark.parametrize("constant", [0, 1])
def test_a_model_that_always_says_the_same_has_a_score_and_no_warning(name: str, constant: int) -> None:
    value = METRICS[name](GOLD, np.full(10, constant))
    assert 0 <= value < 0.8


def logits_of(batch: data.Batch) -> np.ndarray:
    """A model whose logits tell which row it saw."""
    total = (batch["input_ids"] * batch["attention_mask"]).sum(1)
    return np.stack([total, -total], axis=1).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_predictions_come_in_the_order_of_the_rows(toys: Any, size: int) -> None:
    encoded = data.tokenise(toys.tokenizer(), toys.rows(17), 32)
    expected = np.concatenate([logits_of(encoded.collate([row])) for row in range(17)])
    np.testing.assert_array_equal(evaluation.predict(logits_of, encoded, size), expected)


def test_score_is_the_mean_of_the_tasks_metrics(toy_task: Callable[..., Task]) -> None:
    task = toy_task(metrics=("accuracy", "f1"))
    result = evaluation.score(task, np.eye(2)[GUESS], GOLD)
    assert result["accuracy"] == METRICS["accuracy"](GOLD, GUESS)
    assert result["f1"] == METRICS["f1"](GOLD, GUESS)
    assert result["score"] == pytest.approx((result["accuracy"] + result["f1"]) / 2)
    assert list(result) == ["score", "accuracy", "f1"]


def test_regression_takes_the_value_itself(toy_task: Callable[..., Task]) -> None:
    task = toy_task(labels=(), metrics=("pearson", "spearman"))
    gold = np.array([0.5, 2, 3.5], dtype=np.float32)
    assert evaluation.score(task, (gold * 2 + 1)[:, None], gold)["score"] == pytest.approx(1)


def test_a_further_dev_set_has_its_suffix_and_no_say_in_the_score(toys: Any, toy_task: Callable[..., Task]) -> None:
    task, tokenizer = toy_task(), toys.tokenizer()
    splits = {
        "train": data.tokenise(tokenizer, toys.rows(4), 16),
        "dev": data.tokenise(tokenizer, toys.rows(10), 16),
        "dev_mm": data.tokenise(tokenizer, toys.rows(7, seed=3), 16),
    }
    always = evaluation.evaluate(task, lambda batch: np.tile([0.0, 1.0], (len(batch["labels"]), 1)), splits)
    assert always == {"score": 0.5, "accuracy": 0.5, "accuracy_mm": pytest.approx(3 / 7)}


def test_a_torch_model_is_asked_in_eval_mode_and_left_as_it_was(toys: Any, tiny_bert: Callable[..., Any]) -> None:
    model = tiny_bert(dropout=0.5)
    encoded = data.tokenise(toys.tokenizer(), toys.rows(12), 16)
    calm = evaluation.predict(evaluation.torch_forward(model), encoded)
    model.train()
    np.testing.assert_array_equal(evaluation.predict(evaluation.torch_forward(model), encoded), calm)
    assert model.training
    assert all(layer.training for layer in model.modules())
    single = [evaluation.torch_forward(model)(encoded.collate([row], 16)) for row in range(12)]
    np.testing.assert_allclose(np.concatenate(single), calm, atol=1e-5)


def test_an_onnx_session_is_given_only_the_inputs_that_it_names() -> None:
    class Session:
        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": name}) for name in ("input_ids", "attention_mask")]

        def run(self, _outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert set(inputs) == {"input_ids", "attention_mask"}
            return [logits_of(inputs)]

    batch = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}
    extra = {"token_type_ids": np.zeros((2, 3), np.int64), "labels": np.zeros(2)}
    np.testing.assert_array_equal(evaluation.onnx_forward(Session())(batch | extra), logits_of(batch))


def test_a_batch_becomes_tensors() -> None:
    tensors = evaluation.to_device({"input_ids": np.ones((2, 3), np.int64)}, "cpu")
    assert torch.equal(tensors["input_ids"], torch.ones(2, 3, dtype=torch.int64))


def test_the_baseline_is_always_the_commonest_label(toys: Any) -> None:
    labels = np.array([2, 1, 1, 0, 1])
    task = toys.task(labels=("a", "b", "c"), metrics=("accuracy", "f1_macro"))
    assert evaluation.baseline(task, labels) == evaluation.score(task, np.eye(3)[np.full(5, 1)], labels)
    assert evaluation.baseline(task, labels)["accuracy"] == 0.6
    assert evaluation.baseline(toys.task(labels=()), np.array([0.5, 1.5, 4.0]))["score"] == 0
