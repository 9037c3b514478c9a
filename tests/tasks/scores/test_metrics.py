"""Each metric against its definition, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spdtool.tasks.scores.metrics import (
    METRICS,
    describe_headline,
    f1_of_label_sets,
    f1_of_labels,
    mean_average_precision,
)

GOLD = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 1])
GUESS = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1])


def test_accuracy_f1_and_matthews_by_their_definitions() -> None:
    pairs = list(zip(GOLD.tolist(), GUESS.tolist(), strict=True))
    tp, tn, fp, fn = pairs.count((1, 1)), pairs.count((0, 0)), pairs.count((0, 1)), pairs.count((1, 0))
    assert METRICS["accuracy"](GOLD, GUESS) == pytest.approx((tp + tn) / 10)
    assert METRICS["f1"](GOLD, GUESS) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["matthews"](GOLD, GUESS) == pytest.approx((tp * tn - fp * fn) / root)
    negative = 2 * tn / (2 * tn + fp + fn)
    assert METRICS["f1_macro"](GOLD, GUESS) == pytest.approx((METRICS["f1"](GOLD, GUESS) + negative) / 2)


def test_correlations_by_their_definitions() -> None:
    gold, predicted = np.array([0.0, 1, 2, 3, 5]), np.array([0.1, 0.9, 3.5, 2.9, 9])
    a, b = gold - gold.mean(), predicted - predicted.mean()
    assert METRICS["pearson"](gold, predicted) == pytest.approx((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    ranks = np.array([0, 1, 3, 2, 4])
    assert METRICS["spearman"](gold, predicted) == pytest.approx(METRICS["pearson"](np.arange(5.0), ranks))


def test_a_correlation_that_is_undefined_is_zero() -> None:
    for name in ("pearson", "spearman"):
        for predicted in ([2, 2, 2], [1, np.nan, 2], [1, np.inf, 2]):
            assert METRICS[name](np.array([1.0, 2, 3]), np.array(predicted)) == 0.0, (name, predicted)


def test_a_model_with_one_answer_has_a_score_and_no_warning() -> None:
    for name in ("accuracy", "f1", "f1_macro", "matthews"):
        for constant in (0, 1):
            assert 0 <= METRICS[name](GOLD, np.full(10, constant)) < 0.8, (name, constant)


def test_metrics_of_label_sets_agree_with_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, f1_score

    generator = np.random.default_rng(0)
    for trial in range(20):
        gold = generator.random((40, 5)) < (0.05, 0.2, 0.5, 0.8, 0.3)
        gold[0] = True  # scikit-learn warns of a label that no row has
        scores = generator.normal(0, 1, (40, 5)).round(trial % 3)  # with ties, and without
        predicted = scores > 0.4
        assert f1_of_label_sets(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="micro"))
        f1_by_label = f1_score(gold, predicted, average=None, zero_division=0.0)
        np.testing.assert_allclose(f1_of_labels(gold, predicted), f1_by_label)
        assert mean_average_precision(gold, scores) == pytest.approx(average_precision_score(gold, scores))


def test_a_label_that_no_row_has_counts_as_0_in_f1_and_not_at_all_in_average_precision() -> None:
    gold = np.array([[True, False], [False, False]])
    assert f1_of_labels(gold, gold).tolist() == [1.0, 0.0]
    assert mean_average_precision(gold, np.array([[2.0, 1.0], [1.0, 2.0]])) == 1.0
    assert mean_average_precision(gold[1:], np.zeros((1, 2))) == 0.0


def test_the_headline_is_named_as_a_sentence_has_it() -> None:
    for metrics, expected in (
        (("accuracy",), "accuracy"),
        (("accuracy", "f1"), "mean of accuracy and f1"),
        (("mrr@10", "ndcg@10", "map"), "mean of mrr@10, ndcg@10 and map"),
    ):
        assert describe_headline(metrics) == expected
