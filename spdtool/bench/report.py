"""What the timings say: percentiles, ratios with their noise, and a verdict in plain language.

Nothing in the verdict is a set phrase about a runtime: each sentence is chosen by the figures that were measured.

Ratios are to the dense teacher in onnxruntime, which is timed twice: with the graph's nodes fused, and without. Neither
is always the faster one, so that at each shape, and with each number of threads, the faster of the two is the 1x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spdtool.bench.latency import FEWEST_ROUNDS, Shape, Timing

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95
SAME_SPEED = 0.05  # a ratio this close to 1 is not worth calling faster, even where it is not noise
NOISY = 1.1  # an interval that reaches from 1 beyond this says nothing about zeros
SAME_SIZE = 0.01
MUCH_REAL = 0.8  # share of real tokens above which there is too little padding to see whether it is computed
RIVALS = ("int8", "onnx-int8 teacher")
MIB = 2**20

Facts = Mapping[str, Mapping[str, Any]]
"""Engine to what the export stage knows of its file: `bytes`, `sparsity`, `dev`, where there is one."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median over paired rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"


@dataclass(frozen=True)
class Bench:
    """All that a report is written from.

    Attributes:
        timings: the teacher first; see `latency.race`.
        facts: what is known of the files. sparse: engines that run a sparse form of the student.
        treated: engine of the student to that of the teacher with the same treatment: fused, fp16, int8.
        ledger: see `ledger.entry`. notes: what was not done as asked, or needs saying beside the figures.
    """

    timings: Sequence[Timing]
    facts: Facts
    sparse: Sequence[str] = ()
    ledger: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    treated: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> list[int]:
        """The numbers of threads that engines were timed with."""
        return list(dict.fromkeys(timing.engine.threads for timing in self.timings))

    @property
    def engines(self) -> list[str]:
        """Names, in the order of the table."""
        return list(dict.fromkeys(timing.engine.name for timing in self.timings))

    @property
    def grid(self) -> list[Shape]:
        """The shapes without padding: those that a ratio over the grid is a mean of."""
        return [shape for shape in self.timings[0].rounds if not shape.real]

    @property
    def padded(self) -> list[Shape]:
        """The shapes with padding."""
        return [shape for shape in self.timings[0].rounds if shape.real]

    @property
    def resized(self) -> bool:
        """Whether the matrices of student and teacher differ in size, so that zeros are not all that differs."""
        sizes = {self.facts[role].get("size") for role in ("teacher", "student")}
        return len(sizes) > 1

    def of(self, name: str, threads: int) -> Timing:
        """The timing of an engine with a number of threads."""
        wanted = (name, threads)
        return next(timing for timing in self.timings if (timing.engine.name, timing.engine.threads) == wanted)

    def dense(self, threads: int, shape: Shape) -> Timing:
        """The faster of the dense teacher's timings."""
        known = [timing for timing in self.timings if timing.engine.baseline and timing.engine.threads == threads]
        return min(known, key=lambda timing: float(np.median(timing.rounds[shape])))

    def speed(self, timing: Timing, shapes: Sequence[Shape]) -> Ratio:
        """How many times faster than the dense teacher."""
        return ratio([self.dense(timing.engine.threads, shape) for shape in shapes], timing, shapes)

    def zeros(self, timing: Timing, shapes: Sequence[Shape]) -> Ratio:
        """What the zeros buy an engine: a plain file is held against the teacher in the same form, fused or not."""
        if timing.engine.name in self.sparse:
            return self.speed(timing, shapes)
        return ratio([self.of(self.timings[0].engine.name, timing.engine.threads)] * len(shapes), timing, shapes)


def summary(milliseconds: Sequence[float], batch: int) -> dict[str, float]:
    """Percentiles in milliseconds, and rows per second; of few rounds, p99 is little more than the slowest one."""
    values = np.asarray(milliseconds)
    result = {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}
    return result | {"rows_per_second": 1000 * batch * len(values) / float(values.sum())}


def ratio(slow: Sequence[Timing], fast: Timing, shapes: Sequence[Shape]) -> Ratio:
    """Speed of `fast` against `slow[i]` at `shapes[i]`: round by round the geometric mean over shapes; then the median.

    The interval holds the median with 95 % confidence whatever the distribution (order statistics); of fewer than six
    rounds it is all that was seen.
    """
    pairs = zip(slow, shapes, strict=True)
    logs = [np.log(np.asarray(timing.rounds[shape]) / np.asarray(fast.rounds[shape])) for timing, shape in pairs]
    return _interval(np.exp(np.mean(logs, axis=0)))


