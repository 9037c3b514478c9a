"""The teacher's logits are computed once, and teach the same as the teacher that looks at every batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spdtool import teacher_logits
from spdtool.distillation import observation
from spdtool.recipe import Loss, Prune
from spdtool.run import Run
from spdtool.stages import student
from spdtool.stages.prune import prune

# epsilon: where a gradient is nothing but rounding, AdamW would step by rounding alone
LOGITS_ALONE = ("prune.loss.hidden=0.0", "prune.epochs=2", "prune.dropout=0.0", "prune.epsilon=1e-4")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("term", ["hidden", "relation", "attention"])
def test_logits_suffice_only_where_nothing_else_is_read(term: str) -> None:
    loss = {"hidden": 0.0, "relation": 0.0, "attention": 0.0}
    assert teacher_logits.suffice(Prune(loss=Loss(**loss)), 100)
    assert not teacher_logits.suffice(Prune(loss=Loss(**loss | {term: 0.1})), 100)
    assert not teacher_logits.suffice(Prune(loss=Loss(**loss), max_steps=2), 100), "one run over all rows costs more"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that looks at a batch of the loss."""
    seen: list[Any] = []

    def observe(model: Any, *args: Any, **options: Any) -> observation.Observation:
        seen.append(model)
        return observation.observe(model, *args, **options)

    monkeypatch.setattr(student, "observe", observe)
    return seen


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.read("prune") / "model.safetensors")


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_a_phase_learns_the_same_without_looking_at_the_teacher(
    toy_run: Callable[..., Run], looks: list[Any], monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    sets = (*LOGITS_ALONE, f"prune.grafting.start={start}")
    cached = toy_run(*sets, until="teacher", folder="cached")
    prune(cached)
    assert len(set(map(id, looks))) == 1, "the student alone"
    looks.clear()
    plain = toy_run(*sets, until="teacher", folder="plain")
    monkeypatch.setattr(teacher_logits, "suffice", lambda *_: False)
    prune(plain)
    assert len(set(map(id, looks))) == 2
    ours, theirs = weights(cached), weights(plain)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)


def test_they_belong_to_the_teacher_and_the_rows(toy_run: Callable[..., Run], toys: Any) -> None:
    from spdtool import data, evaluation

    made: list[int] = []

    def logits_of(model: Any, rows: Any) -> Any:
        forward = evaluation.torch_forward(model)
        return teacher_logits.beside(rows, model, lambda batch: (made.append(1), forward(batch))[1])

    rows = data.tokenise(toys.tokenizer(), toys.rows(20), 32)
    other = data.tokenise(toys.tokenizer(), toys.rows(20, 1), 32)
    first = logits_of(toys.bert(), rows).beside[teacher_logits.COLUMN]
    assert made == [1]
    again = logits_of(toys.bert(), rows).beside[teacher_logits.COLUMN]
    assert made == [1]
    assert (first == again).all()
    logits_of(toys.bert(seed=1), rows)
    logits_of(toys.bert(), other)
    assert made == [1, 1, 1]
