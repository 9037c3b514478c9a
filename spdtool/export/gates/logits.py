"""The gate on logits: a file computes what its checkpoint computes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from spdtool.data.tokens import Batch
from spdtool.errors import GateError, ModelError, SpdError, first_line
from spdtool.export import onnx_session
from spdtool.export.gates.batches import is_right_padded
from spdtool.export.gates.reference import Reference
from spdtool.export.target import MODEL_FILE, Target
from spdtool.models.load import fill_weights
from spdtool.models.predict import Forward, onnx_forward, torch_forward
from spdtool.tasks.head import read_head

# Scalars of the graph, such as the root in a GELU, are rounded too. The model cannot be filled with
# them, because they are no weights: the float32 form of a file differs a little more from it.
ROUNDED_SCALARS_FACTOR = 10
UNFUSED_BATCHES = 2  # on which a file is computed without fusions, too: that is slower


class LogitDifference(NamedTuple):
    """Largest difference of a logit between two forwards, and the batch that shows it."""

    largest: float
    batch: str


class LogitDeviation(NamedTuple):
    """Change of logits by rounding: root mean square as a share of the logits' own, and the largest."""

    relative: float
    largest: float


class LogitFigures(NamedTuple):
    """Figures of the gate, named as in `ExportedModel`; None where the target does not round."""

    largest_difference: float
    largest_difference_at: str
    largest_change: float | None = None
    deviation: float | None = None


def check_logits(target: Target, reference: Reference, folder: Path, providers: list[str]) -> LogitFigures:
    """Compare the files' logits with the checkpoint's on each provider.

    Raises:
        GateError: a stored weight does not fit the model, a logit is not finite, or logits differ
            by too much.
    """
    batches = choose_batches(target, reference, folder)
    if target.rounds_weights:
        return _check_rounded_logits(target, reference, folder, providers, batches)
    tolerance = reference.recipe.export.tolerance
    differences = []
    for provider in providers:
        # First, because what a target finds in its own files says more than a difference of logits.
        target.verify(folder, reference.checkpoint, batches, provider)
        session = target.session(folder, provider)
        differences.append(compare_logits(reference.forward(provider), session, batches, tolerance))
    check_unfused_logits(target, reference, folder, batches[:UNFUSED_BATCHES])
    return LogitFigures(*max(differences))


def check_unfused_logits(
    target: Target, reference: Reference, folder: Path, batches: Iterable[tuple[str, Batch]]
) -> None:
    """Compare the logits of a file of onnxruntime as it is written: what is fused may pass over attributes.

    Other runtimes read these, for example the axis of a normalization.

    Raises:
        GateError: the logits differ where nothing is fused.
    """
    if target.opened_by != "onnxruntime" or not (folder / MODEL_FILE).is_file():
        return
    session = onnx_session.open_session(folder / MODEL_FILE, libraries=target.libraries(folder), fused=False)
    try:
        compare_logits(
            reference.forward("cpu"),
            onnx_forward(session, read_head(folder)),
            batches,
            reference.recipe.export.tolerance,
        )
    except GateError as error:
        raise GateError(f"without fusions of onnxruntime, as other runtimes read it: {error.message}") from None


def choose_batches(target: Target, reference: Reference, folder: Path) -> list[tuple[str, Batch]]:
    """Choose the batches that the files must compute: all, or those that are padded on the right.

    Raises:
        GateError: the tokenizer pads on the left, and the files compute right padding only.
    """
    if target.takes_left_padding(folder):
        return reference.batches
    if reference.tokenizer.padding_side == "left":
        raise GateError(
            "this tokenizer pads on the left, and the file takes row lengths: it computes right padding only",
            "use another target, such as onnx-fp16, or set padding_side=right in tokenizer_config.json",
        )
    return [(description, batch) for description, batch in reference.batches if is_right_padded(batch)]


def compare_logits(
    expected: Forward, exported: Forward, batches: Iterable[tuple[str, Batch]], tolerance: float
) -> LogitDifference:
    """Return the largest difference of a logit.

    Raises:
        GateError: it is above `tolerance`, or a logit is not finite; names the batch.
    """
    largest, largest_at = 0.0, ""
    for description, batch in batches:
        expected_logits, logits = expected(batch), compute_logits(exported, batch, description)
        _require_finite(expected_logits, "checkpoint", description)
        _require_finite(logits, "exported file", description)
        if logits.shape != expected_logits.shape:  # numpy might stretch one to fit the other
            raise GateError(
                f"the exported file gives an output of shape {logits.shape} on {description}; the checkpoint's is "
                f"{expected_logits.shape}"
            )
        difference = float(np.abs(expected_logits - logits).max())
        if difference > tolerance:
            raise GateError(
                f"checkpoint and exported file differ by {difference:.2g} on {description}; "
                f"the tolerance is {tolerance:g}",
                "export.tolerance sets it; a difference that is much larger is a fault of the export",
            )
        if difference >= largest:
            largest, largest_at = difference, description
    return LogitDifference(largest, largest_at)


