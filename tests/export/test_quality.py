"""The final quality report of teacher and student, on fabricated logits; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spdtool.data.dataset import Dataset, Rows
from spdtool.data.tokens import Encoded
from spdtool.export import quality
from spdtool.export.gates.reference import DevSets, Reference
from spdtool.recipe.fields import Recipe
from spdtool.report.quality import quality_content
from spdtool.run.records import Quality
from spdtool.tasks.prepare import task_of
from spdtool.tasks.scores.significance import Resampler
from spdtool.tasks.task import Task

NAMES = ("no", "yes")


def encoded(labels: np.ndarray) -> Encoded:
    count = len(labels)
    return Encoded(
        {"input_ids": np.ones(count, np.int64)}, np.arange(count + 1), labels, {"input_ids": 0}, pad_left=False
    )


class FakeReference(Reference):
    """A reference with given logits in place of a checkpoint."""

    def __init__(self, kind: str, dev: np.ndarray, test: np.ndarray, labels: np.ndarray, recipe: Recipe) -> None:
        dataset = Dataset("mine", kind, ("text",), NAMES, METRICS[kind], lambda _data, _seed: {})
        texts = {"dev": Rows([f"row {i}" for i in range(len(labels))], None, labels)}
        sets = DevSets(task_of(dataset), {"dev": encoded(labels)}, None, texts, encoded(labels))
        super().__init__(Path("gone"), sets, recipe)
        vars(self)["label_names"] = list(NAMES)
        self._dev_logits["cpu"] = {"dev": dev}
        self.test_logits = test

    def load_model(self, provider: str = "cpu", *, eager: bool = False) -> Any:
        return self.test_logits


METRICS = {"classification": ("accuracy",), "multilabel": ("f1_micro", "f1_macro", "map")}


def measured(monkeypatch: pytest.MonkeyPatch, kind: str, labels: np.ndarray, noise: float) -> Any:
    """Measure the quality of a confident teacher and of a student with noisy logits."""
    monkeypatch.setattr(quality, "torch_forward", lambda model, _provider: model)
    monkeypatch.setattr(quality, "predict", lambda logits, _rows: logits)
    generator, recipe = np.random.default_rng(0), Recipe()
    gold = np.eye(2)[labels] if labels.ndim == 1 else labels
    sure = (3 * (2 * gold - 1) + generator.normal(0, 2, gold.shape)).astype(np.float32)
    noisy = (sure + generator.normal(0, noise, gold.shape)).astype(np.float32)
    references = {
        "teacher": FakeReference(kind, sure, sure, labels, recipe),
        "student": FakeReference(kind, noisy, noisy, labels, recipe),
    }
    return quality.measure_quality(references, recipe, "cpu")  # type: ignore[arg-type]


def test_the_quality_of_a_classifier_has_all_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = np.arange(200) % 2
    result = measured(monkeypatch, "classification", labels, 4.0)
    final = result.final
    assert (final.rows, final.drawn, final.test.method) == (200, False, "mcnemar")
    assert final.test.p_value < 0.01
    assert final.difference.high < 0
    assert final.student_score.low < final.student["accuracy"] < final.student_score.high
    assert set(result.calibration) == {"dev", "test"}
    for pair in (result.calibration[split][role] for split in ("dev", "test") for role in ("teacher", "student")):
        assert pair.calibrated.nll <= pair.raw.nll
    assert result.temperatures["student"] > result.temperatures["teacher"]
    assert sum(count for _, _, count in result.confusion) == 200
    correct = sum(count for gold, predicted, count in result.confusion if gold == predicted)
    assert correct / 200 == pytest.approx(final.student["accuracy"])
    assert (result.dev_rows, len(result.differing)) == (200, 20)
    probabilities = [row.student_probability for row in result.differing]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(row.teacher != row.student for row in result.differing)
    content = quality_content(result)
    assert content.confusion.columns == ["gold", "no", "yes"]
    assert len(content.calibration.rows) == 4
    assert f"{result.differing_rows} of 200 dev rows" in content.differing.title


def test_several_labels_are_scored_by_their_thresholds_and_tested_by_a_bootstrap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = (np.random.default_rng(1).random((200, 2)) < (0.2, 0.6)).astype(np.float32)
    result = measured(monkeypatch, "multilabel", labels, 4.0)
    assert result.final.test.method == "bootstrap"
    assert result.final.difference.high < 0
    assert result.confusion == []
    assert result.calibration["dev"]["student"].raw.answers == 400
    assert {"no", "yes", "none", "no, yes"} >= {row.student for row in result.differing}


def test_test_rows_that_are_windows_are_counted_as_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Resampler(150, "texts", lambda drawn: float(np.mean(drawn)))
    monkeypatch.setattr(Task, "resampler", lambda *_: texts)
    final = measured(monkeypatch, "classification", np.arange(200) % 2, 4.0).final
    assert (final.rows, final.units) == (150, "texts")
    assert final.lines()[0] == ("test rows", "150 texts, from a file of their own; scored once, at the end")


def test_without_test_rows_the_dev_rows_select_and_report() -> None:
    assert quality_content(None).lines == []
    assert quality_content(Quality()).lines == [
        ("test rows", "none: the dev rows both picked the checkpoint and report its score")
    ]


def test_many_classes_are_shown_as_their_commonest_confusions() -> None:
    cells = [(f"c{i}", f"c{i}", 9) for i in range(20)] + [("c1", "c2", 3), ("c4", "c2", 5)]
    table = quality_content(Quality(confusion=cells)).confusion
    assert table.rows == [["c4", "c2", "5"], ["c1", "c2", "3"]]


def test_a_long_text_is_cut() -> None:
    assert len(quality._shorten("x" * 100_000)) < 400
