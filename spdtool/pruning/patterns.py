"""Patterns: which weights may be pruned together. A pattern is a function `(scores, zeros) -> bool mask`.

The mask is True where a weight lives, has the shape of the scores, and exactly `zeros` entries that are False. Weights
that are dead already come with a score of minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdtool.plugins import patterns


@patterns.register("unstructured")
def unstructured(scores: Tensor, zeros: int) -> Tensor:
    """Any weight may go: the lowest scores do, wherever they stand. Ties go in the order of their position."""
    flat = scores.flatten()
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros).values
    below = flat < threshold
    tied = flat == threshold
    # a mere `<= threshold` would take every tied weight, and miss the exact count
    pruned = below | (tied & (tied.cumsum(0) <= zeros - below.sum()))
    return ~pruned.view_as(scores)