def details(bench: Bench) -> list[dict[str, Any]]:
    """One entry for each number of threads, shape and engine: percentiles, throughput, ratio to the dense teacher."""
    return [
        {"engine": name, "provider": timing.provider, "threads": threads, "shape": str(shape)}
        | {"batch": shape.batch, "length": shape.length, "real": list(shape.real)}
        | summary(timing.rounds[shape], shape.batch)
        | {"min": timing.least[shape], "rounds": len(timing.rounds[shape])}
        | {"ratio": bench.speed(timing, [shape]).__dict__, "dense": bench.dense(threads, shape).engine.name}
        for threads in bench.threads
        for shape in bench.timings[0].rounds
        for name in bench.engines
        for timing in [bench.of(name, threads)]
    ]


def overview(bench: Bench) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table that a run ends with: score, zeros, bytes on disk, peak MiB, speed, latency.

    The latencies are medians at the first and the last shape of the grid with the last number of threads, so that the
    table fits a terminal.
    """
    ends = list(dict.fromkeys((bench.grid[0], bench.grid[-1])))
    first, *others = bench.threads
    last = bench.threads[-1]
    columns = ["engine", "score", "zeros", "bytes", "RAM"]
    columns += [f"speed {first}t", *(f"{threads}t" for threads in others)] if others else ["speed"]
    columns += [f"ms {shape}" for shape in ends]
    rows: list[list[Any]] = []
    for name in bench.engines:
        timing = bench.of(name, last)
        speeds = [bench.speed(bench.of(name, threads), bench.grid).median for threads in bench.threads]
        rows.append([name, *_known(bench.facts.get(name, {})), f"{timing.peak / MIB:.0f}M"])
        rows[-1] += [f"{speed:.2f}x" for speed in speeds]
        rows[-1] += [summary(timing.rounds[shape], 1)["p50"] for shape in ends]
    return columns, rows


def ledger_table(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the ledger by layer, at its most tokens: sums over the layer's matrices."""
    tokens = max(entries[0]["products"], key=int)
    columns = ["layer", "nonzeros", "density", "dense bytes", "sparse bytes"]
    columns += [f"dense us ({tokens} tokens)", "sparse us", "speed", "bound us"]
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        layers.setdefault(entry["layer"], []).append(entry)
    return columns, [_layer(name, group, tokens) for name, group in layers.items()]


def verdict(bench: Bench) -> list[str]:
    """What the zeros bought, in sentences."""
    teacher, student = bench.facts["teacher"], bench.facts["student"]
    lines = _resized(bench)
    for name in bench.sparse:
        lines += [_speed(bench, name, threads) for threads in bench.threads]
        lines += _padding(bench, name) + _file(bench, name) + _rounding(bench.facts[name])
        lines += [_against_rival(bench, name, rival) for rival in RIVALS if rival in bench.engines]
    lines += [line for name in bench.treated if name in bench.engines for line in _treated(bench, name)]
    if student["sparsity"] <= teacher["sparsity"]:
        speeds = ", ".join(_with(bench, "student", threads) for threads in bench.threads)
        lines.append(f"The student has no more zeros than the teacher; against it, it runs at {speeds}.")
        return [*lines, *bench.notes]
    if bench.sparse:
        speeds = ", ".join(_with(bench, "student", threads) for threads in bench.threads)
        lines.append(f"The same zeros in plain onnxruntime: {speeds}.")
    else:
        lines += [_speed(bench, "student", threads) for threads in bench.threads] + _file(bench, "student")
    return [*lines, *_help(bench), *bench.notes]


def markdown(title: str, bench: Bench) -> str:
    """The report as Markdown: verdict, every percentile, the ledger, where the nodes ran, and the machine."""
    lines = "\n".join(f"- {line}" for line in verdict(bench))
    parts = [f"# {title}", lines, _table(*overview(bench)), NOTE, _percentiles(bench)]
    if bench.ledger:
        parts += ["## Ledger", LEDGER_NOTE, full_ledger(bench.ledger)]
    ran = [
        [name, _nodes(timing), round(timing.resident / MIB), round(timing.peak / MIB)]
        for name in bench.engines
        for timing in [bench.of(name, bench.threads[0])]
    ]
    machine = [[name, _flat(value)] for name, value in bench.environment.items()]
    parts += [_table(["engine", "graph nodes by provider", "MiB when loaded", "MiB at the peak"], ran)]
    return "\n\n".join([*parts, _table(["measured on", ""], machine)]) + "\n"


