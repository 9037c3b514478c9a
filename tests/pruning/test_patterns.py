"""Patterns: exactly as many zeros as asked for, on the lowest scores, whatever the ties."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spdtool import plugins
from spdtool.pruning.patterns import unstructured, zeros_in

SPARSITIES = (0.0, 0.001, 0.3, 0.5, 0.8995, 0.9, 0.999)


def plain_unstructured(scores: list[float], sparsity: float) -> list[bool]:
    """Sort the positions by score, the earlier first among equals; the first so many die."""
    dead = sorted(range(len(scores)), key=lambda i: scores[i])[: round(len(scores) * sparsity)]
    return [i not in dead for i in range(len(scores))]


PLAIN: dict[str, Callable[[list[float], float], list[bool]]] = {"unstructured": plain_unstructured}
BUILTIN = [part.name for part in plugins.patterns.entries() if part.source.startswith("spdtool.")]


def test_every_builtin_pattern_has_its_row() -> None:
    assert sorted(PLAIN) == sorted(BUILTIN)


def tables() -> dict[str, Tensor]:
    torch.manual_seed(0)
    draw = random.Random(0)
    ties = torch.tensor([float(draw.randint(0, 3)) for _ in range(24 * 16)]).view(24, 16)
    half_dead = torch.randn(24, 16).abs()
    half_dead[:6] = -math.inf
    zero = torch.randn(24, 16).abs()
    zero[::3, ::5] = 0.0
    return {
        "random": torch.randn(24, 16).abs(),
        "ties": ties,
        "all equal": torch.ones(24, 16),
        "all zero": torch.zeros(24, 16),
        "already dead": half_dead,
        "all dead": torch.full((24, 16), -math.inf),
        "exact zeros": zero,
        "infinite": torch.where(torch.randn(24, 16) > 0, torch.inf, 1.0),
        "one row": torch.randn(1, 384).abs(),
        "a vector": torch.randn(384).abs(),
    }


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("table", tables())
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_are_those_of_slow_plain_code(name: str, table: str, sparsity: float) -> None:
    scores = tables()[table]
    before = scores.clone()
    mask = plugins.patterns.get(name)(scores, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.flatten().tolist() == PLAIN[name](scores.flatten().tolist(), sparsity)
    assert int((~mask).sum()) == zeros_in(scores.numel(), sparsity)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 100, 589_824])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_count_is_the_nearest_one(size: int, sparsity: float) -> None:
    assert abs(zeros_in(size, sparsity) - size * sparsity) <= 0.5
    assert 0 <= zeros_in(size, sparsity) <= size


def test_a_nan_score_counts_as_the_highest() -> None:
    scores = torch.tensor([3.0, math.nan, 1.0, 2.0, math.nan, -math.inf])
    assert unstructured(scores, 0.5).tolist() == [True, True, False, False, True, False]


def test_a_higher_sparsity_keeps_a_subset() -> None:
    scores = tables()["ties"]
    masks = [unstructured(scores, sparsity) for sparsity in SPARSITIES]
    for wide, narrow in itertools.pairwise(masks):
        assert bool((wide | ~narrow).all())
