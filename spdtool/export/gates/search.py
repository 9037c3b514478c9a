"""Find the modules that have to stay in float32 for rounded arithmetic to keep the dev score.

Each module is first rounded alone, which measures the damage it does. Then the worst ones stay in
float32, as few as the budget needs, which a bisection finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

Modules = tuple[str, ...]


class SearchResult(NamedTuple):
    """What the search found.

    Attributes:
        float32_modules: in the order of the model; None: only all of them would meet the budget.
        damage: by module, or by neighbouring modules that were tried together.
        tries: number of files that were written.
    """

    float32_modules: Modules | None
    damage: dict[str, float]
    tries: int


def search_float32_modules(
    modules: Sequence[str],
    damage: Callable[[Modules], float],
    meets_budget: Callable[[Modules], bool],
    tries: int,
) -> SearchResult:
    """Find the fewest modules, taken in the order of their damage, that have to stay in float32.

    Args:
        modules: all that may, in the order of the model.
        damage: of a file in which the given modules stay in float32.
        meets_budget: whether such a file does; assumed to stay true when modules are added.
        tries: most calls of both together; with more modules than that, neighbours are tried
            together.
    """
    groups = _group_neighbours(modules, tries)
    group_damage = {}
    for group in groups:
        all_others = tuple(module for module in modules if module not in group)
        group_damage[group] = damage(all_others)
    # A bisection, because every try writes and scores a file: minutes, with a large dev set.
    worst_first = sorted(groups, key=lambda group: -group_damage[group])
    used_tries = len(groups)
    low, high = 1, len(groups)  # with all groups in float32 the file would not be rounded any more
    while low < high:
        middle = (low + high) // 2
        used_tries += 1
        if meets_budget(_in_model_order(modules, worst_first[:middle])):
            high = middle
        else:
            low = middle + 1
    damages = {" ".join(group): value for group, value in group_damage.items()}
    if high == len(groups):
        return SearchResult(None, damages, used_tries)
    return SearchResult(_in_model_order(modules, worst_first[:high]), damages, used_tries)


def _group_neighbours(modules: Sequence[str], tries: int) -> list[Modules]:
    """Split the modules into as many groups of neighbours as leave tries for the bisection."""
    count = len(modules)
    while count > 1 and count + math.ceil(math.log2(count)) > tries:
        count -= 1
    edges = [round(index * len(modules) / count) for index in range(count + 1)]
    return [tuple(modules[start:end]) for start, end in pairwise(edges)]


def _in_model_order(modules: Sequence[str], groups: Sequence[Modules]) -> Modules:
    chosen = set().union(*groups)
    return tuple(module for module in modules if module in chosen)
