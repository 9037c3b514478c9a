"""Metrics: functions of the gold labels and the predictions of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
"""`metric(gold, predicted)`, both [rows]: class indices or, for regression, floats."""


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of rows whose class is predicted."""
    return float((gold == predicted).mean())


def f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the F1 of class 1 among classes 0 and 1; `Classification.measure` puts the positive one there."""
    from sklearn.metrics import f1_score  # imported here: most of a second, and accuracy does without

    return float(f1_score(gold, predicted, zero_division=0.0))


def f1_macro(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the unweighted mean of the F1 of every class."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, average="macro", zero_division=0.0))


def matthews(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return Matthews' correlation coefficient, the metric of CoLA."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted))


def pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the linear correlation; 0 where it is undefined."""
    from scipy.stats import pearsonr

    return float(pearsonr(gold, predicted)[0]) if _varies(gold, predicted) else 0.0


def spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the rank correlation; 0 where it is undefined."""
    from scipy.stats import spearmanr

    return float(spearmanr(gold, predicted)[0]) if _varies(gold, predicted) else 0.0


def f1_of_labels(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the F1 of each label, [labels]; 0 for one that is neither gold nor predicted.

    Args:
        gold, predicted: bool [rows, labels].
    """
    right = (gold & predicted).sum(axis=0)
    claimed_and_gold = gold.sum(axis=0) + predicted.sum(axis=0)
    f1_scores: np.ndarray = 2 * right / np.maximum(claimed_and_gold, 1)
    return f1_scores


def f1_of_label_sets(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the F1 over all labels of all rows together, bool [rows, labels]."""
    return 2 * float((gold & predicted).sum()) / max(int(gold.sum() + predicted.sum()), 1)


def mean_average_precision(gold: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean over labels of the average precision of its rows, ordered by score.

    Rows of equal scores count together, as in scikit-learn. Labels that no row has are left out: none can be found.

    Args:
        gold: bool [rows, labels].
        scores: of any scale, [rows, labels].
    """
    precisions = []
    for index in np.flatnonzero(gold.any(axis=0)):
        order = np.argsort(-scores[:, index], kind="stable")
        highest_first, is_gold = scores[order, index], gold[order, index]
        is_last = np.append(highest_first[:-1] != highest_first[1:], True)  # of rows with the same score
        hits = np.cumsum(is_gold)[is_last]
        recalls = np.diff(hits, prepend=0) / hits[-1]
        precisions.append(float((recalls * hits / (np.flatnonzero(is_last) + 1)).sum()))
    return float(np.mean(precisions)) if precisions else 0.0


def _varies(gold: np.ndarray, predicted: np.ndarray) -> bool:
    """Tell whether a correlation is defined; a model with one answer for every row knows nothing."""
    return bool(np.ptp(gold) != 0 and np.ptp(predicted) != 0 and np.isfinite(predicted).all())


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def describe_headline(metrics: Sequence[str]) -> str:
    """Say what the headline score of these metrics is: the only one, or the mean of all."""
    *others, last = metrics
    return f"mean of {', '.join(others)} and {last}" if others else last
