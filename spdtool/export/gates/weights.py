"""The gate on weights: a file must hold the zeros of its checkpoint, and its other weights up to their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from transformers import PreTrainedModel

from spdtool.errors import GateError
from spdtool.export.graph.weights import StoredWeight

SLACK = 1e-5  # of float32 arithmetic in a rounding


def check_zeros(
    audited: Mapping[str, tuple[int, int]], expected: Mapping[str, tuple[int, int]], *, more: bool = False
) -> None:
    """Refuse exported files whose matrices have other zeros than the checkpoint's.

    Args:
        more: let them have more, where small weights are rounded to zero.

    Raises:
        GateError: names the first matrix that is missing or differs, and how many there are.
    """

    def differs(found: tuple[int, int] | None, zeros: int, size: int) -> bool:
        return found is None or found[1] != size or found[0] < zeros or (found[0] > zeros and not more)

    wrong = [name for name, (zeros, size) in expected.items() if differs(audited.get(name), zeros, size)]
    if not wrong:
        return
    name, further = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    found = audited.get(name)
    shown = f"{found[0]} zeros among {found[1]} weights" if found else "no such matrix"
    raise GateError(
        f"{name}{further}: the exported file has {shown}; the checkpoint has {expected[name][0]} among "
        f"{expected[name][1]}"
    )


def check_stored_weights(stored: Iterable[StoredWeight], model: PreTrainedModel) -> None:
    """Refuse stored weights that are not the model's: a zero that is none, or more than the storage rounds.

    Raises:
        GateError: names the parameter, and what was found.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, array, error in stored:
        if name not in parameters:
            continue
        weight = parameters[name].detach().cpu().numpy()
        if weight.shape != array.shape:
            raise GateError(f"{name}: the exported file holds shape {array.shape}; the checkpoint has {weight.shape}")
        filled = int((array[weight == 0] != 0).sum())
        if filled:
            raise GateError(f"{name}: the exported file holds other numbers in place of {filled} zeros")
        moved = np.abs(array - weight) - error * (1 + SLACK) - SLACK * np.abs(weight).max()
        if not (moved <= 0).all():
            raise GateError(
                f"{name}: {int((~(moved <= 0)).sum())} of {weight.size} weights in the exported file are further from "
                f"the checkpoint's than its storage rounds, by up to {np.nanmax(np.abs(array - weight)):.2g}"
            )
