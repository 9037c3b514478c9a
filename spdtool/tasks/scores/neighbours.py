"""Nearest neighbours of vectors, and how many of them two models have in common."""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 10
CHUNK_ROWS = 1_000  # whose cosines to all others are in memory at a time


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to length one, float32; a row of zeros stays."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of the rows of two arrays, pair by pair, [rows]."""
    products: np.ndarray = (unit_rows(first).astype(np.float64) * unit_rows(second)).sum(axis=1)
    return products


def find_neighbours(vectors: np.ndarray, count: int) -> np.ndarray:
    """Return the row numbers of the `count` nearest other rows by cosine, [rows, count], in no order."""
    units = unit_rows(vectors)
    nearest = []
    for start in range(0, len(units), CHUNK_ROWS):
        similarity = units[start : start + CHUNK_ROWS] @ units.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf  # a row is no neighbour of itself
        nearest.append(np.argpartition(-similarity, count - 1, axis=1)[:, :count])
    return np.concatenate(nearest)


def neighbour_agreement(vectors: np.ndarray, reference: np.ndarray, count: int = NEIGHBOURS) -> float:
    """Return the share of the reference's nearest neighbours that are neighbours here too, averaged over rows."""
    count = min(count, len(vectors) - 1)
    if count < 1:
        return 0.0
    ours, theirs = find_neighbours(vectors, count), find_neighbours(reference, count)
    shared = (ours[:, :, None] == theirs[:, None, :]).any(axis=2)
    return float(shared.mean())
