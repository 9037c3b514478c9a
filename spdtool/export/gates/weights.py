"""The gate on weights: a file has its checkpoint's zeros, and its other weights up to their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from transformers import PreTrainedModel

from spdtool.errors import GateError
from spdtool.export.graph.weights import StoredWeight
from spdtool.run.records import ZeroCount

SLACK = 1e-5  # of the rounding's own float32 arithmetic, as a share of error and largest weight


def check_zeros(
    file_counts: Mapping[str, tuple[int, int]],
    expected: Mapping[str, ZeroCount],
    *,
    allow_more: bool = False,
) -> int:
    """Refuse a file whose matrices have other zeros than the checkpoint's.

    Args:
        file_counts: `(zeros, size)` of the file's matrices, by parameter.
        expected: the same of the checkpoint; further matrices of the file are ignored.
        allow_more: accept further zeros, where small weights are rounded to zero.

    Returns:
        Number of weights that are zero in the file only.

    Raises:
        GateError: names the first matrix that is missing or differs, and how many there are.
    """
    wrong = []
    new_zeros = 0
    for name, (zeros, size) in expected.items():
        file_zeros, file_size = file_counts.get(name, (-1, -1))  # no matrix has these
        if file_size != size or file_zeros < zeros or (file_zeros > zeros and not allow_more):
            wrong.append(name)
        new_zeros += file_zeros - zeros
    if wrong:
        raise GateError(_describe_difference(wrong, file_counts, expected))
    return new_zeros


def check_stored_weights(stored: Iterable[StoredWeight], model: PreTrainedModel) -> None:
    """Refuse a stored weight that fills a zero, or is further from the checkpoint's than its format rounds.

    Raises:
        GateError: names the parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, array, largest_error in stored:
        if name not in parameters:  # a constant of the graph
            continue
        weight = parameters[name].detach().cpu().numpy()
        if weight.shape != array.shape:
            raise GateError(f"{name}: the exported file holds shape {array.shape}; the checkpoint has {weight.shape}")
        filled = int((array[weight == 0] != 0).sum())
        if filled:
            raise GateError(f"{name}: the exported file holds other numbers in place of {filled} zeros")
        error = np.abs(array - weight)
        # The negation counts a NaN as too far.
        too_far = ~(error - largest_error * (1 + SLACK) - SLACK * np.abs(weight).max() <= 0)
        if too_far.any():
            raise GateError(
                f"{name}: {int(too_far.sum())} of {weight.size} weights in the exported file are further from "
                f"the checkpoint's than its storage rounds, by up to {np.nanmax(error):.2g}"
            )


def _describe_difference(
    wrong: list[str], file_counts: Mapping[str, tuple[int, int]], expected: Mapping[str, ZeroCount]
) -> str:
    name = wrong[0]
    matrix = name
    if len(wrong) > 1:
        matrix = f"{name} (and {len(wrong) - 1} more)"
    contents = "no such matrix"
    if name in file_counts:
        contents = "{} zeros among {} weights".format(*file_counts[name])
    zeros, size = expected[name]
    return f"{matrix}: the exported file has {contents}; the checkpoint has {zeros} among {size}"
