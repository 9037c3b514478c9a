"""Submissions to GLUE: the official layout, labels as the official files write them, and refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spdtool.errors import DataError, RecipeError
from spdtool.run.records import BundleManifest
from spdtool.serving import glue


class FakeClassifier:
    """A stub that answers in turn and records its requests."""

    bundle = SimpleNamespace(folder=Path("bundle"))

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.texts: list[list[str] | None] = []

    def logits(self, texts: list[str], pairs: list[str] | None, *, batch_size: int) -> np.ndarray:
        assert batch_size == 4
        self.texts = [texts, pairs]
        return np.zeros((len(texts), 1))

    def decide(self, logits: np.ndarray) -> list[Any]:
        return self.answers[: len(logits)]


def submit(monkeypatch: pytest.MonkeyPatch, task: str, file: Path, answers: list[Any]) -> list[str]:
    monkeypatch.setattr(glue, "read_manifest", lambda _folder: BundleManifest.model_construct(task=task))
    return list(glue.submission_lines(FakeClassifier(answers), file, 4))  # type: ignore[arg-type]


def test_labels_and_indices_are_those_of_the_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test.tsv"
    cases: list[tuple[str, str, list[Any], list[str]]] = [
        ("rte", "index\tsentence1\tsentence2\n0\ta\tb\n1\tc \"q\tr\n", ["entailment", "not_entailment"],
         ["0\tentailment", "1\tnot_entailment"]),
        ("cola", "index\tsentence\n7\ta\n9\tb\n", ["acceptable", "unacceptable"], ["7\t1", "9\t0"]),
        ("mrpc", "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t5\t6\ta\tb\n", ["equivalent"], ["0\t1"]),
        ("qqp", "id\tquestion1\tquestion2\n3\ta\tb\n", ["not_duplicate"], ["3\t0"]),
        ("stsb", "index\tgenre\tsentence1\tsentence2\n0\tx\ta\tb\n1\tx\ta\tb\n", [5.2, 2.25], ["0\t5.000", "1\t2.250"]),
        ("sst2", "sentence\na\nb\n", ["positive", "negative"], ["0\t1", "1\t0"]),
    ]  # fmt: skip
    for task, content, answers, expected in cases:
        file.write_text(content, "utf-8")
        assert submit(monkeypatch, task, file, answers) == ["index\tprediction", *expected], task


def test_what_cannot_be_submitted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test.tsv"
    file.write_text("index\tsentence\n0\ta\n1\t \n")
    with pytest.raises(RecipeError, match="the model is of the task 'local'"):
        submit(monkeypatch, "local", file, [])
    with pytest.raises(DataError, match="has no 'sentence1' and 'sentence2'"):
        submit(monkeypatch, "rte", file, [])
    with pytest.raises(DataError, match="line 3: a text is empty"):
        submit(monkeypatch, "sst2", file, ["positive"] * 2)
    file.write_text("index\tsentence\n0\ta\n")
    with pytest.raises(DataError, match="the model answers 'LABEL_1'"):
        submit(monkeypatch, "sst2", file, ["LABEL_1"])
