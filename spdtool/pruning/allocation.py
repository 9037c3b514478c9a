"""Allocation: how many weights of each matrix are zero, from their scores and the scope that the sparsity holds in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdtool.pruning.patterns import zeros_in

ALL = "all matrices"


@dataclass
class Allocation:
    """Zeros of each matrix, exact in their scope.

    Attributes:
        counts: matrix to its zeros.
        clamped: matrix to its zeros as the scores alone would have it, and as the floor has it.
        least: group of matrices to the share that stays alive there, where there was no room for what was asked.
    """

    counts: dict[str, int] = field(default_factory=dict)
    clamped: dict[str, tuple[int, int]] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)


def groups(names: Mapping[str, object] | list[str], scope: str) -> dict[str, list[str]]:
    """The matrices over which the sparsity holds, as name of the group to names of its matrices.

    Args:
        scope: `matrix`, each for itself; `type`, those whose names differ in the number of the layer; `global`, all.
    """
    made: dict[str, list[str]] = {}
    for name in names:
        group = {"matrix": name, "global": ALL}.get(scope) or kind(name)
        made.setdefault(group, []).append(name)
    return made


def kind(name: str) -> str:
    """A parameter's name without the number of its layer, which is its first number: `layer.*.query.weight`."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name, count=1)


def allocate(scores: Mapping[str, Tensor], sparsity: float, scope: str, least: float = 0.0) -> Allocation:
    """The zeros that `sparsity` asks for, given to the lowest scores of each group.

    Args:
        scores: matrix to scores; minus infinity where a weight is dead and stays so, which always counts as a zero.
        least: share of each matrix that stays alive, at least one weight, unless the scope is `matrix`.
    """
    made = Allocation()
    for group, names in groups(list(scores), scope).items():
        if len(names) == 1:
            made.counts[names[0]] = zeros_in(scores[names[0]].numel(), sparsity)
        else:
            _share(made, group, {name: _comparable(scores[name]) for name in names}, sparsity, least)
    return made


def _share(made: Allocation, group: str, scores: dict[str, Tensor], sparsity: float, least: float) -> None:
    """Add the counts of one group to `made`: one threshold, but no matrix beyond its floor."""
    sizes = {name: score.numel() for name, score in scores.items()}
    dead = {name: int((score == -math.inf).sum()) for name, score in scores.items()}
    total = max(zeros_in(sum(sizes.values()), sparsity), sum(dead.values()))
    floors, held = _floors(sizes, total, least)
    if held is not None:
        made.least[group] = held
    most = {name: max(sizes[name] - floors[name], dead[name]) for name in sizes}
    plain = counts = _lowest(scores, total)
    while over := [name for name in counts if counts[name] > most[name]]:
        free = {name: score for name, score in scores.items() if name in counts and name not in over}
        fixed = {name: most[name] for name in scores if name not in free}
        made.counts |= fixed
        counts = _lowest(free, total - sum(fixed.values()))
    made.counts |= counts
    made.clamped |= {n: (plain[n], most[n]) for n in scores if plain[n] > most[n]}


def _comparable(score: Tensor) -> Tensor:
    """Flat, with the highest of all scores in place of what is no number."""
    return score.flatten().nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf)


def _floors(sizes: Mapping[str, int], total: int, least: float) -> tuple[dict[str, int], float | None]:
    """Weights that stay alive in each matrix, and the share that they are where `least` leaves too few to go."""
    room = sum(sizes.values()) - total
    density = room / sum(sizes.values())
    asked = {name: max(1, math.ceil(least * size)) for name, size in sizes.items()}
    even = {name: math.floor(density * size) for name, size in sizes.items()}
    one = {name: max(1, floor) for name, floor in even.items()}
    for floors, held in ((asked, None), (one, density), (even, density)):
        if sum(floors.values()) <= room:
            return floors, held
    return dict.fromkeys(sizes, 0), 0.0


def _lowest(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of the `total` lowest scores each matrix holds; ties go in the order of the matrices."""
    if total == 0 or not scores:
        return dict.fromkeys(scores, 0)
    threshold = torch.cat(list(scores.values())).kthvalue(total).values
    counts = {name: int((score < threshold).sum()) for name, score in scores.items()}
    left = total - sum(counts.values())
    for name, score in scores.items():
        tied = min(left, int((score == threshold).sum()))
        counts[name] += tied
        left -= tied
    return counts
