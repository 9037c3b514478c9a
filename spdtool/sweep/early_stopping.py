"""How trials of one task and sparsity stand against each other while they run, and which of them is hopeless.

The rule is that of median stopping (Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization", section
3.2.2) with a margin: a trial is hopeless when its best dev score is more than `behind` below the median of what the
others had reached at the same place. Two seeds of one good recipe differ by less than a margin; two recipes may not.

A place is the number of finished phases plus the part of the phase that is done, so that recipes with other numbers of
epochs can be compared. Before the target sparsity is reached scores say nothing, and are not reported.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

FEWEST = 2  # other trials at a place, before anything is said about it

Group = tuple[str, float]  # task, sparsity


class Standings:
    """Keeps the best score of every trial at every place that it has reported.

    Args:
        behind: points (of a score times 100) below the median at which a trial is hopeless.
    """

    def __init__(self, behind: float) -> None:
        self.behind = behind / 100
        self._best: defaultdict[Group, dict[str, dict[float, float]]] = defaultdict(dict)

    def report(self, group: Group, trial: str, place: float, score: float) -> str | None:
        """Take note of a dev score; say why the trial is hopeless, or None."""
        own = self._best[group].setdefault(trial, {})
        own[place] = max([score, *(best for at, best in own.items() if at <= place)])
        others = [_until(places, place) for name, places in self._best[group].items() if name != trial]
        reached = [best for best in others if best is not None]
        if len(reached) < FEWEST:
            return None
        median = statistics.median(reached)
        if own[place] >= median - self.behind:
            return None
        return (
            f"its best dev score is {own[place]:.4f} after {place:.2f} of 3 phases, where the median of {len(reached)} "
            f"other trials was {median:.4f}"
        )


def _until(places: dict[float, float], place: float) -> float | None:
    """The best score up to `place` of a trial that has come as far."""
    if max(places) < place:
        return None
    earlier = [at for at in places if at <= place]
    return places[max(earlier)] if earlier else None
