"""`spdtool finetune`: the sparse student alone; the end of a whole run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spdtool
from spdtool.data import tokens as data
from spdtool.errors import RecipeError, StageMissing
from spdtool.models import predict as evaluation
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, load_tokenizer
from spdtool.pruning.allocation import zeros_in
from spdtool.run.folder import Run
from spdtool.stages import plan
from spdtool.stages.finetune import _keep_details, finetune
from spdtool.tasks.embedding import TeacherVectors
from spdtool.tasks.prepare import find_task
from spdtool.tasks.task import Task


@pytest.mark.parametrize("recipe", ["default", "reference"])
def test_a_whole_run_ends_in_an_ordinary_sparse_checkpoint(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], toys: ModuleType, recipe: str, stage_files: list[str]
) -> None:
    task = toy_task(dropout=0.1, pairs=True)
    run = toy_run(name=recipe, sparsity=0.9, until="finetune")
    folder = run.path / "finetune"
    assert sorted(path.name for path in run.path.iterdir() if path.name != ".lock") == [
        "distill", "finetune", "prune", "run.json", "teacher",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == stage_files
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, weight in find_prunable_weights(model).items():
        assert int((weight == 0).sum()) == zeros_in(weight.numel(), 0.9), name
    metrics = run.training_result("finetune")
    encoded = data.encode_splits(AutoTokenizer.from_pretrained(folder), task.dataset.load(None, 0), 32)
    assert evaluation.evaluate(task, evaluation.torch_forward(model), encoded) == metrics.dev
    assert set(run.record("finetune").inputs) == {"teacher", "distill"}
    config, teacher = (json.loads((f / "config.json").read_text("utf-8")) for f in (folder, run.path / "teacher"))
    assert config == teacher, "no trace of attention implementation or dropout"


def test_finetune_draws_only_student_layers_and_keeps_the_zeros(toy_run: Callable[..., Run]) -> None:
    run = toy_run(until="finetune")
    steps = [json.loads(line) for line in (run.path / "finetune" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in steps if event["event"] == "step"]
    assert len(steps) == 12
    assert {step["replacing_rate"] for step in steps} == {1.0}
    assert all(all(step["drawn"]) for step in steps)
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("distill", "finetune"))
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0) or "bias" in name, name


def test_it_is_refused_before_distill(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    run = toy_run(until="prune")
    with pytest.raises(StageMissing, match="no finished stage 'distill'"):
        finetune(run)
    assert not (run.path / ".finetune.partial").exists()


def test_a_sparse_run_learns_a_task_of_four_words(toy_run: Callable[..., Run], toy_task: Callable[..., Task]) -> None:
    """Four words decide the labels; at 80 % zeros the student must still have learnt them."""
    toy_task(train=256, dev=64)
    rates = {"teacher": 5e-3, "prune": 2e-3, "distill": 1e-3, "finetune": 1e-3}
    sets = [f"{stage}.learning_rate={rate}" for stage, rate in rates.items()]
    run = toy_run("teacher.epochs=6", *sets, sparsity=0.8, until="finetune")
    assert run.training_result("teacher").dev["accuracy"] > 0.9
    assert run.training_result("finetune").dev["accuracy"] > 0.85


TWO_ROWS = ("prune.events=1", *(f"{stage}.epochs=2" for stage in ("teacher", "prune", "distill", "finetune")))


@pytest.mark.slow
def test_a_trimmed_student_answers_kept_texts_as_the_whole_one(toy_run: Callable[..., Run]) -> None:
    run = toy_run(*TWO_ROWS, "max_rows=3", "finetune.vocabulary=data", until="export")
    full_run = toy_run(*TWO_ROWS, "max_rows=3", until="finetune", folder="whole")
    record = run.training_result("finetune").vocabulary
    assert record is not None
    assert full_run.training_result("finetune").vocabulary is None
    models = [load_model(each_run.path / "finetune") for each_run in (run, full_run)]
    tokenizers = [load_tokenizer(each_run.path / "finetune") for each_run in (run, full_run)]
    assert models[0].config.vocab_size == record.tokens == len(tokenizers[0])
    assert record.tokens < record.tokens_before == models[1].config.vocab_size
    texts = list(find_task(run.recipe).read_rows(run.recipe)["train"].first)
    with torch.no_grad():
        inputs = [tokenizer(texts, padding=True, return_tensors="pt") for tokenizer in tokenizers]
        logits = [model(**batch).logits for model, batch in zip(models, inputs, strict=True)]
    assert torch.equal(*logits)
    exported = spdtool.load(run.path / "export" / "bundle")
    assert isinstance(texts[0], str)
    np.testing.assert_allclose(exported.logits(texts), logits[0].numpy(), atol=1e-4)


def test_tokens_of_further_texts_are_kept(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("cold rude\nquite\n", "utf-8")
    run = toy_run(
        *TWO_ROWS, "max_rows=2", "finetune.vocabulary=data", f"finetune.vocabulary_texts={file}", until="distill"
    )
    finetune(run)
    assert {"cold", "rude", "quite"} <= load_tokenizer(run.path / "finetune").get_vocab().keys()


def test_a_file_of_texts_that_cannot_be_read_is_refused_in_the_plan(toy_run: Callable[..., Run]) -> None:
    run = toy_run("finetune.vocabulary=data", "finetune.vocabulary_texts=/no/such/file.txt")
    with pytest.raises(RecipeError, match="vocabulary_texts"):
        plan.make_plan(run)


def test_what_stands_beside_rows_outlives_a_new_encoding(toys: Any) -> None:
    tokenizer, rows = toys.tokenizer(), toys.rows(4)
    whole = data.tokenize(tokenizer, rows, 16)
    vectors = TeacherVectors(np.eye(4))
    assert _keep_details(replace(whole, details=vectors), whole).details is vectors
    own = TeacherVectors(np.zeros((4, 4)))
    assert _keep_details(replace(whole, details=vectors), replace(whole, details=own)).details is own
