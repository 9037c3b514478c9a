"""The gate on logits, with functions in place of models."""

from __future__ import annotations

import numpy as np
import pytest

from spdtool.data.tokens import Batch
from spdtool.errors import GateError
from spdtool.export.gates.logits import compare_logits, measure_deviation

BATCHES = [(f"shape (1, {length})", {"x": np.zeros((1, length))}) for length in (1, 2, 5)]


def one_logits(batch: Batch) -> np.ndarray:
    return np.ones((len(batch["x"]), 2), dtype=np.float32)


def ones_but_at(length: int, difference: float, batch: Batch) -> np.ndarray:
    return one_logits(batch) + difference * (batch["x"].shape[1] == length)


def test_the_largest_difference_is_named_with_its_batch() -> None:
    largest, description = compare_logits(one_logits, lambda batch: ones_but_at(2, 1e-3, batch), BATCHES, 0.01)
    assert largest == pytest.approx(1e-3, rel=1e-3)
    assert description == "shape (1, 2)"


def test_a_difference_beyond_the_tolerance_is_refused() -> None:
    with pytest.raises(GateError, match=r"differ by 0.5 on shape \(1, 5\); the tolerance is 0.01") as error:
        compare_logits(one_logits, lambda batch: ones_but_at(5, 0.5, batch), BATCHES, 0.01)
    assert error.value.hint


def test_files_that_cannot_compute_a_batch_or_give_another_shape_are_refused() -> None:
    def fail(_batch: Batch) -> np.ndarray:
        raise RuntimeError("Got invalid dimensions\nand more")

    with pytest.raises(GateError, match=r"cannot compute shape \(1, 1\): Got invalid dimensions$"):
        compare_logits(one_logits, fail, BATCHES, 0.01)
    with pytest.raises(GateError, match=r"output of shape \(1, 1\) on shape \(1, 1\); the checkpoint's is \(1, 2\)"):
        compare_logits(one_logits, lambda batch: one_logits(batch)[:, :1], BATCHES, 0.01)


def test_logits_that_are_not_finite_are_refused() -> None:
    for value in (np.nan, np.inf):
        for side, message in enumerate(("the checkpoint gives logits", "the exported file gives logits")):
            forwards = [one_logits, one_logits]
            forwards[side] = lambda batch, value=value: one_logits(batch) * value
            with pytest.raises(GateError, match=f"{message} that are not finite on shape"):
                compare_logits(*forwards, BATCHES, 0.01)
    with pytest.raises(GateError, match="the exported file gives logits that are not finite"):
        measure_deviation(one_logits, lambda batch: one_logits(batch) * np.nan, BATCHES)


def test_the_deviation_is_a_share_of_the_logits_over_all_batches() -> None:
    deviation = measure_deviation(one_logits, lambda batch: ones_but_at(2, 0.3, batch), BATCHES)
    assert deviation.relative == pytest.approx(0.3 / np.sqrt(3))
    assert deviation.largest == pytest.approx(0.3)
    assert measure_deviation(lambda batch: 0 * one_logits(batch), one_logits, BATCHES) == (0.0, 1.0), (
        "there are no logits to share"
    )
