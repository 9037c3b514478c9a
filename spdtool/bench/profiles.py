"""Tables of layer times as files: what they are of, and whether they fit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spdtool.bench.engines import Shape
from spdtool.errors import DeviceError, RecipeError, first_line
from spdtool.export import onnx_session
from spdtool.run.fingerprint import describe_processor
from spdtool.run.records import ShapeProfile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
# Runtimes that can be timed here, and the kind of engine that does it.
TIMED_RUNTIMES: dict[str, Literal["onnxruntime", "openvino"]] = {ONNXRUNTIME: "onnxruntime", OPENVINO: "openvino"}


@dataclass(frozen=True)
class TimedInput:
    """What every encoder of a table is timed with.

    Attributes:
        batch, length: rows and tokens, without padding.
        threads: of one operator; 0: all cores.
        runtime: one of `TIMED_RUNTIMES`.
    """

    batch: int
    length: int
    threads: int = 1
    runtime: str = ONNXRUNTIME

    @property
    def shape(self) -> Shape:
        """Batch and length."""
        return Shape(self.batch, self.length)


def require_runtime(name: str) -> None:
    """Refuse a runtime that cannot be timed here.

    Raises:
        DeviceError: it is not installed, or runs elsewhere.
    """
    if name not in TIMED_RUNTIMES:
        raise DeviceError(
            f"{name} is not timed here: layers are timed in {' or '.join(TIMED_RUNTIMES)}",
            "give a file of its times, in the form of `spdtool bench --profile`: --profile FILE",
        )
    if name == OPENVINO and importlib.util.find_spec(OPENVINO) is None:
        raise DeviceError("openvino is not installed", "pip install openvino")
    if name == ONNXRUNTIME:
        onnx_session.require_onnxruntime()


def runtime_version(name: str) -> str:
    """Version of a runtime that is installed here."""
    if name == OPENVINO:
        return metadata.version(OPENVINO)
    return str(onnx_session.require_onnxruntime().__version__)


def layer_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of heads and neurons of a dense layer."""
    from spdtool.models.structures import find_structures

    # Layers of a dense encoder are alike.
    first = find_structures(model)[0]
    return first.heads.count, first.neurons.count


def expected_fields(model: PreTrainedModel, timed: TimedInput) -> dict[str, str | int]:
    """Return what a profile must have to fit a model and an input; of this machine, where its runtime is here.

    Args:
        model: the dense one, with or without weights.
    """
    heads, neurons = layer_sizes(model)
    fields: dict[str, str | int] = {
        "runtime": timed.runtime,
        "threads": timed.threads,
        "batch": timed.batch,
        "length": timed.length,
        "family": model.config.model_type,
        "width": model.config.hidden_size,
        "heads": heads,
        "neurons": neurons,
    }
    if timed.runtime in TIMED_RUNTIMES:
        require_runtime(timed.runtime)
        # Another processor or version has other kernels, and other times.
        fields |= {"version": runtime_version(timed.runtime), "processor": describe_processor()}
    return fields


def read_profile(file: Path) -> ShapeProfile:
    """Read the file that `spdtool bench --profile` wrote.

    Raises:
        RecipeError: it is not there, or holds no profile.
    """
    hint = "write one with `spdtool bench --profile FILE --model FOLDER`"
    try:
        return ShapeProfile.model_validate(json.loads(file.read_text("utf-8")))
    except OSError as error:
        raise RecipeError(f"the profile {file} cannot be read: {error.strerror}", hint) from None
    except ValueError as error:  # json's, pydantic's and UTF-8's
        raise RecipeError(f"{file} is no profile: {first_line(error)}", hint) from None


def check_profile(profile: ShapeProfile, expected: Mapping[str, str | int], source: str) -> None:
    """Refuse a profile of another runtime, machine, model or input than `expected`, which has fields of a profile.

    Raises:
        RecipeError: names every field that differs.
    """
    recorded = profile.model_dump()
    # Each at once: mending them one by one would take a measurement each.
    different = [name for name, value in expected.items() if recorded[name] != value]
    if different:
        lines = "; ".join(f"{name} {recorded[name]} there, {expected[name]} here" for name in different)
        raise RecipeError(
            f"the profile {source} does not fit: {lines}",
            "measure one here with `spdtool bench --profile FILE --model FOLDER`",
        )
