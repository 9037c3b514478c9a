"""Ratios between timings, with their noise.

On a CPU ratios refer to the dense teacher in onnxruntime, in float32. It is timed twice, with fused
graph nodes and without, because neither is always faster: at each shape and with each number of
threads the faster of the two is the 1x. A further ratio names the fastest dense rival, in any
runtime and precision whose dev score passes.

On a GPU that rival is the 1x: half precision and CUDA graphs are what people run there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spdtool.bench.engines import Shape
from spdtool.bench.latency import MIN_ROUNDS, Timing
from spdtool.run.records import (
    BenchEnvironment,
    ExportedModel,
    LatencyRecord,
    LedgerEntry,
    Ratio,
    describe_prediction_change,
)

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95
NOISY = 1.1  # an interval that holds 1 and reaches further than this says nothing about zeros


@dataclass(frozen=True)
class ModelFile:
    """What the report needs to know of an engine's file.

    Attributes:
        bytes: on disk.
        size: number of weights in the prunable matrices; sparsity: share of them that is zero.
        score, checkpoint_score: dev score of the file and of the checkpoint that it was made from.
        rounding: storage of pruned matrices and of embeddings, where they are rounded.
        prediction_change: how predictions differ from the checkpoint's, in words.
    """

    bytes: int
    size: int | None = None
    sparsity: float | None = None
    score: float | None = None
    checkpoint_score: float | None = None
    rounding: tuple[str, str] | None = None
    prediction_change: str = ""

    @classmethod
    def of_export(cls, model: ExportedModel) -> ModelFile:
        """The file of an exported model."""
        rounding = None
        if model.values is not None and model.embeddings is not None:
            rounding = (model.values, model.embeddings)
        return cls(
            bytes=model.bytes,
            size=model.size,
            sparsity=model.sparsity,
            score=model.score,
            checkpoint_score=(model.checkpoint_dev or {}).get("score"),
            rounding=rounding,
            prediction_change=describe_prediction_change(
                model.flipped, model.rows, model.mean_change, model.rank_correlation
            ),
        )


@dataclass(frozen=True)
class BenchData:
    """All figures of a bench, from which report and stage.json are written.

    Attributes:
        timings: see `latency.time_engines`; the teacher comes first.
        files: by name of the engine, where it has a file of its own.
        sparse: engines that run a sparse form of the student.
        pairs: engine of the student to engine of the teacher in the same form (fused, fp16, int8).
        dense_forms: engine of a sparse form to the engines of the dense teacher in that form: with
            weights stored as the form does, then with float32 weights where that differs.
        shape_forms: engine of a sparse form to the engine of the student's shape in that form, without zeros inside.
        zeros_inside: share of zeros inside of what remains of a smaller student.
        ledger: every pruned matrix on its own.
        dense: engines of the dense teacher, in any runtime and precision, whose dev score is that
            of the checkpoint or passes the budget of an export.
        students: engines of the student in the form of such a row; on a GPU the fastest of them is the headline.
        on_gpu: whether the engines ran on a GPU.
        leaves_out: whether the plain file of the student leaves out its removed heads and neurons.
        notes: what was not done as asked, or must be said beside the figures.
    """

    timings: Sequence[Timing]
    files: Mapping[str, ModelFile]
    environment: BenchEnvironment | None = None
    sparse: Sequence[str] = ()
    pairs: Mapping[str, str] = field(default_factory=dict)
    dense_forms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shape_forms: Mapping[str, str] = field(default_factory=dict)
    zeros_inside: float = 0.0
    ledger: Sequence[LedgerEntry] = ()
    notes: Sequence[str] = ()
    leaves_out: bool = False
    dense: Sequence[str] = ()
    students: Sequence[str] = ()
    on_gpu: bool = False

    @property
    def threads(self) -> list[int]:
        """Numbers of threads that the engines were timed with."""
        return list(dict.fromkeys(timing.engine.threads for timing in self.timings))

    @property
    def engines(self) -> list[str]:
        """Names of the engines, in the order of the table."""
        return list(dict.fromkeys(timing.engine.name for timing in self.timings))

    @property
    def grid(self) -> list[Shape]:
        """Shapes without padding, over which means are taken."""
        return [shape for shape in self.timings[0].rounds if not shape.real]

    @property
    def padded(self) -> list[Shape]:
        """Shapes with padding."""
        return [shape for shape in self.timings[0].rounds if shape.real]

    @property
    def best(self) -> str:
        """Engine of the student's best form: its first sparse one, or the plain file; on a GPU the fastest."""
        if self.on_gpu:
            rows = [name for name in ("student", *self.students) if name in self.engines]
            return min(rows, key=lambda name: self.mean_ms(self.timing(name, self.threads[0])))
        return self.sparse[0] if self.sparse else "student"

    @property
    def resized(self) -> bool:
        """Whether student and teacher have matrices of different sizes, so that more than zeros differs."""
        return self.leaves_out or self.files["teacher"].size != self.files["student"].size

    @property
    def cause(self) -> str:
        """What makes the student faster than the dense teacher in the same form of file, in words."""
        if self.leaves_out:
            return "smaller shape and its zeros" if self.zeros_inside else "smaller shape"
        if not self.resized:
            return "zeros"
        return "other model and its zeros" if self.files["student"].sparsity else "smaller model"

    def timing(self, name: str, threads: int) -> Timing:
        """The timing of an engine with a number of threads."""
        for timing in self.timings:
            if (timing.engine.name, timing.engine.threads) == (name, threads):
                return timing
        raise KeyError((name, threads))

    def mean_ms(self, timing: Timing) -> float:
        """Geometric mean over the grid of the median milliseconds."""
        # Geometric: a mean of milliseconds would be that of the largest shape alone.
        return math.exp(sum(math.log(median_ms(timing.rounds[shape])) for shape in self.grid) / len(self.grid))

    def fastest_rival(self, threads: int, shape: Shape) -> Timing | None:
        """The fastest dense row whose score passes, at a shape; None without any."""
        rows = [self.timing(name, threads) for name in self.dense if name in self.engines]
        return min(rows, key=lambda timing: median_ms(timing.rounds[shape])) if rows else None

    def speed_over_rivals(self, timing: Timing) -> Ratio | None:
        """How many times faster an engine is than the fastest dense row at each shape of the grid."""
        rivals = [self.fastest_rival(timing.engine.threads, shape) for shape in self.grid]
        # All or none: a mean over some shapes compares with nothing.
        timed_rivals = [rival for rival in rivals if rival is not None]
        return paired_ratio(timed_rivals, timing, self.grid) if len(timed_rivals) == len(rivals) else None

    def fastest_dense(self, threads: int, shape: Shape) -> Timing:
        """The dense teacher's faster timing at a shape: the 1x."""
        baselines = []
        for timing in self.timings:
            if timing.engine.baseline and timing.engine.threads == threads:
                baselines.append(timing)
        return fastest_at(shape, baselines)

    def speedup(self, timing: Timing, shapes: Sequence[Shape]) -> Ratio:
        """How many times faster than the dense teacher."""
        # The faster form may differ from shape to shape.
        dense = [self.fastest_dense(timing.engine.threads, shape) for shape in shapes]
        return paired_ratio(dense, timing, shapes)

    def speed_of_student(self, timing: Timing, shapes: Sequence[Shape]) -> Ratio:
        """How much faster an engine of the student is than the teacher.

        A sparse form is compared with the fastest dense teacher, and more than zeros differs: see
        `factors`. A plain file is compared with the teacher's plain file in the same form, fused or
        not; on a GPU, with the fastest dense teacher.
        """
        if timing.engine.name in self.sparse or self.on_gpu:
            return self.speedup(timing, shapes)
        teacher = self.timing(self.timings[0].engine.name, timing.engine.threads)
        return paired_ratio([teacher] * len(shapes), timing, shapes)


