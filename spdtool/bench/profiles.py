"""Tables of layer times as files: what they are of, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool.bench.engines import Shape
from spdtool.bench.runtimes import ONNXRUNTIME, TIMED_RUNTIMES, WEB, require_runtime, runtime_version
from spdtool.errors import DeviceError, RecipeError, first_line
from spdtool.run.fingerprint import describe_processor
from spdtool.run.records import ShapeProfile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def layer_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of heads and neurons of a dense layer."""
    from spdtool.models.structures import find_structures

    # Layers of a dense encoder are alike.
    first = find_structures(model)[0]
    return first.heads.count, first.neurons.count


def expected_fields(model: PreTrainedModel, timed: TimedInput, *, given: bool = False) -> dict[str, str | int]:
    """Return what a profile must have to fit a model and an input; of this machine, where its runtime is here.

    Args:
        model: the dense one, with or without weights.
        given: the profile is a file of the user. One of a browser or a GPU may be of any machine.

    Raises:
        DeviceError: the runtime is timed here, and is not installed.
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
    if timed.runtime in TIMED_RUNTIMES and not (given and timed.runtime == WEB):
        require_runtime(timed.runtime)
        # Another processor or version has other kernels, and other times.
        fields |= {"version": runtime_version(timed.runtime), "processor": describe_processor()}
    return fields


def is_of_this_machine(profile: ShapeProfile) -> bool:
    """Whether a profile has the times of this processor, in the version of the runtime that is installed here."""
    if profile.runtime not in TIMED_RUNTIMES or profile.processor != describe_processor():
        return False
    try:
        return profile.version == runtime_version(profile.runtime)
    except DeviceError:
        return False


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
