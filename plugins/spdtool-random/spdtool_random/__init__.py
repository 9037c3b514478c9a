"""Random scores: what is left of a model when nobody chooses which weights go."""

from spdtool.plugins import criteria

SEED = 2110


@criteria.register("random")
def random(weight, stats):  # noqa: ARG001
    """Uniform scores, always the same ones for a matrix of the same shape; what any saliency must beat."""
    import torch  # every command finds its plugins, and most of them need no torch

    draw = torch.Generator().manual_seed(SEED)
    return torch.rand(weight.shape, generator=draw).to(weight.device)
