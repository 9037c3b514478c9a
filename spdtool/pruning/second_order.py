"""Second-order criteria: what a weight costs, and the update of the survivors that makes up for it.

Both expand a loss to second order around the weights as they are, with curvature F, and solve for
the whole set that goes: the survivors l move by F_ll^-1 F_ld w_d when the weights d are set to
zero (Hassibi & Stork 1992, Optimal Brain Surgeon). They differ in F: that of the training loss in
blocks, or that of each layer's own output.

The weight of a layer is [outputs, inputs]. Statistics are those of `statistics.Stats`: F in blocks
is `fisher_blocks` [blocks, size, size], and H, the second moment of the inputs, is `input_gram`
[inputs, inputs].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdtool.errors import RecipeError
from spdtool.plugins import criteria
from spdtool.pruning.criteria import Block
from spdtool.pruning.patterns import sum_blocks
from spdtool.pruning.statistics import Stats, split_into_blocks

# numbers in the largest temporary tensor; three of them live together, 400 MB in float32, on a GPU 3.2 GB
AT_ONCE, AT_ONCE_ON_GPU = 2**25, 2**28
# Of the systems of single rows, on a CPU: 16 MB, which the allocator keeps. Larger ones are returned to the system, and
# touching their pages again took a third of the time (benchmarks/row_solvers.py).
ROWS_AT_ONCE = 2**22


def update_blocks(weight: Tensor, alive: Tensor, stats: Stats) -> Tensor:
    """Return the weight with the survivors of each Fisher block updated; the dead are zero.

    Kurtic et al. 2022, arXiv 2203.07259, for the whole set that goes at an event.

    Args:
        alive: which weights survive the event, bool [outputs, inputs].
    """
    assert stats.fisher_blocks is not None
    size = stats.fisher_blocks.shape[-1]
    rows, live_rows = split_into_blocks(weight.float(), size), split_into_blocks(alive, size)
    updated = []
    for chunk in _chunks(size, stats.fisher_blocks, rows, live_rows):
        updated.append(_update_chunk(*chunk))
    return torch.cat(updated).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


def obert_of_blocks(weight: Tensor, stats: Stats, block: Block) -> Tensor:
    """w^T ([F^-1]_bb)^-1 w / 2 of each block b (Kurtic et al. 2022, section 3.2).

    F has no entries between the outputs, so a block of several outputs is the sum over them.

    Raises:
        RecipeError: a block straddles two blocks of F.
    """
    assert stats.fisher_blocks is not None
    size, (rows, columns) = stats.fisher_blocks.shape[-1], block
    if size % columns:
        raise RecipeError(
            f"prune.fisher_block is {size}, and the pattern has blocks of {columns} inputs, which do not divide it",
            f"--set prune.fisher_block={4 * columns}",
        )
    costs = []
    segments = split_into_blocks(weight.float(), size)
    for fisher, chunk in _chunks(size, stats.fisher_blocks, segments):
        curvature = _inverse(_diagonal_blocks(_inverse(fisher), columns))  # [chunk, size / columns, columns, columns]
        vectors = chunk.view(-1, size // columns, columns)
        costs.append(torch.einsum("nsi,nsij,nsj->ns", vectors, curvature, vectors) / 2)
    # the last block may be padded
    by_segment = torch.cat(costs).flatten()[: weight.numel() // columns].view(weight.shape[0], -1)
    return sum_blocks(by_segment, (rows, 1))


@criteria.register("obert", needs=("fisher_blocks",), update=update_blocks, block_scores=obert_of_blocks)
def obert(weight: Tensor, stats: Stats) -> Tensor:
    """Weight^2 / (2 [F^-1]_qq), F the blockwise empirical Fisher matrix (Kurtic et al. 2022, arXiv 2203.07259)."""
    assert stats.fisher_blocks is not None
    diagonals = []
    for (blocks,) in _chunks(stats.fisher_blocks.shape[-1], stats.fisher_blocks):
        diagonals.append(_inverse(blocks).diagonal(dim1=-2, dim2=-1))
    # the last block may be padded
    inverse = torch.cat(diagonals).flatten()[: weight.numel()].view_as(weight)
    return weight.float().square() / (2 * inverse)


def update_rows(weight: Tensor, alive: Tensor, stats: Stats) -> Tensor:
    """Return the weight after least squares on each output row, which keep the layer's output best.

    The smaller of the live and the dead set is solved for; both give the same weights.

    Args:
        alive: which weights survive the event, bool [outputs, inputs].
    """
    assert stats.input_gram is not None
    gram, dead = stats.input_gram, ~alive
    removed = weight.float() * dead
    live_cost, dead_cost = (mask.sum(1).double().pow(3).sum() for mask in (alive, dead))
    if bool(live_cost <= dead_cost):
        change = solve_rows(gram, removed @ gram, alive)
    else:
        inverse = _inverse(gram[None])[0]
        change = -(solve_rows(inverse, removed, dead) @ inverse)
    return ((weight.float() + change) * alive).to(weight.dtype)


def layerwise_of_blocks(weight: Tensor, stats: Stats, block: Block) -> Tensor:
    """w^T ([H^-1]_bb)^-1 w of each block b; the outputs are independent, so a block of several is the sum over them."""
    assert stats.input_gram is not None
    rows, columns = block
    inverse = _inverse(stats.input_gram[None])
    curvature = _inverse(_diagonal_blocks(inverse, columns))[0]  # [inputs / columns, columns, columns]
    vectors = weight.float().reshape(len(weight), -1, columns)
    by_segment = torch.einsum("osi,sij,osj->os", vectors, curvature, vectors)
    return sum_blocks(by_segment, (rows, 1))


@criteria.register("layerwise", needs=("input_gram",), update=update_rows, block_scores=layerwise_of_blocks)
def layerwise(weight: Tensor, stats: Stats) -> Tensor:
    """Weight^2 / [H^-1]_qq, H the inputs' second moment: the layer's own squared error.

    Frantar & Alistarh 2022 (arXiv 2208.11580) and 2023 (arXiv 2301.00774), who prune weight by
    weight; here the whole set goes at once, and the survivors of each row are then solved for
    exactly.
    """
    assert stats.input_gram is not None
    return weight.float().square() / _inverse(stats.input_gram[None])[0].diagonal()


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of tensors together; a tensor [slice, size, size] has at most `AT_ONCE` numbers."""
    at_once = AT_ONCE if tensors[0].device.type == "cpu" else AT_ONCE_ON_GPU
    length = max(1, at_once // size**2)
    yield from zip(*(torch.split(tensor, length) for tensor in tensors), strict=True)


def _update_chunk(blocks: Tensor, rows: Tensor, alive: Tensor) -> Tensor:
    """Update the survivors of each block, [blocks, size], to make up for the dead."""
    live = alive.float()
    wanted = live * torch.einsum("nij,nj->ni", blocks, rows * (1 - live))
    # the dead become rows and columns of the identity, so that every block has one shape
    system = blocks * (live.unsqueeze(2) * live.unsqueeze(1))
    system.diagonal(dim1=-2, dim2=-1).add_(1 - live)
    return (rows + torch.cholesky_solve(wanted.unsqueeze(2), factorize(system)).squeeze(2)) * live


def solve_rows(matrix: Tensor, wanted: Tensor, sets: Tensor) -> Tensor:
    """Solve `matrix[s, s] x[s] = wanted[r, s]` for each row r on its set s: [rows, inputs].

    x is zero outside of s.

    The largest sets come first, so that each is padded to the largest of its chunk alone: in a
    matrix with 90 % zeros the largest may be six times the mean, and a factor costs the cube.
    """
    solution = torch.zeros_like(wanted)
    sizes, order = sets.sum(1).sort(descending=True, stable=True)
    # the members first, in order; in a smaller set some positions that are no members follow
    members = sets.byte().sort(dim=1, descending=True, stable=True).indices
    at_once = ROWS_AT_ONCE if matrix.device.type == "cpu" else AT_ONCE_ON_GPU
    row_sizes, start = sizes.tolist(), 0
    while start < len(row_sizes) and row_sizes[start] > 0:
        largest = row_sizes[start]
        rows = order[start : start + max(1, at_once // largest**2)]
        columns = members[rows, :largest]
        is_member = sets[rows].gather(1, columns)
        system = _gather_systems(matrix, columns)
        system.mul_(is_member.unsqueeze(2)).mul_(is_member.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).add_(~is_member)
        targets = (wanted[rows].gather(1, columns) * is_member).unsqueeze(2)
        solved = torch.cholesky_solve(targets, factorize(system)).squeeze(2)
        # positions of no members are distinct, and get zero
        solution[rows] = torch.zeros_like(wanted[rows]).scatter_(1, columns, solved)
        start += len(rows)
    return solution


def _gather_systems(matrix: Tensor, columns: Tensor) -> Tensor:
    """Gather the same rows and columns of a matrix for each row of `columns`: [rows, size, size]."""
    if matrix.device.type != "cpu":
        return matrix[columns.unsqueeze(2), columns.unsqueeze(1)]
    # whole rows of the matrix first: half the time of picking single numbers
    return torch.stack([matrix.index_select(0, chosen).index_select(1, chosen) for chosen in columns])


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """Take the blocks on the diagonals of square matrices [n, width, width]: [n, width / size, size, size]."""
    count = matrices.shape[-1] // size
    blocks = matrices.reshape(-1, count, size, count, size)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _inverse(matrices: Tensor) -> Tensor:
    return torch.cholesky_inverse(factorize(matrices))


def factorize(matrices: Tensor) -> Tensor:
    """Return Cholesky factors of symmetric matrices; in float64 where float32 is too coarse.

    Args:
        matrices: [..., size, size].

    Raises:
        RecipeError: a matrix has no factor in float64 either.
    """
    factor: Tensor
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