SAME = "no difference beyond the noise."
NOTE = (
    "Speed is against the dense teacher in onnxruntime, fused or not, whichever is faster at that shape. A figure is "
    "of turns: the median of the batches that fit into ten milliseconds, or one that takes longer. `min` is the "
    "fastest single batch. Milliseconds of the first table are those with all its threads, the last number of them. A "
    "mean over the grid leaves the padded shapes out."
)
LEDGER_NOTE = (
    "One thread; one product at a time, repeated, so that its weights are in the cache: a dense one in onnxruntime, "
    "less what a model takes that does nothing; a sparse one as it runs inside the encoder. Matrices of equal shape "
    "whose densities agree to a percent share one timing. GFLOP/s of a sparse product count the weights there are. "
    "The bound is the larger of these operations at the measured peak and the packed weights at the measured bandwidth."
)


def _known(facts: Mapping[str, Any]) -> list[Any]:
    zeros = f"{facts['sparsity']:.2%}" if "sparsity" in facts else "-"
    return [facts["dev"]["score"] if "dev" in facts else "-", zeros, facts.get("bytes", "-")]


def _speed(bench: Bench, name: str, threads: int) -> str:
    timing = bench.of(name, threads)
    speed, rounds = bench.zeros(timing, bench.grid), len(timing.rounds[bench.grid[0]])
    sparsity = bench.facts[name]["sparsity"]
    ideal = None if bench.resized else 1 / (1 - sparsity) if sparsity < 1 else math.inf
    return (
        f"Speed of {name}, {sparsity:.1%} zeros, {_threads(threads)}: {speed} that of the dense teacher on "
        f"{timing.provider}, over {rounds} paired rounds{_range(bench, timing)}: {_meaning(speed, rounds, ideal)}"
    )


def _range(bench: Bench, timing: Timing) -> str:
    """From the worst to the best shape of the grid."""
    if len(bench.grid) < 2:
        return ""
    speeds = sorted((bench.zeros(timing, [shape]).median, str(shape)) for shape in bench.grid)
    (low, worst), (high, best) = speeds[0], speeds[-1]
    return f", {low:.2f}x at {worst} to {high:.2f}x at {best}"


def _padding(bench: Bench, name: str) -> list[str]:
    """What is won on padded batches, and how much of that is padding that is not computed: where both were timed."""
    lines = []
    for shape in bench.padded:
        speeds = ", ".join(
            f"{bench.speed(bench.of(name, threads), [shape]).median:.2f}x with {_threads(threads)}"
            for threads in bench.threads
        )
        share = sum(shape.real) / (shape.batch * shape.length)
        line = f"Padding: at {shape}, where {share:.0%} of the tokens are real, {name} has {speeds}"
        full, timing = Shape(shape.batch, shape.length), bench.of(name, bench.threads[0])
        if full in bench.grid and share < MUCH_REAL:
            gain = _interval(np.asarray(timing.rounds[full]) / np.asarray(timing.rounds[shape]))
            line += (
                f"; it computes such a batch {gain.median:.2f}x as fast as a full one: that part is padding left out, "
                "not zeros"
                if gain.low > 1 + SAME_SPEED
                else "; it computes padding like any other token"
            )
        lines.append(line + ".")
    return lines


def _file(bench: Bench, name: str) -> list[str]:
    teacher, found = bench.facts["teacher"]["bytes"], bench.facts[name]["bytes"]
    size = teacher / found
    why = "it stores the zeros like any other number." if size < 1 + SAME_SIZE else "it leaves zeros out."
    if bench.resized:
        return [f"File of {name}: {size:.2f}x smaller, {found:,} of {teacher:,} bytes."]
    packed = [entry for entry in bench.ledger if entry["sparse_bytes"] is not None]
    if name in bench.sparse and packed:
        dense, sparse = (sum(entry[key] for entry in packed) for key in ("dense_bytes", "sparse_bytes"))
        why = (
            f"the pruned matrices went from {dense:,} to {sparse:,} bytes (zeros left out, and fewer bits a weight), "
            f"all the rest from {teacher - dense:,} to {found - sparse:,} (fewer bits only)."
        )
    return [f"File of {name}: {size:.2f}x smaller, {found:,} of {teacher:,} bytes: {why}"]


