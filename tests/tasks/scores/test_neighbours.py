"""Nearest neighbours, against a slow search."""

from __future__ import annotations

import numpy as np
import pytest

from spdtool.tasks.scores import neighbours
from spdtool.tasks.scores.neighbours import cosines, find_neighbours, neighbour_agreement


def test_neighbours_are_those_of_a_slow_search(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((25, 6)).astype(np.float32)
    for chunk in (7, 100):
        monkeypatch.setattr(neighbours, "CHUNK_ROWS", chunk)
        fast = find_neighbours(vectors, 4)
        for row in range(25):
            similarity = [
                cosines(vectors[row : row + 1], vectors[candidate : candidate + 1])[0] for candidate in range(25)
            ]
            nearest = sorted(set(range(25)) - {row}, key=lambda candidate: -similarity[candidate])[:4]
            assert set(fast[row]) == set(nearest), (chunk, row)


def test_agreement_counts_shared_neighbours() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((40, 8))
    assert neighbour_agreement(vectors, 3 * vectors) == 1.0  # lengths do not count
    agreement = neighbour_agreement(generator.standard_normal((40, 8)), vectors)
    assert 0.1 < agreement < 0.45  # by chance 10 of 39
    assert neighbour_agreement(vectors[:1], vectors[:1]) == 0.0
