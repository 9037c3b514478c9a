"""Metrics of rankings, each for one query: reciprocal rank, nDCG and average precision.

They follow trec_eval, but for ties: among passages of one score the relevant ones come last. A model that gives every
passage the same score then knows nothing, in whatever order the file has them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RankingMetric = Callable[[np.ndarray], float]
"""Takes the relevance of a query's passages, [passages], the best ranked first."""

CUTOFF = 10


def rank_passages(scores: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Return the order of a query's passages, [passages], the best first; ties go against the model."""
    return np.lexsort((relevance, -scores.astype(np.float64)))


def reciprocal_rank(ranked: np.ndarray) -> float:
    """Return one over the rank of the first relevant passage, 0 beyond the tenth."""
    hits = np.flatnonzero(ranked[:CUTOFF] > 0)
    return float(1 / (hits[0] + 1)) if len(hits) else 0.0


def ndcg(ranked: np.ndarray) -> float:
    """Return the discounted gain of the first ten passages, relative to that of the best order.

    The gain is the relevance itself, as in trec_eval (Järvelin & Kekäläinen 2002, DOI 10.1145/582415.582418).
    """
    discounts = 1 / np.log2(np.arange(2, CUTOFF + 2))
    best = np.sort(ranked)[::-1]
    gain, best_gain = (float((row[:CUTOFF] * discounts[: len(row)]).sum()) for row in (ranked, best))
    return gain / best_gain


def average_precision(ranked: np.ndarray) -> float:
    """Return the mean, over the relevant passages, of the precision at the rank of each."""
    hits = np.flatnonzero(ranked > 0)
    return float((np.arange(1, len(hits) + 1) / (hits + 1)).mean())


RANKING_METRICS: dict[str, RankingMetric] = {
    "mrr@10": reciprocal_rank,
    "ndcg@10": ndcg,
    "map": average_precision,
}


def score_rankings(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean of each metric over the queries that have a relevant passage; 0 where none has.

    Args:
        scores, labels: as in `score_queries`.
    """
    values = score_queries(scores, labels)
    return {name: float(each.mean()) if len(each) else 0.0 for name, each in values.items()}


def score_queries(scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric of every query that has a relevant passage, [queries].

    Args:
        scores: of the rows, [rows].
        labels: query number and relevance, [rows, 2].
    """
    values: dict[str, list[float]] = {name: [] for name in RANKING_METRICS}
    for rows in split_by_query(labels):
        relevance = labels[rows, 1]
        if not (relevance > 0).any():
            continue
        ranked = relevance[rank_passages(scores[rows], relevance)]
        for name, metric in RANKING_METRICS.items():
            values[name].append(metric(ranked))
    return {name: np.array(each) for name, each in values.items()}


def split_by_query(labels: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each query.

    Args:
        labels: query number and relevance, [rows, 2].
    """
    order = np.argsort(labels[:, 0], kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order, 0])) + 1)
