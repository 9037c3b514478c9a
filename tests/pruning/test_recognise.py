"""Patterns of zeros, recognised in matrices that anybody pruned."""

from __future__ import annotations

import pytest
import torch

from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.recognise import recognise_zeros


def make_weights(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) + 3 for shape in shapes]


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "4x4", "2:4"])
def test_patterns_of_our_own_are_recognised(pattern: str) -> None:
    weights = make_weights((32, 64), (64, 32))
    for weight in weights:
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
        rule = find_pattern(pattern)
        blocks = rule.choose(rule.to_blocks(scores), weight.numel() // 2 // rule.block_size)
        weight[~rule.to_weights(blocks)] = 0
    names = {"unstructured": "single weights", "1x4": "blocks of 1x4", "4x4": "blocks of 4x4", "2:4": "2:4"}
    assert recognise_zeros(weights) == names[pattern]


def test_whole_rows_and_large_blocks_are_told_from_small_ones() -> None:
    weights = make_weights((64, 64))
    assert recognise_zeros(weights) is None
    weights[0][:32, :32] = 0
    assert recognise_zeros(weights) == "blocks of 32x32"
    weights = make_weights((64, 64), (64, 64))
    weights[0][::2] = 0
    weights[1][:, ::2] = 0
    assert recognise_zeros(weights) == "whole rows and columns"
