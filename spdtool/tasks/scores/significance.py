"""How sure a score is: bootstrap intervals, and tests of the difference of two models on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spdtool.run.records import Interval, PairedTest

ScoreRows = Callable[[np.ndarray], float]
"""Returns the score of the rows with these numbers, which may repeat."""


class Resampler(NamedTuple):
    """What a bootstrap draws of a split, and how it scores a draw.

    Attributes:
        size: how many there are to draw.
        units: what they are, in the plural: rows; queries with all of their passages; whole texts.
        score: of those with these numbers.
    """

    size: int
    units: str
    score: ScoreRows


def bootstrap_scores(models: tuple[ScoreRows, ...], rows: int, *, resamples: int, seed: int) -> list[np.ndarray]:
    """Score every model on the same resamples of the rows, drawn with replacement.

    Args:
        models: their scores.
        rows: number of them.

    Returns:
        One array [resamples] for each model.
    """
    generator = np.random.default_rng(seed)
    scores = np.empty((len(models), resamples))
    for number in range(resamples):
        drawn = generator.integers(0, rows, rows)
        for index, score in enumerate(models):
            scores[index, number] = score(drawn)
    return list(scores)


def bootstrap_interval(value: float, scores: np.ndarray, confidence: float) -> Interval:
    """Return the percentile interval of resampled scores around the score of all rows (Efron 1979)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def mcnemar(teacher_right: np.ndarray, student_right: np.ndarray) -> PairedTest:
    """Test whether two classifiers have equally many rows right, exactly (McNemar 1947).

    Only rows that one of them alone has right tell them apart. If both are equally good, each such row is a fair coin.

    Args:
        teacher_right, student_right: bool [rows].
    """
    from scipy.stats import binomtest

    teacher_only = int((teacher_right & ~student_right).sum())
    student_only = int((student_right & ~teacher_right).sum())
    p_value = 1.0
    if teacher_only + student_only:
        p_value = float(binomtest(student_only, teacher_only + student_only).pvalue)
    return PairedTest(method="mcnemar", p_value=p_value, teacher_only=teacher_only, student_only=student_only)


def paired_bootstrap(differences: np.ndarray) -> PairedTest:
    """Test whether a resampled difference of two scores is on one side of zero.

    Args:
        differences: of the scores of each resample.
    """
    # one is added to both counts: p is never 0, however few the resamples
    count = len(differences) + 1
    below, above = ((differences <= 0).sum() + 1) / count, ((differences >= 0).sum() + 1) / count
    return PairedTest(method="bootstrap", p_value=float(min(1.0, 2 * min(below, above))))
