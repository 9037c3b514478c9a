"""What the timings say: percentiles, ratios with their noise, and a verdict in plain language.

Nothing in the verdict is a set phrase about a runtime: each sentence is chosen by the figures that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spdtool.bench.latency import Shape, Timing

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95
FEWEST_ROUNDS = 6  # that give such an interval
SAME_SPEED = 0.05  # a ratio this close to 1 is not worth calling faster, even where it is not noise
NOISY = 1.1  # an interval that reaches from 1 beyond this says nothing about zeros
SAME_SIZE = 0.01
MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the dense teacher: the median over paired rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"


def summary(milliseconds: Sequence[float], batch: int) -> dict[str, float]:
    """Percentiles in milliseconds, and rows per second; of few rounds, p99 is little more than the slowest one."""
    values = np.asarray(milliseconds)
    result = {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}
    return result | {"rows_per_second": 1000 * batch * len(values) / float(values.sum())}


def ratio(dense: Timing, other: Timing, shapes: Sequence[Shape]) -> Ratio:
    """Speed of `other` against `dense`: round by round, the geometric mean over the shapes; then the median.

    The interval holds the median with 95 % confidence whatever the distribution (order statistics); of fewer than six
    rounds it is all that was seen.
    """
    logs = [np.log(np.asarray(dense.rounds[shape]) / np.asarray(other.rounds[shape])) for shape in shapes]
    ratios = np.sort(np.exp(np.mean(logs, axis=0)))
    below = _rank(len(ratios))
    return Ratio(float(np.median(ratios)), float(ratios[below]), float(ratios[-1 - below]))


def details(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One entry for each engine and shape: percentiles, throughput, and the ratio to the first engine."""
    return [
        {"engine": timing.engine.name, "provider": timing.provider, "batch": shape[0], "length": shape[1]}
        | summary(timing.rounds[shape], shape[0])
        | {"ratio": ratio(timings[0], timing, [shape]).__dict__}
        for shape in timings[0].rounds
        for timing in timings
    ]


def overview(timings: Sequence[Timing], exported: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table that a run ends with: score, zeros, bytes on disk, peak MiB, speed, latency.

    The latencies are medians at the first and the last shape, so that the table fits a terminal.
    """
    shapes = list(timings[0].rounds)
    ends = list(dict.fromkeys((shapes[0], shapes[-1])))
    columns = ["engine", "score", "zeros", "bytes", "RAM", "speed"]
    columns += [f"ms {batch}x{length}" for batch, length in ends]
    rows: list[list[Any]] = []
    for timing in timings:
        facts = exported.get(timing.engine.name)
        known = [facts["dev"]["score"], f"{facts['sparsity']:.2%}", facts["bytes"]] if facts else ["-", "-", "-"]
        speed = f"{ratio(timings[0], timing, shapes).median:.2f}x"
        medians = [summary(timing.rounds[shape], 1)["p50"] for shape in ends]
        rows.append([timing.engine.name, *known, f"{timing.peak / MIB:.0f}M", speed, *medians])
    return columns, rows


def verdict(
    speed: Ratio, rounds: int, runs_on: str, teacher: Mapping[str, Any], student: Mapping[str, Any]
) -> list[str]:
    """What the zeros bought, in sentences.

    Args:
        speed: of the student against the dense teacher.
        rounds: paired rounds behind it.
        runs_on: the provider that really ran.
        teacher: `bytes` and `sparsity` of the exported file; student: the same.
    """
    sparsity = student["sparsity"]
    if sparsity <= teacher["sparsity"]:
        return [f"The student has no more zeros than the teacher, and runs at {speed} its speed on {runs_on}."]
    size = teacher["bytes"] / student["bytes"]
    lines = [
        f"Speed: with {sparsity:.1%} zeros, {speed} that of the dense teacher on {runs_on}, "
        f"over {rounds} paired rounds: " + _meaning(speed, rounds, 1 / (1 - sparsity) if sparsity < 1 else math.inf),
        f"File: {size:.2f}x smaller, {student['bytes']:,} of {teacher['bytes']:,} bytes: "
        + ("it stores the zeros like any other number." if size < 1 + SAME_SIZE else "it leaves zeros out."),
    ]
    slow = speed.median < 1 + SAME_SPEED or speed.low <= 1
    return lines + _help(slow=slow, large=size < 1 + SAME_SIZE)


def markdown(title: str, timings: Sequence[Timing], lines: Sequence[str], environment: Mapping[str, Any]) -> str:
    """The report as Markdown: verdict, every percentile, where the nodes ran, and the machine."""
    head = ["engine", "provider", "batch", "length", *(f"p{rank} ms" for rank in PERCENTILES), "rows/s", "speed"]
    rows = [
        [entry["engine"], entry["provider"], entry["batch"], entry["length"]]
        + [f"{entry[f'p{rank}']:.3f}" for rank in PERCENTILES]
        + [f"{entry['rows_per_second']:.1f}", _against(timings[0], entry)]
        for entry in details(timings)
    ]
    ran = [
        [timing.engine.name, _nodes(timing), round(timing.resident / MIB), round(timing.peak / MIB)]
        for timing in timings
    ]
    machine = [[name, _flat(value)] for name, value in environment.items()]
    parts = [f"# {title}", "\n".join(lines), _table(head, rows)]
    parts += [_table(["engine", "graph nodes by provider", "MiB when loaded", "MiB at the peak"], ran)]
    return "\n\n".join([*parts, _table(["measured on", ""], machine)]) + "\n"


def _meaning(speed: Ratio, rounds: int, ideal: float) -> str:
    if rounds < FEWEST_ROUNDS:
        return f"{rounds} rounds are too few to tell it from noise."
    if speed.low <= 1 <= speed.high and max(1 / speed.low, speed.high) > NOISY:
        return "the rounds scatter too much to tell. Repeat it on a machine that does nothing else, with more rounds."
    if speed.low <= 1 <= speed.high:
        return "no difference beyond the noise: it multiplies the zeros like any other number."
    if speed.high < 1:
        return "slower, beyond the noise: nothing is won from the zeros."
    if speed.median < 1 + SAME_SPEED:
        return "beyond the noise, but next to nothing: it multiplies the zeros like any other number."
    return f"faster, beyond the noise (skipping every zero would make the matrix products {ideal:.1f}x as fast)."


def _help(*, slow: bool, large: bool) -> list[str]:
    if not slow and not large:
        return []
    speed = "for speed, a runtime whose kernels skip zeros, or whole heads, neurons or layers taken out"
    size = "for size, storage that leaves zeros out, or fewer bits a weight"
    return ["What would help: " + "; ".join(([speed] if slow else []) + ([size] if large else [])) + "."]


def _rank(count: int) -> int:
    """How many of the smallest, and of the largest, of `count` sorted values lie outside the median's interval."""
    tail, rank = 0.0, 0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank = below
    return rank


def _against(dense: Timing, entry: Mapping[str, Any]) -> str:
    return "1x" if entry["engine"] == dense.engine.name else str(Ratio(**entry["ratio"]))


def _flat(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)


def _nodes(timing: Timing) -> str:
    if timing.nodes is None:
        return timing.provider
    return ", ".join(f"{name} {sum(ops.values())}" for name, ops in timing.nodes.items())


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
