"""A student with a trimmed vocabulary: its checkpoint, its scores and refused settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import spdtool
from spdtool.errors import RecipeError
from spdtool.models.load import load_model, load_tokenizer
from spdtool.run.folder import Run
from spdtool.stages import finetune, plan
from spdtool.tasks.prepare import find_task

EPOCHS = ("prune.events=1", *(f"{stage}.epochs=2" for stage in ("teacher", "prune", "distill", "finetune")))


@pytest.mark.slow
def test_a_trimmed_student_answers_kept_texts_as_the_whole_one(toy_run: Callable[..., Run]) -> None:
    run = toy_run(*EPOCHS, "max_rows=3", "finetune.vocabulary=data", until="export")
    full_run = toy_run(*EPOCHS, "max_rows=3", until="finetune", folder="whole")
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
        *EPOCHS, "max_rows=2", "finetune.vocabulary=data", f"finetune.vocabulary_texts={file}", until="distill"
    )
    finetune.finetune(run)
    assert {"cold", "rude", "quite"} <= load_tokenizer(run.path / "finetune").get_vocab().keys()


def test_a_file_of_texts_that_cannot_be_read_is_refused_in_the_plan(toy_run: Callable[..., Run]) -> None:
    run = toy_run("finetune.vocabulary=data", "finetune.vocabulary_texts=/no/such/file.txt")
    with pytest.raises(RecipeError, match="vocabulary_texts"):
        plan.make_plan(run)
