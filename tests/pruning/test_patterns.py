"""Sparsity patterns: exact counts of zeros on the lowest scores, with ties."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spdtool import plugins
from spdtool.errors import RecipeError, UnknownName
from spdtool.pruning.patterns import find_pattern, kth_lowest, sum_blocks, unstructured

COUNTS = (0, 1, 115, 192, 345, 346, 383, 384)


def plain_unstructured(scores: list[float], zeros: int) -> list[bool]:
    """Zero the first `zeros` positions in a stable sort by score."""
    dead = set(sorted(range(len(scores)), key=lambda i: scores[i])[:zeros])
    return [i not in dead for i in range(len(scores))]


def plain_two_of_four(scores: list[float], zeros: int) -> list[bool]:
    """Zero the lowest candidates, where only the two lowest of every four positions are candidates."""
    candidates: list[int] = []
    for start in range(0, len(scores), 4):
        candidates += sorted(range(start, start + 4), key=lambda i: scores[i])[:2]
    dead = set(sorted(sorted(candidates), key=lambda i: scores[i])[:zeros])
    return [i not in dead for i in range(len(scores))]


# a new pattern is one row; block patterns rank blocks as the plain code ranks weights
PLAIN: dict[str, Callable[[list[float], int], list[bool]]] = {
    "unstructured": plain_unstructured,
    "1x4": plain_unstructured,
    "4x4": plain_unstructured,
    "2:4": plain_two_of_four,
}


def score_tables() -> dict[str, Tensor]:
    """Scores of 384 weights with the difficulties of real ones: ties, zeros, infinities."""
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
    builtin = [entry.name for entry in plugins.patterns.entries() if entry.source.startswith("spdtool.")]
    assert sorted(PLAIN) == sorted(builtin)


def test_masks_equal_those_of_slow_plain_code() -> None:
    for (name, plain), (table, scores), zeros in itertools.product(PLAIN.items(), score_tables().items(), COUNTS):
        case = f"{name}, {table}, {zeros} zeros"
        if zeros > find_pattern(name).largest_sparsity * scores.numel():
            continue
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


def test_survivors_at_more_zeros_are_a_subset() -> None:
    masks = [unstructured(score_tables()["ties"], zeros) for zeros in COUNTS]
    for larger, smaller in itertools.pairwise(masks):
        assert bool((larger | ~smaller).all())


def test_a_pattern_is_named_by_its_shape() -> None:
    for name, block in {"unstructured": (1, 1), "1x4": (1, 4), "16x1": (16, 1), "2:4": (1, 1)}.items():
        assert find_pattern(name).block == block, name
    assert find_pattern("1:4").largest_sparsity == 0.75
    for name in ("0x4", "4x", "blocky", "2:"):
        with pytest.raises(UnknownName, match="no pattern"):
            find_pattern(name)
    with pytest.raises(RecipeError, match="the pattern 4:4 has no zeros"):
        find_pattern("4:4")


def test_more_zeros_than_a_pattern_can_have_are_refused() -> None:
    find_pattern("2:4").check_sparsity(0.5, "matrix")
    find_pattern("1x4").check_sparsity(0.99, "global")
    with pytest.raises(RecipeError, match=r"the pattern 2:4 has at most 50% zeros; a sparsity of 0\.9 was asked for"):
        find_pattern("2:4").check_sparsity(0.9, "matrix")
    with pytest.raises(RecipeError, match=r"prune\.scope is global"):
        find_pattern("2:4").check_sparsity(0.5, "global")


def test_weights_are_cut_into_blocks_and_reassembled() -> None:
    pattern = find_pattern("2x4")
    blocks = torch.arange(6.0).view(3, 2)
    weights = pattern.to_weights(blocks)
    assert weights.shape == (6, 8)
    assert weights[2].tolist() == [2.0] * 4 + [3.0] * 4
    assert torch.equal(pattern.to_blocks(weights), blocks)
    assert torch.equal(sum_blocks(weights, (2, 4)), 8 * blocks)


def test_a_registered_pattern_comes_before_its_shape(clean_plugins: None) -> None:
    @plugins.patterns.register("1x2", block=(1, 2))
    def last_block(scores: Tensor, zeros: int) -> Tensor:
        """Kill the last blocks, whatever their scores."""
        return (torch.arange(scores.numel()) < scores.numel() - zeros).view_as(scores)

    pattern = find_pattern("1x2")
    assert pattern.block == (1, 2)
    assert pattern.choose(torch.ones(2, 2), 1).tolist() == [[True, True], [True, False]]


def test_the_threshold_of_a_gpu_is_that_of_a_cpu() -> None:
    scores = torch.tensor([3.0, math.nan, 1.0, 2.0, math.inf, 2.0, -math.inf])
    for count in range(1, len(scores) + 1):
        # the other branch, whose device has no numbers to compare
        assert kth_lowest(scores.to("meta"), count).shape == ()
        torch.testing.assert_close(kth_lowest(scores, count), scores.sort().values[count - 1], equal_nan=True)
