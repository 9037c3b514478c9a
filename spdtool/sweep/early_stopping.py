"""Median stopping: which trial of one task and sparsity is so far behind the others that it need not go on.

The rule is that of Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization",
section 3.2.2, with a margin: a trial is stopped when its best dev score is more than `margin` below
the median of what the others had reached with the same progress. Two seeds of one good recipe
differ by less than a margin; two recipes may not.

Progress is the number of finished phases plus the fraction of the current one, so that recipes with
other numbers of epochs can be compared. Before the target sparsity is reached scores say nothing,
and are not reported.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

FEWEST_OTHERS = 2  # a median of fewer trials is an accident

Group = tuple[str, float]
"""Task and sparsity: trials of one group compete."""


class MedianStopping:
    """Keeps the best score of every trial at every progress that it has reported.

    Args:
        margin: points (of a score times 100) below the median at which a trial is stopped.
    """

    def __init__(self, margin: float) -> None:
        self._margin = margin / 100
        self._best: defaultdict[Group, dict[str, dict[float, float]]] = defaultdict(dict)

    def report(self, group: Group, trial: str, progress: float, score: float) -> str | None:
        """Record a dev score; return why the trial is to be stopped, or None.

        Args:
            progress: finished phases plus the fraction of the current one, in [0, 3].
        """
        history = self._best[group].setdefault(trial, {})
        earlier = [best for at, best in history.items() if at <= progress]
        history[progress] = max([score, *earlier])
        reached = []
        for name, scores in self._best[group].items():
            best = best_until(scores, progress)
            if name != trial and best is not None:
                reached.append(best)
        if len(reached) < FEWEST_OTHERS:
            return None
        median = statistics.median(reached)
        if history[progress] >= median - self._margin:
            return None
        return (
            f"its best dev score is {history[progress]:.4f} after {progress:.2f} of 3 phases, where the median of "
            f"{len(reached)} other trials was {median:.4f}"
        )


def best_until(scores: dict[float, float], progress: float) -> float | None:
    """Return the best score up to `progress`, None of a trial that has not come as far."""
    if max(scores) < progress:
        return None
    earlier = [at for at in scores if at <= progress]
    if not earlier:  # its first score came later
        return None
    return scores[max(earlier)]  # scores of a history only rise