def fastest_at(shape: Shape, timings: Iterable[Timing]) -> Timing:
    """Return the timing with the least median at a shape."""
    return min(timings, key=lambda timing: float(np.median(timing.rounds[shape])))


def paired_ratio(slow: Sequence[Timing], fast: Timing, shapes: Sequence[Shape]) -> Ratio:
    """Speed of `fast` relative to `slow[i]` at `shapes[i]`.

    For every round the geometric mean over shapes; then the median over rounds.
    """
    log_ratios = []
    for timing, shape in zip(slow, shapes, strict=True):
        # The mean of logarithms: twice as fast at one shape and half as fast at another is 1x.
        log_ratios.append(np.log(np.asarray(timing.rounds[shape]) / np.asarray(fast.rounds[shape])))
    return median_with_interval(np.exp(np.mean(log_ratios, axis=0)))


def median_with_interval(values: np.ndarray) -> Ratio:
    """Median of paired ratios and its 95 % interval, from order statistics: valid for any distribution.

    Fewer than six values have no such interval; theirs is the whole range.
    """
    ordered = np.sort(values)
    outside = values_outside_interval(len(ordered))
    return Ratio(
        median=float(np.median(ordered)), low=float(ordered[outside]), high=float(ordered[len(ordered) - 1 - outside])
    )


