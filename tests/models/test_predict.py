"""Predictions of torch models and ONNX sessions, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data.tokens import Batch, tokenize
from spdtool.models.predict import evaluate, evaluate_split, onnx_forward, predict, to_device, torch_forward
from spdtool.tasks.task import Task


def logits_of(batch: Batch) -> np.ndarray:
    """Return logits that identify the row, in place of a model."""
    total = (batch["input_ids"] * batch["attention_mask"]).sum(1)
    return np.stack([total, -total], axis=1).astype(np.float32)


def test_predictions_come_in_the_order_of_the_rows(toys: ModuleType) -> None:
    encoded = tokenize(toys.tokenizer(), toys.rows(17), 32)
    expected = np.concatenate([logits_of(encoded.collate([row])) for row in range(17)])
    for batch_size in (1, 3, 64):
        np.testing.assert_array_equal(predict(logits_of, encoded, batch_size), expected, err_msg=str(batch_size))


def test_every_dev_set_is_evaluated_and_no_other_split(toys: ModuleType, toy_task: Callable[..., Task]) -> None:
    tokenizer = toys.tokenizer()
    splits = {
        "train": tokenize(tokenizer, toys.rows(4), 16),
        "dev": tokenize(tokenizer, toys.rows(10), 16),
        "dev_mm": tokenize(tokenizer, toys.rows(7, seed=3), 16),
    }

    def always_good(batch: Batch) -> np.ndarray:
        return np.tile([0.0, 1.0], (len(batch["labels"]), 1))

    task = toy_task()
    assert evaluate(task, always_good, splits) == {"score": 0.5, "accuracy": 0.5, "accuracy_mm": pytest.approx(3 / 7)}
    assert evaluate_split(task, always_good, splits["train"]) == {"score": 0.5, "accuracy": 0.5}


def test_a_torch_model_predicts_in_eval_mode_and_returns_to_its_mode(
    toys: ModuleType, tiny_bert: Callable[..., Any]
) -> None:
    model = tiny_bert(dropout=0.5)
    encoded = tokenize(toys.tokenizer(), toys.rows(12), 16)
    in_eval_mode = predict(torch_forward(model), encoded)
    model.train()
    np.testing.assert_array_equal(predict(torch_forward(model), encoded), in_eval_mode)
    assert all(layer.training for layer in model.modules())
    row_by_row = [torch_forward(model)(encoded.collate([row], 16)) for row in range(12)]
    np.testing.assert_allclose(np.concatenate(row_by_row), in_eval_mode, atol=1e-5)


def test_an_onnx_session_gets_only_the_inputs_that_it_names() -> None:
    class Session:
        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": name}) for name in ("input_ids", "attention_mask")]

        def run(self, _outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert set(inputs) == {"input_ids", "attention_mask"}
            return [logits_of(inputs)]

    batch = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}
    further = {"token_type_ids": np.zeros((2, 3), np.int64), "labels": np.zeros(2)}
    forward = onnx_forward(Session())  # type: ignore[arg-type]
    np.testing.assert_array_equal(forward(batch | further), logits_of(batch))


def test_a_batch_becomes_tensors() -> None:
    tensors = to_device({"input_ids": np.ones((2, 3), np.int64)}, "cpu")
    assert torch.equal(tensors["input_ids"], torch.ones(2, 3, dtype=torch.int64))
