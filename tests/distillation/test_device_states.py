"""The teacher's hidden states on the device: the same as those of a look at each batch, where they fit."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.distillation import device_states
from spdtool.distillation.device_states import compute_device_states, count_state_bytes, should_keep_on_device
from spdtool.distillation.lesson import DistillationLesson, TokenizedModel
from spdtool.distillation.losses import WHOLE_BATCH
from spdtool.models.layers import install_capture_hooks
from spdtool.models.predict import to_device
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Grafting, Loss
from spdtool.tasks.classification import Classification

GPU = torch.device("cuda")


@pytest.fixture
def rows(toys: Any) -> data.Encoded:
    return data.encode_splits(toys.tokenizer(), {"train": toys.rows(12)}, 32)["train"]


def test_a_step_reads_what_the_teacher_would_compute(toys: Any, rows: data.Encoded) -> None:
    student, teacher = toys.bert(2), toys.bert(2, seed=1)
    for model in (student, teacher):
        install_capture_hooks(model)
    pair = [TokenizedModel(model, toys.tokenizer()) for model in (student, teacher)]
    lesson = DistillationLesson("prune", Distilled(), *pair, seed=0, logit_loss=Classification.logit_loss)
    numbered, states = compute_device_states(
        rows, teacher, lesson.compute_teacher_outputs, lesson.compared_layers, nullcontext()
    )
    for numbers in ([0, 5, 11], [3], list(range(12))):
        expected = lesson.loss(to_device(rows.collate(np.array(numbers)), "cpu"), 0.5, WHOLE_BATCH)
        lesson.device_states = states
        batch = to_device(numbered.collate(np.array(numbers)), "cpu")
        read = lesson.loss(batch, 0.5, WHOLE_BATCH)
        lesson.device_states = None
        for name, term in expected.items():
            torch.testing.assert_close(read[name], term, rtol=2e-2, atol=1e-5)
        torch.testing.assert_close(read["logits"], expected["logits"])  # logits are float32


def test_they_are_kept_where_they_fit_and_save_time(
    toys: Any, rows: data.Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = count_state_bytes(rows, toys.bert(2), (0, 1, 2))
    assert size == 2 * int(rows.lengths.sum()) * 3 * 32
    free = 10 * size
    monkeypatch.setattr(device_states, "free_device_memory", lambda _: free)

    def decide(
        recipe: Recipe | None = None,
        section: Distilled | None = None,
        target: torch.device = GPU,
        precision: str = "bf16",
        of: data.Encoded = rows,
    ) -> bool:
        return should_keep_on_device(
            recipe or Recipe(), section or Distilled(epochs=2), of, size, target, precision=precision
        )

    assert decide()
    assert decide(section=Distilled(epochs=2, grafting=Grafting(start=0.5)))
    refusals = {
        "no room": decide(Recipe(teacher_states_share=0.09)),
        "none wanted": decide(Recipe(teacher_states_share=0.0)),
        "one epoch": decide(section=Distilled(epochs=1, batch_size=4)),
        "attention": decide(section=Distilled(epochs=2, loss=Loss(attention=1.0))),
        "padding counts": decide(section=Distilled(epochs=2, loss=Loss(mask_padding=False))),
        "no states": decide(section=Distilled(epochs=2, loss=Loss(hidden=0.0))),
        "a CPU": decide(target=torch.device("cpu")),
        "float32": decide(precision="no"),
        "logits of each token": decide(of=dataclasses.replace(rows, labels_are_positions=True)),
        "few of many rows without labels": decide(
            section=Distilled(epochs=2, batch_size=4), of=data.mix_rows(rows, rows, per_epoch=1)
        ),
    }
    assert not any(refusals.values()), refusals
