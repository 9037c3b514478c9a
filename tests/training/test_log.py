"""The log of the prune stage: train and dev scores, intermediate students, rewound learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spdtool.data import tokens as data
from spdtool.models import predict as evaluation
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.training.log import TrainingLog

pytestmark = pytest.mark.slow  # it trains whole stages

LEAVE = ("prune.events=4", "prune.schedule=linear", "prune.save_at=[0.25, 0.375]")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_train_scores_are_logged_with_dev_scores(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.scored_train_rows=10", until="teacher")
    metrics = prune(run)
    assert all(0 <= entry.train["score"] <= 1 for entry in metrics.fit.evaluations)
    assert [entry.train for entry in metrics.fit.evaluations] == [
        event["train"] for event in events(run.path / "prune", "eval")
    ]
    assert metrics.train.keys() == metrics.dev.keys()


def test_without_scored_training_rows_there_are_no_train_scores(toy_run: Callable[..., Run]) -> None:
    metrics = prune(toy_run("prune.scored_train_rows=0", until="teacher"))
    assert metrics.train is None
    assert all(entry.train is None for entry in metrics.fit.evaluations)


def test_the_train_score_uses_a_sample_of_the_training_rows(toy_task: Any, toys: ModuleType) -> None:
    task, rows = toy_task(), toys.rows(40)
    encoded = data.tokenize(toys.tokenizer(), rows, 32)
    sample = encoded.sample(7, seed=3)
    assert len(sample) == 7
    assert encoded.sample(40, seed=3) is encoded
    matching_rows = [i for i in range(40) if any(rows.labels[i] == label for label in sample.labels)]
    assert len(matching_rows) >= 7
    lists = {tuple(encoded.collate([i])["input_ids"][0]) for i in range(40)}
    assert {tuple(sample.collate([i])["input_ids"][0]) for i in range(7)} <= lists
    forward = evaluation.torch_forward(toys.bert(2))
    assert evaluation.evaluate_split(task, forward, sample)["score"] in {hits / 7 for hits in range(8)}


def test_intermediate_students_have_exactly_their_zeros(toy_run: Callable[..., Run]) -> None:
    run = toy_run(*LEAVE, until="teacher")
    students = prune(run).students
    assert [entry.sparsity for entry in students] == [0.25, 0.375]
    pruned = {event["sparsity"]: event["step"] for event in events(run.path / "prune", "prune")}
    for entry in students:
        folder = run.path / "prune" / entry.folder
        model = load_model(folder)
        for name, weight in find_prunable_weights(model).items():
            assert int((weight == 0).sum()) == round(weight.numel() * entry.sparsity), name
        assert entry.step > pruned[entry.sparsity], "it was trained at that sparsity before it was left"
        assert entry.train is not None
    assert {file.path for file in run.record("prune").files} >= {"students/0.25/model.safetensors"}


def test_a_resumed_stage_saves_the_same_intermediate_students(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = toy_run(*LEAVE, until="teacher", folder="whole")
    expected = prune(uninterrupted)
    for stop in (5, 9):
        run = toy_run(*LEAVE, until="teacher", folder=f"stopped-{stop}", save_minutes=0.0)
        with monkeypatch.context() as patched:
            _stop_after(patched, stop)
            with pytest.raises(KeyboardInterrupt):
                prune(run)
        assert prune(run).students == expected.students
        for entry in expected.students:
            file = Path("prune") / entry.folder / "model.safetensors"
            actual, expected_weights = load_file(run.path / file), load_file(uninterrupted.path / file)
            assert all(torch.equal(actual[name], expected_weights[name]) for name in actual)


def test_the_learning_rate_is_rewound_at_each_event(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.rewind=0.1", "prune.warmup=0.0", "prune.epochs=4", "prune.learning_rate=1e-3", until="teacher")
    prune(run)
    rates = {event["step"]: event["learning_rate"] for event in events(run.path / "prune", "step")}
    later = [event for event in events(run.path / "prune", "prune") if event["step"] > 0]
    assert later
    for event in later:
        before, after = rates[event["step"]], rates[event["step"] + 1]
        assert before < 0.6e-3 < after
        assert after == pytest.approx(1e-3)


def _stop_after(patched: pytest.MonkeyPatch, step: int) -> None:
    write_step = TrainingLog.write_step

    def write_and_stop(log: TrainingLog, current_step: int, values: Any) -> None:
        write_step(log, current_step, values)
        if current_step == step:
            raise KeyboardInterrupt

    patched.setattr(TrainingLog, "write_step", write_and_stop)
