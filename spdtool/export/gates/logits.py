"""The gate on logits: a file must compute what its checkpoint computes.

It knows nothing of a file format: it compares two functions from a batch to logits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spdtool.data.tokens import Batch
from spdtool.errors import GateError
from spdtool.models.predict import Forward


def compare_logits(
    expected: Forward, found: Forward, batches: Iterable[tuple[str, Batch]], tolerance: float
) -> tuple[float, str]:
    """The largest difference of a logit between two forwards, and the batch that shows it.

    Raises:
        GateError: it is above `tolerance`, or a logit is not finite; names the batch.
    """
    largest, where = 0.0, ""
    for name, batch in batches:
        reference, logits = expected(batch), found(batch)
        for who, values in (("checkpoint", reference), ("exported file", logits)):
            if not np.isfinite(values).all():
                raise GateError(f"the {who} gives logits that are not finite on {name}")
        difference = float(np.abs(reference - logits).max())
        if difference > tolerance:
            raise GateError(
                f"checkpoint and exported file differ by {difference:.2g} on {name}; the tolerance is {tolerance:g}",
                "export.tolerance sets it; a difference that is much larger is a fault of the export",
            )
        if difference >= largest:
            largest, where = difference, name
    return largest, where


def measure_deviation(expected: Forward, found: Forward, batches: Iterable[tuple[str, Batch]]) -> tuple[float, float]:
    """How far coarse arithmetic moves the logits: root mean square as a share of the logits' own, and the most.

    Raises:
        GateError: a logit is not finite; names the batch.
    """
    moved, size, largest = 0.0, 0.0, 0.0
    for name, batch in batches:
        reference, logits = expected(batch).astype(np.float64), found(batch).astype(np.float64)
        if not np.isfinite(logits).all():
            raise GateError(f"the exported file gives logits that are not finite on {name}")
        moved += float(np.square(logits - reference).sum())
        size += float(np.square(reference).sum())
        largest = max(largest, float(np.abs(logits - reference).max()))
    return float(np.sqrt(moved / size)) if size else 0.0, largest
