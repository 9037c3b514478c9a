"""Early stopping of trials: far behind the median of the others at the same progress."""

from __future__ import annotations

from spdtool.sweep.early_stopping import MedianStopping

GROUP = ("sst2", 0.9)


def test_a_trial_far_behind_the_median_is_stopped_with_a_reason() -> None:
    stopping = MedianStopping(margin=10)
    for trial, score in (("a", 0.80), ("b", 0.90)):
        assert stopping.report(GROUP, trial, 1.0, score) is None
    reason = stopping.report(GROUP, "c", 1.0, 0.74)
    assert reason is not None
    assert "0.7400 after 1.00 of 3 phases" in reason
    assert "median of 2 other trials was 0.8500" in reason


def test_a_trial_within_the_margin_goes_on() -> None:
    for score in (0.75, 0.80, 0.99):
        stopping = MedianStopping(margin=10)
        for trial in ("a", "b"):
            stopping.report(GROUP, trial, 1.0, 0.85)
        assert stopping.report(GROUP, "c", 1.0, score) is None, score


def test_no_trial_is_stopped_before_two_others_came_as_far() -> None:
    stopping = MedianStopping(margin=10)
    for trial, progress in (("a", 1.0), ("a", 2.0), ("b", 1.0)):
        stopping.report(GROUP, trial, progress, 0.9)
    assert stopping.report(GROUP, "c", 1.5, 0.1) is None
    stopping.report(GROUP, "b", 1.5, 0.9)
    assert stopping.report(GROUP, "c", 1.5, 0.1) is not None


def test_the_best_score_so_far_counts_on_both_sides() -> None:
    stopping = MedianStopping(margin=10)
    for trial in ("a", "b"):
        stopping.report(GROUP, trial, 1.0, 0.9)
        stopping.report(GROUP, trial, 1.5, 0.2)
    assert stopping.report(GROUP, "c", 1.0, 0.85) is None
    assert stopping.report(GROUP, "c", 1.5, 0.1) is None, "it had 0.85 before"
    assert stopping.report(GROUP, "d", 1.5, 0.5) is not None, "the others had 0.9 by then"


def test_other_tasks_and_sparsities_do_not_compete() -> None:
    stopping = MedianStopping(margin=10)
    for trial in ("a", "b"):
        stopping.report(GROUP, trial, 1.0, 0.9)
    assert stopping.report(("cola", 0.9), "c", 1.0, 0.1) is None
    assert stopping.report(("sst2", 0.95), "c", 1.0, 0.1) is None
