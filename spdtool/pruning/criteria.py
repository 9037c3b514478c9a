"""Criteria: what makes a weight worth keeping. A criterion is a function `(weight, stats) -> scores`.

The lowest scores are pruned first.
A criterion declares what it reads besides the weight, and whether pruned weights may receive gradients:

    @criteria.register("taylor", needs=("gradient",), dense_gradients=False)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spdtool.plugins import criteria

KNOWN_NEEDS = ("gradient", "gradient_squared")


@dataclass(frozen=True)
class Stats:
    """What was observed of one weight since the last prune event; None where no criterion asked for it.

    Attributes:
        gradient: mean gradient over the optimiser steps, shaped like the weight.
        gradient_squared: mean squared gradient over the optimiser steps, shaped like the weight.
    """

    gradient: Tensor | None = None
    gradient_squared: Tensor | None = None


@criteria.register("magnitude")
def magnitude(weight: Tensor, stats: Stats) -> Tensor:  # noqa: ARG001
    """The absolute value (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs()
