"""Measure teacher and student once, at the end: the score on test rows, by which nothing was chosen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spdtool.data.tokens import Encoded
from spdtool.export.gates.reference import Reference
from spdtool.models.predict import predict, torch_forward
from spdtool.recipe.fields import Recipe
from spdtool.run.records import FinalScores, Quality, Role
from spdtool.tasks.significance import ScoreRows, bootstrap_interval, bootstrap_scores, mcnemar, paired_bootstrap
from spdtool.tasks.task import Task

References = Mapping[Role, Reference]


def measure_quality(references: References, recipe: Recipe, provider: str) -> Quality:
    """Measure the checkpoints of teacher and student.

    Args:
        provider: that computes logits.
    """
    return Quality(final=score_test_rows(references, recipe, provider))


def score_test_rows(references: References, recipe: Recipe, provider: str) -> FinalScores | None:
    """Score teacher and student on the test rows; None where there are none."""
    teacher, student = references["teacher"].dev, references["student"].dev
    if teacher.test is None or student.test is None or teacher.task is None or student.task is None:
        return None
    logits = {role: _predict_test(references[role], provider) for role in references}
    scorers = (
        _scorer(teacher.task, logits["teacher"], teacher.test),
        _scorer(student.task, logits["student"], student.test),
    )
    count, section = len(student.test), recipe.export
    samples = bootstrap_scores(scorers, count, resamples=section.resamples, seed=recipe.seed)
    teacher_scores = teacher.task.score(logits["teacher"], teacher.test.labels)
    student_scores = student.task.score(logits["student"], student.test.labels)
    difference = student_scores["score"] - teacher_scores["score"]
    teacher_right = teacher.task.right_rows(logits["teacher"], teacher.test.labels)
    student_right = student.task.right_rows(logits["student"], student.test.labels)
    if teacher_right is None or student_right is None:
        test = paired_bootstrap(samples[1] - samples[0])
    else:
        test = mcnemar(teacher_right, student_right)
    return FinalScores(
        rows=count,
        drawn=recipe.test_share > 0,
        teacher=teacher_scores,
        student=student_scores,
        teacher_score=bootstrap_interval(teacher_scores["score"], samples[0], section.confidence),
        student_score=bootstrap_interval(student_scores["score"], samples[1], section.confidence),
        difference=bootstrap_interval(difference, samples[1] - samples[0], section.confidence),
        test=test,
        resamples=section.resamples,
        confidence=section.confidence,
    )


def _predict_test(reference: Reference, provider: str) -> np.ndarray:
    assert reference.dev.test is not None
    return predict(torch_forward(reference.load_model(provider), provider), reference.dev.test)


def _scorer(task: Task, logits: np.ndarray, rows: Encoded) -> ScoreRows:
    return lambda numbers: task.score(logits[numbers], rows.labels[numbers])["score"]