def _rounding(facts: Mapping[str, Any]) -> list[str]:
    if "values" not in facts or "dev" not in facts:
        return []
    score, checkpoint = facts["dev"]["score"], facts["checkpoint_dev"]["score"]
    flipped = f"; {facts['flipped']} of {facts['rows']} predictions changed" if "flipped" in facts else ""
    kept = f"pruned matrices as {facts['values']}, embeddings as {facts['embeddings']}"
    return [f"Rounding ({kept}): dev score {score:.4f}, that of its checkpoint {checkpoint:.4f}{flipped}."]


def _against_rival(bench: Bench, name: str, rival: str) -> str:
    """How an engine stands against another one at every point of the grid, with every number of threads."""
    shapes = [(threads, shape) for threads in bench.threads for shape in bench.grid]
    found = {
        f"{shape} with {_threads(threads)}": ratio([bench.of(rival, threads)], bench.of(name, threads), [shape]).median
        for threads, shape in shapes
    }
    slower = [f"{place} ({value:.2f}x)" for place, value in found.items() if value < 1]
    reach = f"{min(found.values()):.2f}x to {max(found.values()):.2f}x"
    where = f"slower at {', '.join(slower)}" if slower else "faster at every point of the grid"
    dev = bench.facts.get(rival, {}).get("dev")
    scored = f"dev score {dev['score']:.4f}" if dev else "whose score is not measured"
    return f"Against the teacher in {rival.removesuffix(' teacher')} ({scored}), {name} is {where}: {reach}."


def _treated(bench: Bench, name: str) -> list[str]:
    """What a treatment gives the dense teacher, and what the zeros add to it: the one is never told as the other."""
    teacher, zeros = bench.treated[name], []
    for threads in bench.threads:
        same = ratio([bench.of(teacher, threads)] * len(bench.grid), bench.of(name, threads), bench.grid)
        zeros.append(f"{same} with {_threads(threads)}")
    gain = ", ".join(
        f"{bench.speed(bench.of(teacher, threads), bench.grid)} with {_threads(threads)}" for threads in bench.threads
    )
    dense, treated, sparse = (bench.facts[of]["bytes"] for of in ("teacher", teacher, name))
    return [
        f"Treatment {name}, which is not sparsity: it gives the dense teacher {gain}, and {dense / treated:.2f}x fewer "
        f"bytes. The zeros add to it, student against teacher in the same form: {', '.join(zeros)}; "
        f"{treated / sparse:.2f}x fewer bytes."
    ]


def _with(bench: Bench, name: str, threads: int) -> str:
    return f"{bench.zeros(bench.of(name, threads), bench.grid)} with {_threads(threads)}"


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def _meaning(speed: Ratio, rounds: int, ideal: float | None) -> str:
    """What a ratio says; `ideal` is what the zeros alone could win, None where another model is timed."""
    doubt = caveat(speed, rounds)
    if doubt is not None:
        again = " Repeat it on a machine that does nothing else, with more rounds." if rounds >= FEWEST_ROUNDS else ""
        return f"{doubt}.{again}"
    if ideal is None:
        return "slower, beyond the noise." if speed.high < 1 else "faster, beyond the noise." if speed.low > 1 else SAME
    if speed.low <= 1 <= speed.high:
        return "no difference beyond the noise: it multiplies the zeros like any other number."
    if speed.high < 1:
        return "slower, beyond the noise: nothing is won from the zeros."
    if speed.median < 1 + SAME_SPEED:
        return "beyond the noise, but next to nothing: it multiplies the zeros like any other number."
    return f"faster, beyond the noise (skipping every zero would make the matrix products {ideal:.1f}x as fast)."


def caveat(speed: Ratio, rounds: int) -> str | None:
    """Why a ratio says little, which is to be told wherever it is shown; None: it says what it says."""
    if rounds < FEWEST_ROUNDS:
        return f"{rounds} rounds are too few to tell it from noise"
    if speed.low <= 1 <= speed.high and max(1 / speed.low, speed.high) > NOISY:
        return "the rounds scatter too much to tell"
    return None


def _resized(bench: Bench) -> list[str]:
    if not bench.resized:
        return []
    mine, its = (bench.facts[role]["size"] for role in ("student", "teacher"))
    return [
        f"The student is another model than the teacher: its matrices hold {mine:,} weights, zeros among them, the "
        f"teacher's {its:,}. Speed and bytes are those of the other model and of its zeros together."
    ]


