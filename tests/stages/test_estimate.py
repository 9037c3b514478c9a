"""What a plan counts before anything is tokenized for training."""

from __future__ import annotations

import math

import pytest
import toys

from spdtool.stages import estimate
from spdtool.tasks.prepare import task_of


def test_windows_of_long_texts_are_counted_as_the_training_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, tokenizer = toys.recipe(max_length=16, window_stride=4), toys.tokenizer()
    for dataset, rows in (
        (toys.question_dataset(), toys.question_rows(30, longest=60)),
        (toys.tag_dataset(), toys.tag_rows(30, longest=50)),
    ):
        task = task_of(dataset)
        encoded = task.encode(tokenizer, {"train": rows}, recipe)["train"]
        assert estimate.count_inputs(task, recipe, tokenizer, rows) == encoded.epoch_rows > len(rows), dataset.name
        tokens = min(float(encoded.lengths.mean()) * estimate.PADDED, recipe.max_length)
        assert estimate.count_tokens(task, recipe, tokenizer, rows) == pytest.approx(tokens), dataset.name
        with monkeypatch.context() as patch:
            patch.setattr(estimate, "SAMPLED_TEXTS", 10)
            sampled = estimate.count_inputs(task, recipe, tokenizer, rows)
        assert math.isclose(sampled, encoded.epoch_rows, rel_tol=0.3), dataset.name
    task, rows = task_of(toys.dataset()), toys.rows(30, longest=60)
    assert estimate.count_inputs(task, recipe, tokenizer, rows) == len(rows)


def test_tokens_of_an_epoch_are_those_of_rows_with_and_without_labels() -> None:
    recipe, tokenizer, task = toys.recipe(), toys.tokenizer(), task_of(toys.dataset())
    splits = {"train": toys.rows(30, shortest=2, longest=2)}
    inputs = {"train": 30, "unlabeled": 10}
    tokens = 5 * estimate.PADDED  # [CLS], three words, [SEP]
    assert estimate.count_epoch_tokens(task, recipe, tokenizer, splits, inputs) == pytest.approx(tokens)
    splits["unlabeled"] = toys.rows(10, shortest=10, longest=10)
    mixed_tokens = (30 * 5 + 10 * 13) / 40 * estimate.PADDED
    assert estimate.count_epoch_tokens(task, recipe, tokenizer, splits, inputs) == pytest.approx(mixed_tokens)
