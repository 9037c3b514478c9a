"""The gate on weights: a file stores the checkpoint's weights, position by position, up to the rounding of its format.

The bound of each weight comes from the checkpoint, never from a scale in the file:

    fp32    equal
    fp16    as near as the nearest fp16 number
    int8    half a step, which is the largest weight of the row (or matrix) / 127
    int6    half a step, which is the largest weight of the row / 31

Two exceptions. A weight that would round to zero may be raised to one step, so that `weight != 0`
stays the mask. A target that clips large weights on purpose says so by `clipped_share`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch

from spdtool.errors import GateError, ModelError
from spdtool.export.gates.reference import Reference
from spdtool.export.graph.weights import StoredWeight, find_unread_parameters
from spdtool.export.target import MODEL_FILE, StorageFormats, Target
from spdtool.models.predict import torch_forward

FORMATS = ("fp32", "fp16", "int8", "int6")  # from exact to coarse
LEAST_FP16 = 1.2e-7  # to which smaller numbers may be raised; onnxruntime's converter chooses two of fp16's last steps
INT8_SLACK = 1e-3  # of a step: scales and quotients are computed in float32
PROBE = 0.5  # size of the noise that shows whether any logit depends on a parameter


def check_weights(target: Target, reference: Reference, folder: Path) -> int:
    """Compare every stored weight with the checkpoint's.

    Returns:
        Number of weights of the prunable matrices that are zero in the file only.

    Raises:
        GateError: names the parameter that is missing, of another shape, stored more coarsely than the
            target says, or further from the checkpoint's than its format rounds.
    """
    parameters = dict(reference.model.named_parameters(remove_duplicate=False))
    formats = target.storage_formats(reference.recipe)
    new_zeros: dict[str, int] = {}
    stored_ids = set[int]()
    unread = _find_unread(target, folder)
    for stored in _read_stored_weights(target, folder):
        name = stored.name
        if name not in parameters:
            raise GateError(f"{name}: the exported file stores it; the checkpoint has no such weight")
        prunable = name in reference.zero_counts
        _check_format(stored, formats, prunable=prunable)
        weight = parameters[name].detach().numpy()
        check_weight(stored, weight, clipped_share=target.clipped_share)
        vanished = int(np.count_nonzero((stored.array == 0) & (weight != 0)))
        if vanished and not target.rounds_arithmetic:
            raise GateError(f"{name}: {vanished} weights are zero in the exported file and not in the checkpoint")
        if prunable:
            new_zeros[name] = max(vanished, new_zeros.get(name, 0))
        if name not in unread:  # a right constant is worth nothing beside the one that is computed with
            stored_ids.add(id(parameters[name]))  # tied weights are one parameter with two names
    missing = [name for name, parameter in parameters.items() if id(parameter) not in stored_ids]
    _require_unused(missing, reference)
    return sum(new_zeros.values())


def check_weight(stored: StoredWeight, weight: np.ndarray, *, clipped_share: float = 0.0) -> None:
    """Compare a stored parameter with the checkpoint's `weight`, position by position.

    Raises:
        GateError: names the parameter, and how many weights are too far away.
    """
    name, array = stored.name, stored.array
    if weight.shape != array.shape:
        raise GateError(f"{name}: the exported file holds shape {array.shape}; the checkpoint has {weight.shape}")
    filled = int(np.count_nonzero(array[weight == 0]))  # a NaN counts as well
    if filled:
        raise GateError(f"{name}: the exported file holds other numbers in place of {filled} zeros")
    error = np.abs(array - weight)
    too_far = ~(error <= largest_rounding(stored, weight))  # negated: a NaN is too far
    if too_far.any() and stored.storage != "fp32":
        too_far &= ~_raised_from_zero(stored, weight)
    if clipped_share and too_far.any():
        clipped = too_far & _is_clipped(stored, weight)
        if np.count_nonzero(clipped) <= clipped_share * weight.size:
            too_far &= ~clipped
    if too_far.any():
        raise GateError(
            f"{name}: {np.count_nonzero(too_far)} of {weight.size} weights in the exported file are further from "
            f"the checkpoint's than {stored.storage} rounds, by up to {np.nanmax(error):.2g}"
        )


def largest_rounding(stored: StoredWeight, weight: np.ndarray) -> np.ndarray | float:
    """Largest error of each weight that its format explains, computed from the checkpoint's `weight`."""
    if stored.storage == "fp32":
        return 0.0
    if stored.storage == "fp16":
        with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite
            nearest = weight.astype(np.float16).astype(np.float32)
        return np.asarray(np.nan_to_num(np.abs(nearest - weight), posinf=0.0))
    return np.asarray(_int8_step(stored, weight) * np.float32(0.5 + INT8_SLACK))