def compute_logits(exported: Forward, batch: Batch, description: str) -> np.ndarray:
    """Compute a batch with exported files; raises GateError where they cannot."""
    try:
        return exported(batch)
    except SpdError:
        raise
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise GateError(f"the exported file cannot compute {description}: {first_line(error)}") from error


def measure_deviation(expected: Forward, exported: Forward, batches: Iterable[tuple[str, Batch]]) -> LogitDeviation:
    """Measure how far rounded arithmetic moves the logits, over all batches.

    Raises:
        GateError: a logit is not finite; names the batch.
    """
    squared_change, squared_logits, largest = 0.0, 0.0, 0.0
    for description, batch in batches:
        # In float64, so that sums over many batches lose nothing.
        expected_logits = expected(batch).astype(np.float64)
        logits = compute_logits(exported, batch, description).astype(np.float64)
        _require_finite(logits, "exported file", description)
        change = logits - expected_logits
        squared_change += float(np.square(change).sum())
        squared_logits += float(np.square(expected_logits).sum())
        largest = max(largest, float(np.abs(change).max()))
    if squared_logits == 0:
        return LogitDeviation(0.0, largest)
    return LogitDeviation(float(np.sqrt(squared_change / squared_logits)), largest)


def _check_rounded_logits(
    target: Target, reference: Reference, folder: Path, providers: list[str], batches: list[tuple[str, Batch]]
) -> LogitFigures:
    """Compare with the checkpoint after it was filled with the stored weights; measure what rounding moves."""
    section = reference.recipe.export
    tolerance, largest_deviation = section.tolerance, float("inf")
    float32_form = None
    if target.rounds_arithmetic:
        float32_form = target.float32_form(folder)
        tolerance, largest_deviation = tolerance * ROUNDED_SCALARS_FACTOR, section.rounded_tolerance
    rounded_model = _fill_stored_weights(reference.load_model(eager=True), target, folder)
    differences = []
    for provider in providers:
        target.verify(folder, reference.checkpoint, batches, provider)
        session = target.session(folder, provider)
        rounded_model.to(provider)  # type: ignore[arg-type]
        expected = torch_forward(rounded_model, provider)
        differences.append(compare_logits(expected, float32_form or session, batches, tolerance))
        # Against the checkpoint as it is: this is what rounding costs, weights and arithmetic together.
        judged = _deviation_batches(target, reference, batches)
        deviation = measure_deviation(reference.forward(provider), session, judged)
        if deviation.relative > largest_deviation:
            raise GateError(
                f"fp16 or int8 arithmetic moves the logits by {deviation.relative:.0%} of their size; "
                f"the tolerance is {largest_deviation:.0%}",
                "export.rounded_tolerance sets it; the model has activations or weights far from all others",
            )
    return LogitFigures(*max(differences), deviation.largest, deviation.relative)


def _deviation_batches(
    target: Target, reference: Reference, batches: list[tuple[str, Batch]]
) -> list[tuple[str, Batch]]:
    """Choose the batches on which rounded arithmetic is judged.

    The ranges of a calibrated target say nothing of random tokens, nor of padding on the other
    side: it is judged on real rows, where there are any.
    """
    if not target.calibrates or not reference.dev_batches:
        return batches
    return [reference.dev_batches[reference.dev.splits["dev"].pad_left]]


def _fill_stored_weights(model: PreTrainedModel, target: Target, folder: Path) -> PreTrainedModel:
    try:
        fill_weights(model, ((name, array) for name, array, *_ in target.stored_weights(folder)))
    except ModelError as error:  # the checkpoint is sound: the export is at fault
        raise GateError(f"the exported file holds other weights than its checkpoint: {error.message}") from None
    return model


def _require_finite(logits: np.ndarray, source: str, description: str) -> None:
    if not np.isfinite(logits).all():
        raise GateError(f"the {source} gives logits that are not finite on {description}")
