"""Static int8 of the dense teacher by OpenVINO and NNCF: the strongest rival of a sparse student on many CPUs.

Both packages are optional. The ranges of activations come from training rows, as those of
`onnx-int8-static`; the dev score is measured, and held to the same budget. What is not int8 has the
precision that OpenVINO prefers, bfloat16 where the CPU multiplies it, in the score as in the time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.bench.ratios import ModelFile
from spdtool.data.batches import evaluation_batches
from spdtool.errors import ModelError, first_line

if TYPE_CHECKING:
    from spdtool.data.tokens import Batch, Encoded
    from spdtool.models.predict import Forward
    from spdtool.recipe.fields import Recipe

PACKAGES = ("openvino", "nncf")


def is_installed() -> bool:
    """Whether both packages are."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def quantize_static_int8(model: Path, checkpoint: Path, file: Path, recipe: Recipe) -> tuple[ModelFile, bool]:
    """Write an ONNX file of the teacher as OpenVINO's int8, and measure its dev score.

    Returns:
        The written files, and whether the score is within the budget of int8.

    Raises:
        SpdError: the rows cannot be read, or NNCF cannot quantize the graph.
    """
    from spdtool.export.gates.reference import prepare_dev_sets
    from spdtool.export.gates.score import compare_predictions, metric_over_budget
    from spdtool.export.target import StorageFormats
    from spdtool.models.load import load_model
    from spdtool.models.predict import torch_forward

    dev = prepare_dev_sets(checkpoint, recipe)
    assert dev.task is not None, "a recipe names a task"
    rows = dev.calibration_rows
    if rows is None:
        raise ModelError("OpenVINO's int8 needs training rows of the task")
    _quantize_with_nncf(model, rows, file)
    expected = dev.predict(torch_forward(load_model(checkpoint)))
    logits = dev.predict(open_forward(file))
    comparison = compare_predictions(dev.task, expected, logits, dev.splits, recipe.export.tolerance)
    budget = recipe.export.allowed_change(rounds=True, storage=StorageFormats("int8", "int8"))
    size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
    score, before = comparison.file_scores.get("score"), comparison.checkpoint_scores.get("score")
    model_file = ModelFile(size, score=score, checkpoint_score=before)
    return model_file, metric_over_budget(comparison, budget) is None


def open_forward(file: Path) -> Forward:
    """Open OpenVINO's model on the CPU as a function from a batch to logits."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU")
    names = [value.get_any_name() for value in compiled.inputs]

    def forward(batch: Batch) -> np.ndarray:
        return np.array(compiled({name: batch[name] for name in names})[0], np.float32)

    return forward


def _quantize_with_nncf(model: Path, rows: Encoded, file: Path) -> None:
    import nncf
    import openvino

    graph = openvino.Core().read_model(str(model))
    names = [value.get_any_name() for value in graph.inputs]
    batches: list[dict[str, Any]] = []
    for indices in evaluation_batches(rows, 1):  # one row each: ranges must not see padding
        batch = rows.collate(indices)
        batches.append({name: batch[name] for name in names})
    with _quiet():
        try:
            quantized = nncf.quantize(
                graph, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
            )
            openvino.save_model(quantized, str(file), compress_to_fp16=False)
        except Exception as error:  # its errors share no base of their own
            raise ModelError(f"NNCF cannot quantize {model.name}: {first_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and notes from the user's terminal."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
