"""Which parts of a model have to stay in float32 for int8 to keep the dev metric.

Each part is first rounded alone, which says what damage it does; then the worst ones are kept, as few as will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

Kept = tuple[str, ...]


class Found(NamedTuple):
    """What was kept (None: nothing short of everything would do), the damage by part, and how many trials it took."""

    kept: Kept | None
    damage: dict[str, float]
    tries: int


def search(parts: Sequence[str], damage: Callable[[Kept], float], passes: Callable[[Kept], bool], tries: int) -> Found:
    """The fewest parts, in the order of their damage, that have to stay in float32.

    Args:
        damage: of a file in which the given parts stay in float32.
        passes: whether such a file keeps within the budget; taken to be so for more parts where it is for fewer.
        tries: most calls of both together; where there are more parts, neighbours are looked at together.
    """
    groups = _grouped(parts, tries)
    done = {group: damage(tuple(part for part in parts if part not in group)) for group in groups}
    worst = sorted(groups, key=lambda group: -done[group])
    spent, low, high = len(groups), 1, len(groups)  # all of them in float32 is no int8 file any more
    while low < high:
        middle = (low + high) // 2
        spent += 1
        if passes(_joined(parts, worst[:middle])):
            high = middle
        else:
            low = middle + 1
    kept = _joined(parts, worst[:high]) if high < len(groups) else None
    return Found(kept, {" ".join(group): value for group, value in done.items()}, spent)


def _grouped(parts: Sequence[str], tries: int) -> list[Kept]:
    """Parts in as many groups of neighbours as leave enough trials for the bisection."""
    count = len(parts)
    while count > 1 and count + math.ceil(math.log2(count)) > tries:
        count -= 1
    edges = [round(place * len(parts) / count) for place in range(count + 1)]
    return [tuple(parts[start:end]) for start, end in pairwise(edges)]


def _joined(parts: Sequence[str], groups: Sequence[Kept]) -> Kept:
    chosen = {part for group in groups for part in group}
    return tuple(part for part in parts if part in chosen)
