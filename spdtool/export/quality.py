"""Measure teacher and student once, at the end: test scores, calibration, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spdtool.data.dataset import Rows
from spdtool.data.tokens import Encoded
from spdtool.export.gates.reference import Reference
from spdtool.models.predict import predict, torch_forward
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Calibration, CalibrationPair, DifferingRow, FinalScores, PairedTest, Quality, Role
from spdtool.tasks.decision import Answer
from spdtool.tasks.scores.calibration import summarize_confidences
from spdtool.tasks.scores.significance import bootstrap_interval, bootstrap_scores, mcnemar, paired_bootstrap
from spdtool.tasks.task import Task

LONGEST_TEXT = 300  # characters of a text on the page


@dataclass(frozen=True)
class ScoredSplit:
    """The outputs of one model on a split, and the task by which they are scored."""

    task: Task
    outputs: np.ndarray
    rows: Encoded
    names: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """Every metric, and `score`."""
        return self.task.score(self.outputs, self.rows)

    @property
    def right(self) -> np.ndarray | None:
        """Which rows have the right answer; None where answers are more or less right."""
        return self.task.right_rows(self.outputs, self.rows)

    @property
    def has_row_answers(self) -> bool:
        """Whether each row has an answer of its own, with a probability."""
        is_row_by_row = not self.rows.labels_per_token and self.rows.groups is None and self.rows.details is None
        return is_row_by_row and self.task.confidences(self.outputs, self.rows, 1.0) is not None

    def calibration(self, temperature: float, bins: int) -> Calibration | None:
        """Compare probabilities with frequencies; None for a kind without probabilities."""
        confidences = self.task.confidences(self.outputs, self.rows, temperature)
        return None if confidences is None else summarize_confidences(confidences, bins)


Pair = Mapping[Role, ScoredSplit]


def measure_quality(references: Mapping[Role, Reference], recipe: Recipe, provider: str) -> Quality:
    """Measure the checkpoints of teacher and student, on dev rows and, where there are any, on test rows.

    Args:
        provider: that computes logits.
    """
    quality = Quality()
    splits = {"dev": _dev_split(references, provider), "test": _test_split(references, provider)}
    for role, reference in references.items():
        # Fitted on dev rows: test rows choose nothing.
        temperature = reference.kind_settings(provider).get("temperature")
        if isinstance(temperature, float):
            quality.temperatures[role] = temperature
    for name, models in splits.items():
        figures = {}
        for role, model in models.items():
            pair = _measure_calibration(model, quality.temperatures.get(role, 1.0), recipe.export.bins)
            if pair is not None:
                figures[role] = pair
        if figures:
            quality.calibration[name] = figures
    if splits["test"]:
        quality.final = score_test_rows(splits["test"], recipe)
    if splits["dev"]:
        student = splits["dev"]["student"]
        quality.confusion = student.task.confusion(student.outputs, student.rows, student.names)
        _compare_answers(quality, splits["dev"], references["student"].dev.texts["dev"], recipe)
    return quality


def score_test_rows(models: Pair, recipe: Recipe) -> FinalScores:
    """Score teacher and student on the test rows, with intervals and a test of their difference."""
    teacher, student, section = models["teacher"], models["student"], recipe.export
    teacher_scores, student_scores = teacher.scores, student.scores
    final = FinalScores(
        rows=len(student.rows),
        drawn=recipe.test_share > 0,
        teacher=teacher_scores,
        student=student_scores,
        resamples=section.resamples,
        confidence=section.confidence,
    )
    resamplers = [model.task.resampler(model.outputs, model.rows) for model in (teacher, student)]
    if resamplers[0] is None or resamplers[1] is None:
        return final
    # Rows may be windows of a text, or passages of a query: what has an answer of its own is counted.
    final.rows, final.units = resamplers[1].size, resamplers[1].units
    scorers = (resamplers[0].score, resamplers[1].score)
    # Both models on the same draws, so that hard rows do not count as a difference.
    samples = bootstrap_scores(scorers, resamplers[1].size, resamples=section.resamples, seed=recipe.seed)
    values = teacher_scores["score"], student_scores["score"]
    final.teacher_score = bootstrap_interval(values[0], samples[0], section.confidence)
    final.student_score = bootstrap_interval(values[1], samples[1], section.confidence)
    differences = samples[1] - samples[0]
    final.difference = bootstrap_interval(values[1] - values[0], differences, section.confidence)
    final.test = _test_difference(teacher.right, student.right, differences)
    return final


def _test_difference(
    teacher_right: np.ndarray | None, student_right: np.ndarray | None, differences: np.ndarray
) -> PairedTest:
    if teacher_right is None or student_right is None:
        return paired_bootstrap(differences)
    # Exact for right and wrong answers; resampling is for scores that are no mean over rows.
    return mcnemar(teacher_right, student_right)


def _dev_split(references: Mapping[Role, Reference], provider: str) -> Pair:
    models: dict[Role, ScoredSplit] = {}
    for role, reference in references.items():
        dev = reference.dev
        if dev.task is not None:
            outputs = reference.dev_logits(provider)["dev"]
            models[role] = ScoredSplit(dev.task, outputs, dev.splits["dev"], reference.label_names)
    return models


def _test_split(references: Mapping[Role, Reference], provider: str) -> Pair:
    models: dict[Role, ScoredSplit] = {}
    for role, reference in references.items():
        dev = reference.dev
        if dev.task is not None and dev.test is not None:
            outputs = predict(torch_forward(reference.load_model(provider), provider), dev.test)
            models[role] = ScoredSplit(dev.task, outputs, dev.test, reference.label_names)
    return models


def _measure_calibration(model: ScoredSplit, temperature: float, bins: int) -> CalibrationPair | None:
    raw, calibrated = model.calibration(1.0, bins), model.calibration(temperature, bins)
    if raw is None or calibrated is None:
        return None
    return CalibrationPair(raw=raw, calibrated=calibrated)


def _compare_answers(quality: Quality, models: Pair, texts: Rows, recipe: Recipe) -> None:
    """Record the dev rows on which student and teacher answer differently, the surest of the student first."""
    teacher, student = models["teacher"], models["student"]
    if not student.has_row_answers:
        return
    # Names in another order would make every row a difference.
    if teacher.names != student.names:
        return
    answers = {}
    probabilities = {}
    for role, model in models.items():
        answers[role] = model.task.answers(model.outputs, model.rows, model.names)
        probabilities[role] = _answer_probabilities(model, answers[role])
    gold = student.task.gold_answers(student.rows, student.names)
    differing = []
    for row, (one, other) in enumerate(zip(answers["teacher"], answers["student"], strict=True)):
        if one != other:
            differing.append(row)
    quality.dev_rows, quality.differing_rows = len(student.rows), len(differing)
    # The surest errors say most about what was lost.
    differing.sort(key=lambda row: -(probabilities["student"][row] or 0.0))
    for row in differing[: recipe.export.differing_rows]:
        quality.differing.append(
            DifferingRow(
                text=_shorten(texts.first[row]),
                pair=None if texts.second is None else _shorten(texts.second[row]),
                gold=_spell(gold[row]),
                teacher=_spell(answers["teacher"][row]),
                student=_spell(answers["student"][row]),
                teacher_probability=probabilities["teacher"][row],
                student_probability=probabilities["student"][row],
            )
        )


def _answer_probabilities(model: ScoredSplit, answers: Sequence[Answer]) -> list[float | None]:
    """Return the probability of each answer; of several labels that of the least sure one, of none None."""
    probabilities = model.task.probabilities(model.outputs)
    assert probabilities is not None
    of_answers: list[float | None] = []
    for row, answer in zip(probabilities, answers, strict=True):
        labels = answer if isinstance(answer, list) else [answer]
        of_labels = [float(row[model.names.index(label)]) for label in labels]
        of_answers.append(min(of_labels, default=None))
    return of_answers


def _spell(answer: Answer) -> str:
    return (", ".join(answer) or "none") if isinstance(answer, list) else str(answer)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."
