"""Probabilities that mean something: their distance from frequencies, one temperature, a threshold for each label.

A temperature divides all logits before the softmax or sigmoid; it changes no answer (Guo et al. 2017, arXiv
1706.04599).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spdtool.run.records import Calibration, ReliabilityBin
from spdtool.tasks.scores.probabilities import softmax

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.0
SEARCH_STEPS = 60  # of the golden section: its interval shrinks to 1e-11
GOLDEN = (5**0.5 - 1) / 2
LEAST_PROBABILITY = 1e-12  # whose logarithm is finite


class Confidences(NamedTuple):
    """Probabilities and what came true.

    Attributes:
        confidence: probability that was given to an answer, [answers].
        right: whether it was right, bool [answers].
        brier: mean squared error of all probabilities; of classes summed over them.
        nll: mean negative log-likelihood.
    """

    confidence: np.ndarray
    right: np.ndarray
    brier: float
    nll: float


def class_probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of classes, float64 [rows, classes]."""
    # float64, where exported models answer in float32: a likelihood is a sum of many logarithms.
    return softmax(logits.astype(np.float64) / temperature)


def label_probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probability of each label, float64 [rows, labels]."""
    scaled = logits.astype(np.float64) / temperature
    # By tanh, which overflows nowhere: a clipped logit would hide how sure a wrong answer was.
    probabilities: np.ndarray = 0.5 * (1 + np.tanh(scaled / 2))
    return probabilities


def class_confidences(logits: np.ndarray, labels: np.ndarray, temperature: float) -> Confidences:
    """Return the confidence in each row's class.

    Args:
        logits: [rows, classes].
        labels: class indices [rows].
    """
    probabilities = class_probabilities(logits, temperature)
    rows = np.arange(len(labels))
    of_gold = probabilities[rows, labels]
    brier = np.square(probabilities).sum(axis=1) - 2 * of_gold + 1
    nll = -np.log(np.maximum(of_gold, LEAST_PROBABILITY))
    right = probabilities.argmax(axis=1) == labels
    return Confidences(probabilities.max(axis=1), right, float(brier.mean()), float(nll.mean()))


def label_confidences(logits: np.ndarray, labels: np.ndarray, temperature: float) -> Confidences:
    """Return the probability of every label of every row, and whether the row has it.

    Args:
        logits, labels: [rows, labels]; labels are 0 or 1.
    """
    probabilities, is_gold = label_probabilities(logits, temperature), labels > 0.5
    of_gold = np.where(is_gold, probabilities, 1 - probabilities)
    nll = -np.log(np.maximum(of_gold, LEAST_PROBABILITY))
    brier = np.square(probabilities - is_gold)
    return Confidences(probabilities.ravel(), is_gold.ravel(), float(brier.mean()), float(nll.mean()))


def summarize_confidences(confidences: Confidences, bins: int) -> Calibration:
    """Compare probabilities with frequencies in `bins` equal intervals of the probability."""
    confidence, right = confidences.confidence, confidences.right
    interval = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(interval, minlength=bins)
    sums = np.bincount(interval, confidence, bins), np.bincount(interval, right.astype(float), bins)
    reliability, error = [], 0.0
    for count, confidence_sum, right_sum in zip(counts.tolist(), *(values.tolist() for values in sums), strict=True):
        if count:
            reliability.append(ReliabilityBin(count, confidence_sum / count, right_sum / count))
            error += abs(confidence_sum - right_sum)
    return Calibration(
        answers=len(confidence),
        ece=error / len(confidence),
        brier=confidences.brier,
        nll=confidences.nll,
        bins=reliability,
    )


def fit_temperature(nll: Callable[[float], float]) -> float:
    """Return the temperature with the smallest negative log-likelihood, by a golden section.

    The likelihood has one maximum. Where it lies at an end of the search, as when every row is right, the rows do not
    say how sure the model may be, and the temperature is 1.

    Args:
        nll: of the rows at a temperature.
    """
    low, high = np.log(LEAST_TEMPERATURE), np.log(MOST_TEMPERATURE)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    left_value, right_value = nll(float(np.exp(left))), nll(float(np.exp(right)))
    for _ in range(SEARCH_STEPS):
        if left_value <= right_value:
            high, right, right_value = right, left, left_value
            left = high - GOLDEN * (high - low)
            left_value = nll(float(np.exp(left)))
        else:
            low, left, left_value = left, right, right_value
            right = low + GOLDEN * (high - low)
            right_value = nll(float(np.exp(right)))
    temperature = float(np.exp((low + high) / 2))
    is_inside = 1.01 * LEAST_TEMPERATURE < temperature < MOST_TEMPERATURE / 1.01
    if not is_inside or nll(1.0) <= nll(temperature):
        return 1.0
    return round(temperature, 6)


def best_thresholds(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return for each label the logit above which its F1 is the highest; of equal ones the nearest to 0.

    A label that no row has keeps 0, a probability of one half.

    Args:
        logits, labels: [rows, labels]; labels are 0 or 1.
    """
    return [_best_threshold(logits[:, index], labels[:, index] > 0.5) for index in range(logits.shape[1])]


def _best_threshold(logits: np.ndarray, is_gold: np.ndarray) -> float:
    positives = int(is_gold.sum())
    if not positives:
        return 0.0
    order = np.argsort(-logits, kind="stable")
    highest_first = logits[order].astype(np.float64)
    claimed = np.arange(1, len(order) + 1)
    f1 = 2 * np.cumsum(is_gold[order]) / (claimed + positives)
    # between two rows of different logits: a threshold that is one of them would hang on its last bit
    cuts = np.append((highest_first[:-1] + highest_first[1:]) / 2, highest_first[-1] - 1.0)
    is_cut = np.append(highest_first[:-1] > highest_first[1:], True)
    f1[~is_cut] = -1.0
    best = np.flatnonzero(f1 == f1.max())
    return float(cuts[best[np.abs(cuts[best]).argmin()]])
