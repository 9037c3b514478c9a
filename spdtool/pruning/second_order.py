"""Second-order criteria: the loss's curvature says what a weight costs, and how the survivors make up for it.

Both expand a loss to second order around the weights as they are, with curvature F, and solve for the whole set that
goes: the survivors l move by F_ll^-1 F_ld w_d when the weights d are set to zero (Hassibi & Stork 1992, Optimal Brain
Surgeon). They differ in F: that of the training loss in blocks, or that of each layer's own output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdtool.errors import RecipeError
from spdtool.plugins import criteria
from spdtool.pruning.statistics import Stats, blocks_of

AT_ONCE = 2**25  # numbers in the largest temporary tensor; three of them live together, 400 MB in float32


def mend_blocks(weight: Tensor, alive: Tensor, stats: Stats) -> Tensor:
    """The weight after the survivors of each Fisher block have made up for those that go; the dead are zero."""
    assert stats.fisher_blocks is not None
    blocks = stats.fisher_blocks
    size = blocks.shape[-1]
    rows, lives = blocks_of(weight.float(), size), blocks_of(alive, size)
    chunk = max(1, AT_ONCE // size**2)
    moved = [
        _moved(part, row, live)
        for part, row, live in zip(blocks.split(chunk), rows.split(chunk), lives.split(chunk), strict=True)
    ]
    return torch.cat(moved).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


@criteria.register("obert", needs=("fisher_blocks",), update=mend_blocks)
def obert(weight: Tensor, stats: Stats) -> Tensor:
    """Weight^2 / (2 [F^-1]_qq), F the blockwise empirical Fisher matrix (Kurtic et al. 2022, arXiv 2203.07259)."""
    assert stats.fisher_blocks is not None
    blocks = stats.fisher_blocks
    chunk = max(1, AT_ONCE // blocks.shape[-1] ** 2)
    inverse = torch.cat([_inverse(part).diagonal(dim1=-2, dim2=-1) for part in blocks.split(chunk)])
    return weight.float().square() / (2 * inverse.flatten()[: weight.numel()].view_as(weight))


def mend_rows(weight: Tensor, alive: Tensor, stats: Stats) -> Tensor:
    """The weight after least squares on each output row: the survivors that keep the layer's output best.

    The smaller of the live and the dead set is solved for; both give the same weights.
    """
    assert stats.input_gram is not None
    gram, dead = stats.input_gram, ~alive
    gone = weight.float() * dead
    if int(alive.sum(1).max()) <= int(dead.sum(1).max()):
        moved = _solved(gram, gone @ gram, alive)
    else:
        inverse = _inverse(gram[None])[0]
        moved = -(_solved(inverse, gone, dead) @ inverse)
    return ((weight.float() + moved) * alive).to(weight.dtype)


@criteria.register("layerwise", needs=("input_gram",), update=mend_rows)
def layerwise(weight: Tensor, stats: Stats) -> Tensor:
    """Weight^2 / [H^-1]_qq, H the second moment of the layer's inputs: the squared error of the layer's own output.

    Frantar & Alistarh 2022 (arXiv 2208.11580) and 2023 (arXiv 2301.00774), who prune weight by weight; here the whole
    set goes at once, and the survivors of each row are then solved for exactly.
    """
    assert stats.input_gram is not None
    return weight.float().square() / _inverse(stats.input_gram[None])[0].diagonal()


def _moved(blocks: Tensor, rows: Tensor, alive: Tensor) -> Tensor:
    live = alive.float()
    wanted = live * torch.einsum("nij,nj->ni", blocks, rows * (1 - live))
    # the dead become rows and columns of the identity, so that every block has one shape
    system = blocks * (live.unsqueeze(2) * live.unsqueeze(1))
    system.diagonal(dim1=-2, dim2=-1).add_(1 - live)
    return (rows + torch.cholesky_solve(wanted.unsqueeze(2), _factor(system)).squeeze(2)) * live


def _solved(matrix: Tensor, wanted: Tensor, sets: Tensor) -> Tensor:
    """For each row r, x with `matrix[s, s] x[s] = wanted[r, s]` on its set s, zero elsewhere: [rows, inputs].

    Sets are padded to the longest, and rows go in chunks that fit in memory.
    """
    longest = int(sets.sum(1).max())
    solution = torch.zeros_like(wanted)
    if longest == 0:
        return solution
    members = sets.byte().sort(dim=1, descending=True, stable=True).indices[:, :longest]
    chunk = max(1, AT_ONCE // longest**2)
    for part, row, into, own in zip(
        members.split(chunk), wanted.split(chunk), solution.split(chunk), sets.split(chunk), strict=True
    ):
        inside = own.gather(1, part)
        system = matrix[part.unsqueeze(2), part.unsqueeze(1)]
        system.mul_(inside.unsqueeze(2)).mul_(inside.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).add_(~inside)
        found = torch.cholesky_solve((row.gather(1, part) * inside).unsqueeze(2), _factor(system)).squeeze(2)
        into.scatter_(1, part, found)
    return solution


def _inverse(matrices: Tensor) -> Tensor:
    return torch.cholesky_inverse(_factor(matrices))


def _factor(matrices: Tensor) -> Tensor:
    """Cholesky factors, taken in float64 where float32 does not do.

    Raises:
        RecipeError: neither does.
    """
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        factor, failed = torch.linalg.cholesky_ex(matrices.double())
        factor = factor.to(matrices.dtype)
    if bool(failed.any()):
        raise RecipeError(
            "the curvature that the criterion observed cannot be inverted",
            "set prune.dampening higher; if the loss was not a number before, set prune.learning_rate lower",
        )
    return factor
