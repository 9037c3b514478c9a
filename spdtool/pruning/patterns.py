"""Patterns: which weights may be pruned together. A pattern is a function `(scores, sparsity) -> bool mask`.

The mask is True where a weight lives, has the shape of the scores, and exactly `zeros_in(scores.numel(), sparsity)`
entries that are False. Weights that are dead already come with a score of minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdtool.plugins import patterns


def zeros_in(size: int, sparsity: float) -> int:
    """The number of zeros that `sparsity` means in a matrix of `size` weights: rounded to the nearest weight."""
    return round(size * sparsity)


@patterns.register("unstructured")
def unstructured(scores: Tensor, sparsity: float) -> Tensor:
    """Any weight may go: the lowest scores do, wherever they stand. Ties go in the order of their position."""
    dead = zeros_in(scores.numel(), sparsity)
    flat = scores.flatten()
    if dead == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(dead).values
    below = flat < threshold
    tied = flat == threshold
    gone = below | (tied & (tied.cumsum(0) <= dead - below.sum()))
    return ~gone.view_as(scores)
