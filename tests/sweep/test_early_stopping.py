"""Which trials are hopeless: far behind the median at the same place, and never before there is one."""

from __future__ import annotations

import pytest

from spdtool.sweep.early_stopping import Standings

GROUP = ("sst2", 0.9)


def test_a_trial_far_behind_the_median_is_hopeless_and_says_why() -> None:
    standings = Standings(behind=10)
    for trial, score in (("a", 0.80), ("b", 0.90)):
        assert standings.report(GROUP, trial, 1.0, score) is None
    reason = standings.report(GROUP, "c", 1.0, 0.74)
    assert reason is not None
    assert "0.7400 after 1.00 of 3 phases" in reason
    assert "median of 2 other trials was 0.8500" in reason


@pytest.mark.parametrize("score", [0.75, 0.80, 0.99])
def test_a_trial_within_the_margin_goes_on(score: float) -> None:
    standings = Standings(behind=10)
    for trial in ("a", "b"):
        standings.report(GROUP, trial, 1.0, 0.85)
    assert standings.report(GROUP, "c", 1.0, score) is None


def test_nothing_is_said_without_two_others_that_came_as_far() -> None:
    standings = Standings(behind=10)
    for trial, place in (("a", 1.0), ("a", 2.0), ("b", 1.0)):
        standings.report(GROUP, trial, place, 0.9)
    assert standings.report(GROUP, "c", 1.5, 0.1) is None
    standings.report(GROUP, "b", 1.5, 0.9)
    assert standings.report(GROUP, "c", 1.5, 0.1) is not None


def test_the_best_score_so_far_counts_on_both_sides() -> None:
    standings = Standings(behind=10)
    for trial in ("a", "b"):
        standings.report(GROUP, trial, 1.0, 0.9)
        standings.report(GROUP, trial, 1.5, 0.2)
    assert standings.report(GROUP, "c", 1.0, 0.85) is None
    assert standings.report(GROUP, "c", 1.5, 0.1) is None, "it had 0.85 before"
    assert standings.report(GROUP, "d", 1.5, 0.5) is not None, "the others had 0.9 by then"


def test_other_tasks_and_sparsities_do_not_compete() -> None:
    standings = Standings(behind=10)
    for trial in ("a", "b"):
        standings.report(GROUP, trial, 1.0, 0.9)
    assert standings.report(("cola", 0.9), "c", 1.0, 0.1) is None
    assert standings.report(("sst2", 0.95), "c", 1.0, 0.1) is None
