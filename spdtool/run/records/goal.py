"""What a goal asks of a student: the costs of every shape, and the shape that was chosen."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from spdtool.run.fingerprint import hash_json
from spdtool.run.records.base import Cell, Record
from spdtool.run.records.bench import Ratio


class LayerCosts(Record):
    """What one encoder layer costs at every shape: milliseconds, or bytes.

    Attributes:
        heads: of the attention, by number of remaining heads from 0.
        neurons: of the feed-forward, by its width; other widths are interpolated.
        outside: of all that is outside of the layers.
    """

    unit: str
    heads: list[float]
    neurons: dict[int, float]
    outside: float

    @model_validator(mode="after")
    def _check_costs(self) -> LayerCosts:
        """Refuse costs that no measurement gives, such as those of a damaged file."""
        if len(self.heads) < 2 or len(self.neurons) < 2 or 0 not in self.neurons:
            raise ValueError("the costs of a layer begin with those of no head and no neuron, and end with all of them")
        if not all(math.isfinite(cost) and cost >= 0 for cost in (*self.heads, *self.neurons.values(), self.outside)):
            raise ValueError("a cost is negative, or no number")
        if self.of_dense(1) <= 0:
            raise ValueError("a dense layer costs nothing")
        return self

    def of_width(self, width: int) -> float:
        """Cost of a feed-forward of any width between the least and the greatest of the table."""
        if width in self.neurons:
            return self.neurons[width]
        narrower = max(timed for timed in self.neurons if timed < width)
        wider = min(timed for timed in self.neurons if timed > width)
        share = (width - narrower) / (wider - narrower)
        return (1 - share) * self.neurons[narrower] + share * self.neurons[wider]

    def of_dense(self, layers: int) -> float:
        """Cost of the encoder from which nothing is removed."""
        return self.outside + layers * (self.heads[-1] + self.neurons[max(self.neurons)])


class ShapeProfile(Record):
    """Contents of a profile: the time of an encoder layer at every shape, as one runtime took on one machine.

    Attributes:
        runtime: onnxruntime, openvino, cuda or web. version: of the runtime.
        processor: that ran it. threads, batch, length: at which it was timed.
        family: model type. width: of the hidden states. heads: of a layer. neurons: width of its feed-forward.
        rounds: interleaved rounds, of which the median counts.
        costs: in milliseconds.
    """

    format: Literal[1] = 1
    spdtool: str
    runtime: str
    version: str
    processor: str
    threads: int
    batch: int
    length: int
    family: str
    width: int
    heads: int
    neurons: int
    rounds: int
    costs: LayerCosts

    @model_validator(mode="after")
    def _check_sizes(self) -> ShapeProfile:
        """Refuse a table that lacks the layer it is of."""
        if len(self.costs.heads) != self.heads + 1 or max(self.costs.neurons) != self.neurons:
            raise ValueError(f"the times are not of a layer with {self.heads} heads and {self.neurons} neurons")
        return self

    @property
    def digest(self) -> str:
        """Sha256 of the contents."""
        return hash_json(self.model_dump(mode="json"))

    @property
    def machine(self) -> str:
        """Runtime, its version and the processor."""
        return f"{self.runtime} {self.version} on {self.processor}"

    def table(self) -> tuple[list[str], list[list[Cell]]]:
        """Columns and rows of the times, for the terminal."""
        rows: list[list[Cell]] = [[f"{count} heads", round(ms, 4)] for count, ms in enumerate(self.costs.heads)]
        rows += [[f"{width} neurons", round(ms, 4)] for width, ms in self.costs.neurons.items()]
        return ["what a layer keeps", "ms"], [*rows, ["outside of the layers", round(self.costs.outside, 4)]]


class FamilyMember(Record):
    """A student that is saved on the way to the shape of a goal.

    Attributes:
        speedup: that is asked for. expected: by the table, corrected by the timing of the chosen shape.
        sparsity: share of the encoder's weights that is removed then; it names the folder of the student.
    """

    speedup: float
    sparsity: float
    expected: float

    def describe(self) -> str:
        """Say where the student will be, such as `2x: prune/students/0.3125, about 2.03x`."""
        return f"{self.speedup:g}x: prune/students/{self.sparsity:g}, about {self.expected:.2f}x"


class ShapeChoice(Record):
    """Contents of goal.json: the shape that a goal asks for, and what it was chosen by.

    Attributes:
        key: digest of the goal's fields for which it was chosen.
        goal: in words.
        shape: `(heads, neurons)` of each layer, first to last; dense: of a layer from which nothing is removed.
        table: digest of the times, or where no speed-up was asked for of the bytes, of a layer at every shape.
        profile: the times; None: no speed-up was asked for.
        expected: how many times faster by that table. trial: the same, timed with a random encoder
            of the shape.
        bytes: of the student's portable file, as counted.
        family: students on the way, the slowest first.
    """

    key: str
    goal: str
    shape: list[tuple[int, int]]
    dense: tuple[int, int]
    table: str
    profile: ShapeProfile | None = None
    expected: float | None = None
    trial: Ratio | None = None
    bytes: int
    family: tuple[FamilyMember, ...] = ()

    def describe(self) -> str:
        """Say what remains, such as `37 of 72 heads and 3,104 of 9,216 neurons remain`."""
        layers = len(self.shape)
        heads, neurons = (sum(sizes) for sizes in zip(*self.shape, strict=True))
        return f"{heads} of {layers * self.dense[0]} heads and {neurons:,} of {layers * self.dense[1]:,} neurons remain"
