"""Random scores as a criterion: the baseline that any saliency must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdtool.plugins import criteria

if TYPE_CHECKING:
    from torch import Tensor

    from spdtool.pruning.statistics import Stats

SEED = 2110


@criteria.register("random")
def random(weight: Tensor, stats: Stats) -> Tensor:  # noqa: ARG001
    """Uniform scores, always the same ones for a matrix of the same shape."""
    import torch  # every command imports this module to find its plugins, and most need no torch

    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(weight.shape, generator=generator).to(weight.device)