def values_outside_interval(count: int) -> int:
    """How many of the smallest (and of the largest) of `count` sorted values lie outside the median's interval.

    The number of values below the true median is binomial with probability one half.
    """
    tail_probability, outside = 0.0, 0
    for below in range(count // 2):
        tail_probability += math.comb(count, below) / 2**count
        # Twice, since the interval leaves out as many values at either end.
        if 2 * tail_probability > 1 - CONFIDENCE:
            break
        outside = below
    return outside


def ratio_caveat(speedup: Ratio, rounds: int) -> str | None:
    """Caveat to print beside a ratio, or None."""
    if rounds < MIN_ROUNDS:
        count = "1 round is" if rounds == 1 else f"{rounds} rounds are"
        return f"{count} too few to tell it from noise"
    if speedup.low <= 1 <= speedup.high and max(1 / speedup.low, speedup.high) > NOISY:
        return "the rounds scatter too much to tell"
    return None


def median_ms(milliseconds: Sequence[float]) -> float:
    """Median of the rounds."""
    return float(np.percentile(milliseconds, 50))


def latency_records(bench: BenchData) -> list[LatencyRecord]:
    """One record for each number of threads, shape and engine.

    With few rounds p99 is little more than the slowest one.
    """
    records = []
    for threads in bench.threads:
        for shape in bench.timings[0].rounds:
            for name in bench.engines:
                records.append(latency_record(bench, bench.timing(name, threads), shape))
    return records


def latency_record(bench: BenchData, timing: Timing, shape: Shape) -> LatencyRecord:
    """Percentiles, throughput and ratio of an engine at one shape."""
    milliseconds = np.asarray(timing.rounds[shape])
    threads = timing.engine.threads
    device = timing.device.get(shape)
    percentiles = {f"p{rank}": float(np.percentile(milliseconds, rank)) for rank in PERCENTILES}
    return LatencyRecord(
        engine=timing.engine.name,
        provider=timing.provider,
        threads=threads,
        shape=str(shape),
        batch=shape.batch,
        length=shape.length,
        real=list(shape.real),
        **percentiles,
        # Of the sum of the rounds, so that slow rounds count as they do for a server.
        rows_per_second=1000 * shape.batch * len(milliseconds) / float(milliseconds.sum()),
        min=timing.least[shape],
        rounds=len(milliseconds),
        device_p50=None if device is None else median_ms(device),
        ratio=bench.speedup(timing, [shape]),
        dense=bench.fastest_dense(threads, shape).engine.name,
    )
