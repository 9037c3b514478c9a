"""Bootstrap intervals and paired tests: known values and clear cases."""

from __future__ import annotations

import numpy as np
import pytest

from spdtool.tasks.scores.significance import bootstrap_interval, bootstrap_scores, mcnemar, paired_bootstrap


def right_rows(both_right: int, teacher_only: int, student_only: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both_right, teacher_only, student_only, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_mcnemar_is_the_exact_binomial_test_of_the_rows_that_one_model_alone_has_right() -> None:
    # by hand: 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10
    test = mcnemar(*right_rows(50, 8, 2, 5))
    assert test.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert (test.teacher_only, test.student_only) == (8, 2)
    assert mcnemar(*right_rows(10, 0, 0, 3)).p_value == 1.0
    assert mcnemar(*right_rows(0, 4, 4, 0)).p_value == 1.0
    assert "8 rows only the teacher has right, 2 only the student" in test.describe()


def test_the_interval_of_an_accuracy_is_near_the_normal_one_and_repeats_by_its_seed() -> None:
    is_right = np.arange(400) < 320
    (scores,) = bootstrap_scores((lambda rows: float(is_right[rows].mean()),), 400, resamples=2000, seed=3)
    interval = bootstrap_interval(0.8, scores, 0.95)
    half_width = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert interval.low == pytest.approx(0.8 - half_width, abs=0.006)
    assert interval.high == pytest.approx(0.8 + half_width, abs=0.006)
    (same_seed,) = bootstrap_scores((lambda rows: float(is_right[rows].mean()),), 400, resamples=2000, seed=3)
    assert np.array_equal(scores, same_seed)
    (other_seed,) = bootstrap_scores((lambda rows: float(is_right[rows].mean()),), 400, resamples=2000, seed=4)
    assert not np.array_equal(scores, other_seed)


def test_models_are_scored_on_the_same_resamples() -> None:
    values = np.arange(50.0)
    first, second = bootstrap_scores(
        (lambda rows: float(values[rows].mean()), lambda rows: float(values[rows].mean() + 1)),
        50,
        resamples=100,
        seed=0,
    )
    np.testing.assert_allclose(second - first, 1)


def test_a_paired_bootstrap_tells_a_difference_from_none() -> None:
    assert paired_bootstrap(np.full(999, -0.1)).p_value == pytest.approx(2 / 1000)
    assert paired_bootstrap(np.zeros(999)).p_value == 1.0
    assert paired_bootstrap(np.linspace(-1, 1, 1000)).p_value > 0.9
