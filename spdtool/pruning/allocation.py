"""Allocation: how many weights or blocks of each matrix are zero, by their scores and the scope."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdtool.pruning.patterns import kth_lowest

ALL = "all matrices"


@dataclass
class Allocation:
    """Zeros of each matrix, exact in their scope.

    Attributes:
        zeros: matrix to its number of zeros.
        clamped: matrix to its zeros as the scores alone would have them, and as the floor has them.
        lowered: group of matrices to the share that stays alive there, where the floor left no
            room for the sparsity.
    """

    zeros: dict[str, int] = field(default_factory=dict)
    clamped: dict[str, tuple[int, int]] = field(default_factory=dict)
    lowered: dict[str, float] = field(default_factory=dict)


def zeros_in(size: int, sparsity: float, block_size: int = 1) -> int:
    """Return the number of zeros of `size` weights, rounded to the nearest block.

    Args:
        sparsity: share of zeros, in [0, 1].
        block_size: weights that live and die together.
    """
    return round(size // block_size * sparsity) * block_size


def group_by_scope(names: Iterable[str], scope: str) -> dict[str, list[str]]:
    """Group the matrices over which the sparsity holds: name of the group to names of its matrices.

    Args:
        scope: `matrix`, each for itself; `type`, those whose names differ in the number of the
            layer; `global`, all.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        group = {"matrix": name, "global": ALL}.get(scope) or matrix_type(name)
        groups.setdefault(group, []).append(name)
    return groups


def matrix_type(name: str) -> str:
    """A parameter's name without the number of its layer: `layer.*.query.weight`."""
    # the first number: later ones count the modules inside a layer
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name, count=1)


def allocate(scores: Mapping[str, Tensor], sparsity: float, scope: str, least: float = 0.0) -> Allocation:
    """Give the zeros that `sparsity` asks for to the lowest scores of each group.

    Args:
        scores: matrix to scores; minus infinity where a weight is dead and stays so, which always
            counts as a zero.
        sparsity: share of zeros in each group of matrices, in [0, 1].
        scope: which matrices are a group, see `group_by_scope`.
        least: share of each matrix that stays alive, at least one weight, unless the scope is
            `matrix`.
    """
    allocation = Allocation()
    for group, names in group_by_scope(scores, scope).items():
        if len(names) == 1:  # the size alone decides, so that the scores need not exist yet
            allocation.zeros[names[0]] = zeros_in(scores[names[0]].numel(), sparsity)
        else:
            comparable = {name: _make_comparable(scores[name]) for name in names}
            _allocate_group(allocation, group, comparable, sparsity, least)
    return allocation


def _allocate_group(
    allocation: Allocation, group: str, scores: Mapping[str, Tensor], sparsity: float, least: float
) -> None:
    """Add the zeros of one group: one threshold for all its matrices, but none beyond its floor."""
    sizes = {name: score.numel() for name, score in scores.items()}
    dead = {name: int((score == -math.inf).sum()) for name, score in scores.items()}
    total = max(zeros_in(sum(sizes.values()), sparsity), sum(dead.values()))
    floors, lowered = _choose_floors(sizes, total, least)
    if lowered is not None:
        allocation.lowered[group] = lowered
    # What is dead for good counts as a zero, even where that leaves less than the floor.
    limits = {name: max(size - floors[name], dead[name]) for name, size in sizes.items()}
    unlimited = zeros = _count_lowest(scores, total)
    # zeros beyond a limit go to the next lowest scores elsewhere, where they may reach another limit
    fixed: dict[str, int] = {}
    free = dict(scores)
    while over := [name for name, count in zeros.items() if count > limits[name]]:
        for name in over:
            fixed[name] = limits[name]
            del free[name]
        zeros = _count_lowest(free, total - sum(fixed.values()))
    allocation.zeros |= fixed | zeros
    for name in scores:
        if unlimited[name] > limits[name]:
            allocation.clamped[name] = (unlimited[name], limits[name])


def _make_comparable(score: Tensor) -> Tensor:
    """Flatten scores, and put the highest of all in place of what is no number."""
    # `kthvalue` ranks nan highest, but nan is neither below nor equal to a threshold
    return score.flatten().nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf)


def _choose_floors(sizes: Mapping[str, int], total: int, least: float) -> tuple[dict[str, int], float | None]:
    """Choose how many weights stay alive in each matrix.

    Returns:
        the counts, and their share of the weights if it had to be lowered below `least`.

    Args:
        total: zeros of all matrices together, which come before the floors.
    """
    alive = sum(sizes.values()) - total
    density = alive / sum(sizes.values())
    wanted = {name: max(1, math.ceil(least * size)) for name, size in sizes.items()}
    even = {name: math.floor(density * size) for name, size in sizes.items()}
    even_not_empty = {name: max(1, floor) for name, floor in even.items()}
    # the first that leaves enough zeros; rounding may forbid even the last
    for floors, lowered in ((wanted, None), (even_not_empty, density), (even, density)):
        if sum(floors.values()) <= alive:
            return floors, lowered
    return dict.fromkeys(sizes, 0), 0.0


def _count_lowest(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Count how many of the `total` lowest scores each matrix has; ties go in the order of the matrices."""
    if total == 0 or not scores:
        return dict.fromkeys(scores, 0)
    threshold = kth_lowest(torch.cat(list(scores.values())), total)
    counts = {name: int((score < threshold).sum()) for name, score in scores.items()}
    remaining = total - sum(counts.values())
    for name, score in scores.items():
        tied = min(remaining, int((score == threshold).sum()))
        counts[name] += tied
        remaining -= tied
    return counts
