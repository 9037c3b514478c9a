"""Calibration: known values, a recovered temperature, and optimal thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from spdtool.tasks.scores.calibration import (
    best_thresholds,
    class_confidences,
    class_probabilities,
    fit_temperature,
    label_confidences,
    label_probabilities,
    summarize_confidences,
)
from spdtool.tasks.scores.metrics import f1_of_labels


def drawn_classes(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw labels by the softmax of `logits`, which makes the logits calibrated."""
    generator = np.random.default_rng(seed)
    return (class_probabilities(logits).cumsum(axis=1) < generator.random((len(logits), 1))).sum(axis=1)


def test_the_temperature_of_scaled_logits_is_recovered() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (4000, 5))
    labels = drawn_classes(logits)
    for scale in (0.3, 1.0, 3.0):
        temperature = fit_temperature(lambda value, scale=scale: class_confidences(scale * logits, labels, value).nll)
        assert temperature == pytest.approx(scale, rel=0.06), scale
        calibrated = summarize_confidences(class_confidences(scale * logits, labels, temperature), 15)
        raw = summarize_confidences(class_confidences(scale * logits, labels, 1.0), 15)
        assert calibrated.ece < 0.03
        assert calibrated.nll <= raw.nll
        if scale != 1.0:
            assert calibrated.ece < raw.ece / 2
            assert calibrated.brier < raw.brier


def test_labels_are_calibrated_one_by_one() -> None:
    logits = np.random.default_rng(1).normal(-1, 2, (3000, 3))
    labels = (np.random.default_rng(2).random(logits.shape) < label_probabilities(logits)).astype(np.float32)
    temperature = fit_temperature(lambda value: label_confidences(2 * logits, labels, value).nll)
    assert temperature == pytest.approx(2, rel=0.05)
    assert summarize_confidences(label_confidences(2 * logits, labels, temperature), 10).ece < 0.02


def test_rows_without_information_leave_the_temperature_at_1() -> None:
    logits = np.array([[2.0, -2.0], [-1.0, 1.0]])
    for labels in (np.array([0, 1]), np.array([1, 0])):
        assert fit_temperature(lambda value, labels=labels: class_confidences(logits, labels, value).nll) == 1.0


def test_figures_by_hand() -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]]))
    labels = np.array([0, 1, 1, 1])
    figures = summarize_confidences(class_confidences(logits, labels, 1.0), 2)
    assert figures.brier == pytest.approx(2 * (0.2**2 + 0.6**2 + 0.3**2 + 0.1**2) / 4)
    assert figures.nll == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean())
    assert figures.ece == pytest.approx(abs(0.75 - (0.8 + 0.6 + 0.7 + 0.9) / 4))
    assert [tuple(entry) for entry in figures.bins] == [(4, pytest.approx(0.75), 0.75)]
    labelled = label_confidences(logits[:, 1:], labels[:, None].astype(np.float32), 1.0)
    assert labelled.brier == pytest.approx(np.square(label_probabilities(logits[:, 1]) - labels).mean())


def test_extreme_logits_give_finite_figures() -> None:
    figures = class_confidences(np.array([[1e4, -1e4]]), np.array([1]), 1.0)
    assert np.isfinite(figures.nll)
    assert np.isfinite(label_probabilities(np.array([1e4, -1e4]))).all()


def test_no_other_threshold_has_a_higher_f1() -> None:
    generator = np.random.default_rng(3)
    for trial in range(20):
        logits = generator.normal(0, 1, (30, 4)).round(1).astype(np.float32)  # with ties
        gold = generator.random((30, 4)) < (0.1, 0.3, 0.5, 0.9)
        thresholds = best_thresholds(logits, gold)
        best = f1_of_labels(gold, logits > np.array(thresholds))
        for threshold in np.arange(-4, 4, 0.05):
            assert (f1_of_labels(gold, logits > threshold) <= best + 1e-12).all(), (trial, threshold)


def test_a_label_that_no_row_has_keeps_one_half_and_of_equal_thresholds_the_nearest_to_it_is_taken() -> None:
    logits = np.array([[3.0, 1.0], [2.0, 2.0], [-4.0, 3.0]], np.float32)
    assert best_thresholds(logits, np.array([[1, 0], [1, 0], [0, 0]])) == [-1.0, 0.0]
