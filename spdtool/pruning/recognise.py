"""Recognise in which pattern the zeros of a checkpoint lie, whoever pruned it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 32), (1, 16), (1, 8), (1, 4), (32, 1), (16, 1), (8, 1), (4, 1),
          (1, 2), (2, 1))  # fmt: skip
GROUPS = ((2, 4), (1, 4), (4, 8))  # at most N alive of M
LEAST_ZEROS = 0.05  # of all weights: fewer are no pruning
# A block of live weights may hold a zero by chance, or one that training has put there.
LEAST_SHARE = 0.995


def recognise_zeros(weights: Iterable[Tensor]) -> str | None:
    """Describe the zeros of pruned matrices: whole rows and columns, the largest blocks, N of M, or single weights.

    Args:
        weights: matrices [outputs, inputs].

    Returns:
        A phrase such as `blocks of 1x4`; None where there are hardly any zeros.
    """
    masks = [weight == 0 for weight in weights]
    zeros = sum(int(mask.sum()) for mask in masks)
    if not zeros or zeros < LEAST_ZEROS * sum(mask.numel() for mask in masks):
        return None
    whole = 0
    for mask in masks:
        rows, columns = mask.all(1), mask.all(0)
        whole += int((rows[:, None] | columns[None, :]).sum())
    if whole >= LEAST_SHARE * zeros:
        return "whole rows and columns"
    # The largest blocks first: a matrix in blocks of 4x4 is one in blocks of 1x4 too.
    for block in BLOCKS:
        if sum(count_in_blocks(mask, block) for mask in masks) >= LEAST_SHARE * zeros:
            return f"blocks of {block[0]}x{block[1]}"
    for alive, group in GROUPS:
        fits = [mask.shape[1] % group == 0 and _has_groups(mask, alive, group) for mask in masks if mask.any()]
        if all(fits):
            return f"{alive}:{group}"
    return "single weights"


def count_in_blocks(mask: Tensor, block: tuple[int, int]) -> int:
    """Count the zeros that lie in blocks of zeros alone.

    Args:
        mask: which weights are zero, bool [outputs, inputs].
        block: its outputs and inputs.
    """
    if mask.shape[0] % block[0] or mask.shape[1] % block[1]:
        return 0
    tiles = mask.view(mask.shape[0] // block[0], block[0], mask.shape[1] // block[1], block[1])
    return int(tiles.all(3).all(1).sum()) * block[0] * block[1]


def _has_groups(mask: Tensor, alive: int, group: int) -> bool:
    live = (~mask).view(mask.shape[0], -1, group).sum(2)
    return bool(torch.all(live <= alive))
