"""First-order Taylor saliency: how much the loss would change, to first order, if a weight were set to zero."""

from spdtool.plugins import criteria


@criteria.register("taylor", needs=("gradient",))
def taylor(weight, stats):
    """|weight x mean gradient| since the last prune event (Molchanov et al. 2019, arXiv 1906.10771)."""
    return (weight * stats.gradient).abs()
