"""Patterns: exactly as many zeros as asked for, on the lowest scores, whatever the ties."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from spdtool import plugins
from spdtool.pruning.patterns import unstructured

COUNTS = (0, 1, 115, 192, 345, 346, 383, 384)


def plain_unstructured(scores: list[float], zeros: int) -> list[bool]:
    """Sort the positions by score, the earlier first among equals; the first `zeros` die."""
    dead = set(sorted(range(len(scores)), key=lambda i: scores[i])[:zeros])
    return [i not in dead for i in range(len(scores))]


# a new pattern is one row
PLAIN: dict[str, Callable[[list[float], int], list[bool]]] = {"unstructured": plain_unstructured}


def score_tables() -> dict[str, Tensor]:
    """Scores of 384 weights, with the difficulties that real ones have."""
    torch.manual_seed(0)
    draw = random.Random(0)
    half_dead = torch.randn(24, 16).abs()
    half_dead[:6] = -math.inf
    exact_zeros = torch.randn(24, 16).abs()
    exact_zeros[::3, ::5] = 0.0
    return {
        "random": torch.randn(24, 16).abs(),
        "ties": torch.tensor([float(draw.randint(0, 3)) for _ in range(24 * 16)]).view(24, 16),
        "all equal": torch.ones(24, 16),
        "all zero": torch.zeros(24, 16),
        "already dead": half_dead,
        "all dead": torch.full((24, 16), -math.inf),
        "exact zeros": exact_zeros,
        "infinite": torch.where(torch.randn(24, 16) > 0, torch.inf, 1.0),
        "one row": torch.randn(1, 384).abs(),
        "a vector": torch.randn(384).abs(),
    }


def test_every_builtin_pattern_has_its_row() -> None:
    builtin = [part.name for part in plugins.patterns.entries() if part.source.startswith("spdtool.")]
    assert sorted(PLAIN) == sorted(builtin)


def test_masks_are_those_of_slow_plain_code() -> None:
    for (name, plain), (table, scores), zeros in itertools.product(PLAIN.items(), score_tables().items(), COUNTS):
        case = f"{name}, {table}, {zeros} zeros"
        before = scores.clone()
        mask = plugins.patterns.get(name)(scores, zeros)
        assert mask.dtype == torch.bool, case
        assert mask.shape == scores.shape, case
        assert mask.flatten().tolist() == plain(scores.flatten().tolist(), zeros), case
        assert int((~mask).sum()) == zeros, case
        assert torch.equal(scores, before), case


def test_a_nan_score_counts_as_the_highest() -> None:
    scores = torch.tensor([3.0, math.nan, 1.0, 2.0, math.nan, -math.inf])
    assert unstructured(scores, 3).tolist() == [True, True, False, False, True, False]


def test_more_zeros_keep_a_subset() -> None:
    masks = [unstructured(score_tables()["ties"], zeros) for zeros in COUNTS]
    for larger, smaller in itertools.pairwise(masks):
        assert bool((larger | ~smaller).all())