def _int8_step(stored: StoredWeight, weight: np.ndarray) -> np.ndarray:
    """Distance of two int8 numbers: one for each index of the scale's axis, or one for all."""
    axes = tuple(axis for axis in range(weight.ndim) if axis != stored.scale_axis)
    return np.asarray(np.abs(weight).max(axis=axes, keepdims=True) / np.float32(stored.levels))


def _raised_from_zero(stored: StoredWeight, weight: np.ndarray) -> np.ndarray:
    """Which weights would have rounded to zero, and became the least number of the same sign instead."""
    if stored.storage == "fp16":
        is_tiny = np.maximum(np.abs(weight), np.abs(stored.array)) <= LEAST_FP16
        return np.asarray(is_tiny & (stored.array * weight >= 0))
    step = _int8_step(stored, weight)
    is_small = np.abs(weight) <= step * np.float32(0.5 + INT8_SLACK)
    is_one_step = np.abs(stored.array) <= step * np.float32(1 + INT8_SLACK)
    return np.asarray(is_small & is_one_step & (np.sign(stored.array) == np.sign(weight)))


def _is_clipped(stored: StoredWeight, weight: np.ndarray) -> np.ndarray:
    """Which weights were cut to the largest number that the file holds, with their sign."""
    axes = tuple(axis for axis in range(weight.ndim) if axis != stored.scale_axis)
    limit = np.abs(stored.array).max(axis=axes, keepdims=True)
    is_limit = np.abs(stored.array) >= limit * np.float32(1 - INT8_SLACK)
    is_smaller = np.abs(stored.array) < np.abs(weight)
    return np.asarray(is_limit & is_smaller & (np.sign(stored.array) == np.sign(weight)))


def _read_stored_weights(target: Target, folder: Path) -> Iterator[StoredWeight]:
    try:
        yield from target.stored_weights(folder)
    except ModelError as error:  # the checkpoint is sound: the export is at fault
        raise GateError(f"the exported file cannot be read back: {error.message}") from None


def _find_unread(target: Target, folder: Path) -> set[str]:
    """Find the parameters whose constants no output depends on."""
    file = folder / MODEL_FILE
    if target.opened_by != "onnxruntime" or not file.is_file():
        return set()
    return find_unread_parameters(onnx.load(file, load_external_data=False))


def _check_format(stored: StoredWeight, formats: StorageFormats, *, prunable: bool) -> None:
    """Raise GateError where a parameter is stored more coarsely than the target says."""
    coarsest = formats.matrices
    if not prunable:
        coarsest = max(formats, key=FORMATS.index)
    if stored.storage not in FORMATS or FORMATS.index(stored.storage) > FORMATS.index(coarsest):
        raise GateError(f"{stored.name}: the exported file stores it as {stored.storage}; {coarsest} was asked for")


def _require_unused(missing: list[str], reference: Reference) -> None:
    """Raise GateError unless every parameter that the file lacks is zero, or no logit depends on it."""
    nonzero = [name for name in missing if reference.model.get_parameter(name).detach().any()]
    if not nonzero:
        return
    model = reference.load_model(eager=True)  # it is changed below
    _, batch = reference.batches[0]
    forward = torch_forward(model, "cpu")
    before = forward(batch)
    generator = torch.Generator().manual_seed(0)
    for name in nonzero:
        weight = model.get_parameter(name).data
        # Noise: a layer norm would take one number that is added to all of them away again.
        weight.add_(PROBE * torch.randn(weight.shape, generator=generator))
    if not np.array_equal(before, forward(batch)):
        raise GateError(
            f"{nonzero[0]}: the exported file does not store it, or computes with something else ({len(nonzero)} such "
            "weights)"
        )
