"""Split the speed of a sparse form into what the form gives to any weights, and what only the zeros give.

Beside a sparse form the bench times the dense teacher in the same form: the same operators, and no
zeros. Where the form rounds weights, it times that once more with float32 weights. Then, at each
shape,

    teacher in onnxruntime     dense, float32 form     dense, rounded form     teacher in onnxruntime
    ----------------------  x  -------------------  x  -------------------  =  ----------------------
     dense, float32 form       dense, rounded form         sparse form              sparse form
           fusion                   rounding                  zeros                   the whole

Of a smaller student with zeros inside, the last factor is split again: its shape in the rounded form, with no zeros
inside, tells what the shape gives, and what the zeros add to that.

At a padded shape, fusion is split again: what it is at the same shape without padding, and what
leaving padding out adds to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spdtool.bench.engines import Shape
from spdtool.bench.latency import Timing
from spdtool.bench.ratios import BenchData, paired_ratio
from spdtool.run.records import LedgerEntry, Ratio, SpeedFactors


@dataclass(frozen=True)
class ZeroBound:
    """The most that zeros can give to the matrix products.

    Attributes:
        skipped: if every zero were skipped; infinite if all weights are zero.
        ledger: dense time over the bound of the ledger, all matrices together; None without a ledger.
        measured: dense over sparse time of the ledger, all matrices together; None where one was not timed.
    """

    skipped: float
    ledger: float | None
    measured: float | None

    @property
    def tightest(self) -> float:
        """The smaller of both bounds."""
        return self.skipped if self.ledger is None else min(self.skipped, self.ledger)


def split_speed(bench: BenchData, name: str, threads: int) -> SpeedFactors | None:
    """Split the speed of a sparse form over the grid; None if the dense teacher was not timed in its form.

    The factors are ratios of medians, so that their product is exactly the ratio of the whole.
    """
    return _split_speed(bench, name, threads, bench.grid)


def split_padded_speed(bench: BenchData, name: str, threads: int, shape: Shape) -> SpeedFactors | None:
    """Split the speed at a padded shape; None if the same shape without padding, or the dense form, was not timed."""
    full_shape = Shape(shape.batch, shape.length)
    # Without the full batch nothing says how much of the speed is padding left out.
    if full_shape not in bench.grid:
        return None
    padded, full = _split_speed(bench, name, threads, [shape]), _split_speed(bench, name, threads, [full_shape])
    if padded is None or full is None:
        return None
    return padded.model_copy(update={"fusion": full.fusion, "padding": padded.fusion / full.fusion})


def _split_speed(bench: BenchData, name: str, threads: int, shapes: Sequence[Shape]) -> SpeedFactors | None:
    forms = _dense_timings(bench, name, threads)
    if forms is None:
        return None
    exact, rounded = forms
    sparse = bench.timing(name, threads)
    # Without a form of its own, the shape counts among the zeros.
    smaller, cause = rounded, bench.cause
    if bench.shape_forms.get(name) in bench.engines:
        smaller, cause = bench.timing(bench.shape_forms[name], threads), "zeros inside"
    logs = np.zeros(4)
    for shape in shapes:
        baseline = bench.fastest_dense(threads, shape)
        times = [float(np.median(timing.rounds[shape])) for timing in (baseline, exact, rounded, smaller, sparse)]
        # In logarithms the factors add up to the whole, whatever the shape.
        logs += -np.diff(np.log(times)) / len(shapes)
    fusion, rounding, smaller_shape, zeros = np.exp(logs).tolist()
    return SpeedFactors(
        fusion=fusion,
        padding=1.0,
        rounding=rounding,
        shape=smaller_shape,
        zeros=zeros,
        cause=cause,
        zeros_ratio=paired_ratio([smaller] * len(shapes), sparse, shapes),
    )


def _dense_timings(bench: BenchData, name: str, threads: int) -> tuple[Timing, Timing] | None:
    """Timings of the dense teacher in the form of a sparse engine: with float32 weights, and as the form stores them.

    Both are one where the form does not round, or where the first could not be timed.
    """
    names = [engine for engine in bench.dense_forms.get(name, ()) if engine in bench.engines]
    if not names:
        return None
    # Last comes the form with float32 weights, first the one that stores as the sparse file does.
    return bench.timing(names[-1], threads), bench.timing(names[0], threads)


def bound_of_zeros(bench: BenchData, name: str) -> ZeroBound:
    """Compute the most that the zeros of an engine can give to its matrix products, at the ledger's most tokens."""
    sparsity = bench.files[name].sparsity or 0.0
    skipped = float("inf") if sparsity == 1 else 1 / (1 - sparsity)
    if not bench.ledger:
        return ZeroBound(skipped, None, None)
    # With the most tokens, where a product is bound by arithmetic: there zeros give the most.
    tokens = max(bench.ledger[0].products)
    dense = sum(entry.products[tokens].dense_us for entry in bench.ledger)
    bound = sum(entry.products[tokens].bound_us for entry in bench.ledger)
    return ZeroBound(skipped, dense / bound, _measured_gain(bench.ledger, tokens))


def _measured_gain(entries: Sequence[LedgerEntry], tokens: int) -> float | None:
    dense = sparse = 0.0
    for entry in entries:
        product = entry.products[tokens]
        if product.sparse_us is None:
            return None
        dense, sparse = dense + product.dense_us, sparse + product.sparse_us
    return dense / sparse


def factors_text(factors: SpeedFactors) -> str:
    """The factors as a product: `fusion 2.00x, rounding 1.10x, zeros 1.50x; together 3.30x`.

    Of another model than the teacher, its own name stands in place of the zeros.
    """
    texts = [f"fusion {factors.fusion:.2f}x"]
    if factors.padding != 1:
        texts.append(f"padding left out {factors.padding:.2f}x")
    if factors.rounding != 1:
        texts.append(f"rounding {factors.rounding:.2f}x")
    if factors.shape != 1:
        texts.append(f"smaller shape {factors.shape:.2f}x")
    return f"{', '.join(texts)}, {factors.cause} {factors.zeros:.2f}x; together {factors.whole:.2f}x"


def is_above(ratio: Ratio, bound: float) -> bool:
    """Whether a ratio is above a bound beyond its noise."""
    return ratio.low > bound