def _help(bench: Bench) -> list[str]:
    """What the best of the student's files still lacks."""
    best = [*bench.sparse, "student"][0]
    speeds = [bench.zeros(bench.of(best, threads), bench.grid) for threads in bench.threads]
    slow = all(speed.median < 1 + SAME_SPEED or speed.low <= 1 for speed in speeds)
    large = bench.facts["teacher"]["bytes"] / bench.facts[best]["bytes"] < 1 + SAME_SIZE
    if not slow and not large:
        return []
    speed = "for speed, a runtime whose kernels skip zeros, or whole heads, neurons or layers taken out"
    size = "for size, storage that leaves zeros out, or fewer bits a weight"
    return ["What would help: " + "; ".join(([speed] if slow else []) + ([size] if large else [])) + "."]


def _layer(name: str, group: Sequence[Mapping[str, Any]], tokens: str) -> list[Any]:
    def total(key: str) -> Any:
        values = [entry[key] for entry in group]
        return "-" if None in values else sum(values)

    def micro(key: str) -> Any:
        values = [entry["products"][tokens][key] for entry in group]
        return "-" if None in values else sum(values)

    dense, sparse = micro("dense_us"), micro("sparse_us")
    density = total("nonzeros") / sum(entry["rows"] * entry["columns"] for entry in group)
    row = [name, total("nonzeros"), f"{density:.2%}", total("dense_bytes"), total("sparse_bytes"), dense, sparse]
    return [*row, "-" if sparse == "-" else f"{dense / sparse:.2f}x", micro("bound_us")]


def full_ledger(entries: Sequence[Mapping[str, Any]]) -> str:
    head = ["matrix", "size", "nonzeros", "density", "dense bytes", "sparse bytes", "tokens"]
    head += ["dense us", "GFLOP/s", "sparse us", "GFLOP/s", "speed", "bound us", "of the bound"]
    rows = []
    for entry in entries:
        facts = [entry["name"], f"{entry['rows']}x{entry['columns']}", entry["nonzeros"], f"{entry['density']:.2%}"]
        facts += [entry["dense_bytes"], "-" if entry["sparse_bytes"] is None else entry["sparse_bytes"]]
        for tokens, product in entry["products"].items():
            dense = [tokens, f"{product['dense_us']:.1f}", f"{product['dense_flops'] / 1e9:.1f}"]
            rows.append([*facts, *dense, *_sparse_cells(product)])
    return _table(head, rows)


def _sparse_cells(product: Mapping[str, Any]) -> list[str]:
    bound = f"{product['bound_us']:.1f}"
    if product["sparse_us"] is None:
        return ["-", "-", "-", bound, "-"]
    reached = product["bound_us"] / product["sparse_us"]
    figures = [f"{product['sparse_us']:.1f}", f"{product['sparse_flops'] / 1e9:.1f}", f"{product['ratio']:.2f}x"]
    return [*figures, bound, f"{reached:.0%}"]


def _percentiles(bench: Bench) -> str:
    head = ["engine", "provider", "threads", "shape", "min ms", *(f"p{rank} ms" for rank in PERCENTILES)]
    rows = [
        [entry["engine"], entry["provider"], entry["threads"], entry["shape"], f"{entry['min']:.3f}"]
        + [f"{entry[f'p{rank}']:.3f}" for rank in PERCENTILES]
        + [f"{entry['rows_per_second']:.1f}", "1x" if entry["engine"] == entry["dense"] else Ratio(**entry["ratio"])]
        for entry in details(bench)
    ]
    return _table([*head, "rows/s", "speed"], rows)


def _interval(ratios: np.ndarray) -> Ratio:
    """Median and interval of the ratios of paired rounds."""
    ordered = np.sort(ratios)
    below = _rank(len(ordered))
    return Ratio(float(np.median(ordered)), float(ordered[below]), float(ordered[-1 - below]))


def _rank(count: int) -> int:
    """How many of the smallest, and of the largest, of `count` sorted values lie outside the median's interval."""
    tail, rank = 0.0, 0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank = below
    return rank


def _flat(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)


def _nodes(timing: Timing) -> str:
    if timing.nodes is None:
        return timing.provider
    return ", ".join(f"{name} {sum(ops.values())}" for name, ops in timing.nodes.items())


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
