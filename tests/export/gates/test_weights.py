"""The gate on weights: zeros, and the weights that a file stores."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from spdtool.errors import GateError
from spdtool.export.gates.weights import check_stored_weights, check_zeros
from spdtool.export.graph.weights import StoredWeight
from spdtool.run.records import ZeroCount

EXPECTED = {"a": ZeroCount(5, 10), "b": ZeroCount(2, 4)}
MATRIX = "bert.encoder.layer.0.output.dense.weight"


def test_equal_zeros_pass_whatever_else_the_file_has() -> None:
    assert check_zeros({"a": (5, 10), "b": (2, 4), "other": (0, 1)}, EXPECTED) == 0


def test_other_zeros_are_refused() -> None:
    cases = {
        "a: the exported file has 4 zeros among 10 weights; the checkpoint has 5 among 10": {"a": (4, 10), "b": (2, 4)},
        "b: the exported file has 3 zeros among 4 weights; the checkpoint has 2 among 4": {"a": (5, 10), "b": (3, 4)},
        "b: the exported file has 2 zeros among 5 weights; the checkpoint has 2 among 4": {"a": (5, 10), "b": (2, 5)},
        "a (and 1 more): the exported file has no such matrix; the checkpoint has 5 among 10": {},
    }
    for message, counts in cases.items():
        with pytest.raises(GateError) as caught:
            check_zeros(counts, EXPECTED)
        assert caught.value.message == message


def test_small_weights_may_become_zero_where_they_are_rounded_and_are_counted() -> None:
    assert check_zeros({"a": (7, 10), "b": (3, 4)}, EXPECTED, allow_more=True) == 3
    with pytest.raises(GateError, match="has 4 zeros"):
        check_zeros({"a": (4, 10), "b": (2, 4)}, EXPECTED, allow_more=True)


def test_stored_weights_may_differ_by_their_rounding_and_no_more(toys: ModuleType) -> None:
    model = toys.bert()
    weight = model.get_parameter(MATRIX)
    weight.data[0] = 0.0
    array = weight.detach().numpy().copy()

    def check(changed: np.ndarray, largest_error: float = 1e-3) -> None:
        check_stored_weights([StoredWeight(MATRIX, changed, largest_error), StoredWeight("other", array, 0.0)], model)

    within = np.where(array == 0, 0, array + np.float32(9e-4))
    check(within)
    beyond, not_finite, filled = array.copy(), array.copy(), array.copy()
    beyond[1, :2] += 2e-3
    not_finite[1, 0] = np.nan
    filled[0, :3] = 1e-30
    faults = {
        f"2 of {array.size} weights in the exported file are further from": beyond,
        f"1 of {array.size} weights in the exported file are further from": not_finite,
        "other numbers in place of 3 zeros": filled,
        "holds shape": array[1:],
    }
    for message, changed in faults.items():
        with pytest.raises(GateError, match=message):
            check(changed)
