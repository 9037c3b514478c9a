"""Put the figures of a bench into tables and sentences.

No sentence of the verdict is fixed: the measured figures choose each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from spdtool.bench.engines import Shape
from spdtool.bench.latency import MIN_ROUNDS, Timing
from spdtool.bench.ratios import (
    PERCENTILES,
    BenchData,
    ModelFile,
    latency_records,
    median_ms,
    median_with_interval,
    paired_ratio,
    ratio_caveat,
)
from spdtool.run.records import Cell, LedgerEntry, ProductTimes, Ratio

SAME_SPEED = 0.05  # a ratio this close to 1 is not worth calling faster, even if it is no noise
SAME_SIZE = 0.01
MOSTLY_REAL = 0.8  # above this share of real tokens there is too little padding to see whether it is computed
DENSE_INT8 = ("int8", "onnx-int8 teacher")  # engines of the dense teacher in int8, the rivals of a sparse form
MIB = 2**20
NO_DIFFERENCE = "no difference beyond the noise."
TIMING_NOTE = (
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


def overview_table(bench: BenchData) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the table that a run ends with: score, zeros, bytes on disk, peak MiB, speed, latency.

    The latencies are medians at the first and the last shape of the grid with the last number of threads, so that the
    table fits a terminal.
    """
    shapes = list(dict.fromkeys((bench.grid[0], bench.grid[-1])))
    columns = ["engine", "score", "zeros", "bytes", "RAM"]
    if len(bench.threads) == 1:
        columns.append("speed")
    else:
        columns += [f"speed {bench.threads[0]}t", *(f"{threads}t" for threads in bench.threads[1:])]
    columns += [f"ms {shape}" for shape in shapes]
    rows: list[list[Cell]] = []
    for name in bench.engines:
        timing = bench.timing(name, bench.threads[-1])
        row: list[Cell] = [name, *file_cells(bench.files.get(name)), f"{timing.peak / MIB:.0f}M"]
        for threads in bench.threads:
            row.append(f"{bench.speedup(bench.timing(name, threads), bench.grid).median:.2f}x")
        row += [median_ms(timing.rounds[shape]) for shape in shapes]
        rows.append(row)
    return columns, rows


def file_cells(file: ModelFile | None) -> list[Cell]:
    """Cells of a file: score, zeros, bytes; dashes for what is unknown."""
    if file is None:
        return ["-", "-", "-"]
    cells: list[Cell] = ["-", "-", file.bytes]
    if file.score is not None:
        cells[0] = file.score
    if file.sparsity is not None:
        cells[1] = f"{file.sparsity:.2%}"
    return cells


def ledger_table(entries: Sequence[LedgerEntry]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the ledger by layer, at its largest number of tokens: sums over the layer's matrices."""
    tokens = max(entries[0].products)
    columns = ["layer", "nonzeros", "density", "dense bytes", "sparse bytes"]
    columns += [f"dense us ({tokens} tokens)", "sparse us", "speed", "bound us"]
    layers: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        layers.setdefault(entry.layer, []).append(entry)
    return columns, [layer_row(name, matrices, tokens) for name, matrices in layers.items()]


def layer_row(name: str, matrices: Sequence[LedgerEntry], tokens: int) -> list[Cell]:
    """One row of the ledger by layer."""
    products = [matrix.products[tokens] for matrix in matrices]
    nonzeros = sum(matrix.nonzeros for matrix in matrices)
    density = nonzeros / sum(matrix.rows * matrix.columns for matrix in matrices)
    dense_us = sum(product.dense_us for product in products)
    row: list[Cell] = [name, nonzeros, f"{density:.2%}", sum(matrix.dense_bytes for matrix in matrices)]
    row.append(sum_or_dash([matrix.sparse_bytes for matrix in matrices]))
    sparse_us = sum_or_dash([product.sparse_us for product in products])
    speed = "-" if isinstance(sparse_us, str) else f"{dense_us / sparse_us:.2f}x"
    return [*row, dense_us, sparse_us, speed, sum(product.bound_us for product in products)]


def sum_or_dash(values: Sequence[float | None]) -> float | str:
    """Sum of the values, or a dash if one of them is missing."""
    total: float = 0
    for value in values:
        if value is None:
            return "-"
        total += value
    return total


def describe_verdict(bench: BenchData) -> list[str]:
    """What the zeros bought, in sentences."""
    lines = other_model_lines(bench)
    for name in bench.sparse:
        lines += [speed_line(bench, name, threads) for threads in bench.threads]
        lines += padding_lines(bench, name)
        lines += [file_line(bench, name), *rounding_lines(bench.files[name])]
        for rival in DENSE_INT8:
            if rival in bench.engines:
                lines.append(rival_line(bench, name, rival))
    lines += [same_form_line(bench, name) for name in bench.pairs if name in bench.engines]
    student_speeds = with_each_thread_count(bench, lambda threads: gain_text(bench, "student", threads))
    teacher_sparsity, student_sparsity = bench.files["teacher"].sparsity, bench.files["student"].sparsity
    if (student_sparsity or 0.0) <= (teacher_sparsity or 0.0):
        lines.append(f"The student has no more zeros than the teacher; against it, it runs at {student_speeds}.")
        return [*lines, *bench.notes]
    if bench.sparse:
        lines.append(f"The same zeros in plain onnxruntime: {student_speeds}.")
    else:
        lines += [speed_line(bench, "student", threads) for threads in bench.threads]
        lines.append(file_line(bench, "student"))
    return [*lines, *advice_lines(bench), *bench.notes]


def render_markdown(title: str, bench: BenchData) -> str:
    """The report as Markdown: verdict, every percentile, the ledger, where the nodes ran, and the machine."""
    lines = "\n".join(f"- {line}" for line in describe_verdict(bench))
    sections = [f"# {title}", lines, markdown_table(*overview_table(bench)), TIMING_NOTE, percentile_table(bench)]
    if bench.ledger:
        sections += ["## Ledger", LEDGER_NOTE, matrix_table(bench.ledger)]
    engine_rows: list[list[Cell]] = []
    for name in bench.engines:
        timing = bench.timing(name, bench.threads[0])
        memory: list[Cell] = [round(timing.resident / MIB), round(timing.peak / MIB)]
        engine_rows.append([name, nodes_text(timing), *memory])
    sections.append(
        markdown_table(["engine", "graph nodes by provider", "MiB when loaded", "MiB at the peak"], engine_rows)
    )
    if bench.environment is not None:
        machine: list[list[Cell]] = [[name, text] for name, text in bench.environment.lines()]
        sections.append(markdown_table(["measured on", ""], machine))
    return "\n\n".join(sections) + "\n"


def with_each_thread_count(bench: BenchData, text: Callable[[int], str]) -> str:
    """`text(threads)` for every number of threads, each with its number, as one enumeration."""
    return ", ".join(f"{text(threads)} with {thread_count(threads)}" for threads in bench.threads)


def thread_count(count: int) -> str:
    """A number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def gain_text(bench: BenchData, name: str, threads: int) -> str:
    """What the zeros give an engine, with its interval."""
    return str(bench.gain_from_zeros(bench.timing(name, threads), bench.grid))


def speed_line(bench: BenchData, name: str, threads: int) -> str:
    """Speed of an engine over the grid, and what it means."""
    timing = bench.timing(name, threads)
    speedup, rounds = bench.gain_from_zeros(timing, bench.grid), len(timing.rounds[bench.grid[0]])
    sparsity = bench.files[name].sparsity
    assert sparsity is not None, "exported students have a known sparsity"
    ideal = None
    if not bench.resized:
        ideal = math.inf if sparsity == 1 else 1 / (1 - sparsity)
    return (
        f"Speed of {name}, {sparsity:.1%} zeros, {thread_count(threads)}: {speedup} that of the dense teacher on "
        f"{timing.provider}, over {rounds} paired rounds{grid_range(bench, timing)}: "
        f"{meaning(speedup, rounds, ideal)}"
    )


def grid_range(bench: BenchData, timing: Timing) -> str:
    """The worst and the best shape of the grid."""
    if len(bench.grid) < 2:
        return ""
    medians = {str(shape): bench.gain_from_zeros(timing, [shape]).median for shape in bench.grid}
    speeds = sorted((median, shape) for shape, median in medians.items())
    (lowest, worst), (highest, best) = speeds[0], speeds[-1]
    return f", {lowest:.2f}x at {worst} to {highest:.2f}x at {best}"


def meaning(speedup: Ratio, rounds: int, ideal: float | None) -> str:
    """Say what a ratio means.

    Args:
        ideal: speed-up of the matrix products if every zero were skipped; None if student and teacher are different
            models.
    """
    caveat = ratio_caveat(speedup, rounds)
    if caveat is not None:
        if rounds < MIN_ROUNDS:
            return f"{caveat}."
        return f"{caveat}. Repeat it on a machine that does nothing else, with more rounds."
    slower, faster = speedup.high < 1, speedup.low > 1
    if ideal is None and slower:
        return "slower, beyond the noise."
    if ideal is None and faster:
        return "faster, beyond the noise."
    if ideal is None:  # another model: the zeros are not all that differs
        return NO_DIFFERENCE
    if slower:
        return "slower, beyond the noise: nothing is won from the zeros."
    if not faster:
        return "no difference beyond the noise: it multiplies the zeros like any other number."
    if speedup.median < 1 + SAME_SPEED:
        return "beyond the noise, but next to nothing: it multiplies the zeros like any other number."
    return f"faster, beyond the noise (skipping every zero would make the matrix products {ideal:.1f}x as fast)."


def padding_lines(bench: BenchData, name: str) -> list[str]:
    """Speed on padded batches, and how much of it is padding that is not computed, where both shapes were timed."""
    lines = []
    for shape in bench.padded:
        speeds = with_each_thread_count(bench, speedup_text(bench, name, [shape]))
        real_share = sum(shape.real) / (shape.batch * shape.length)
        line = f"Padding: at {shape}, where {real_share:.0%} of the tokens are real, {name} has {speeds}"
        full_shape, timing = Shape(shape.batch, shape.length), bench.timing(name, bench.threads[0])
        if full_shape in bench.grid and real_share < MOSTLY_REAL:
            ratios = np.asarray(timing.rounds[full_shape]) / np.asarray(timing.rounds[shape])
            gain = median_with_interval(ratios)
            if gain.low > 1 + SAME_SPEED:  # a full batch of the same shape takes longer: padding is skipped
                line += f"; it computes such a batch {gain.median:.2f}x as fast as a full one"
                line += ": that part is padding left out, not zeros"
            else:
                line += "; it computes padding like any other token"
        lines.append(line + ".")
    return lines


def speedup_text(bench: BenchData, name: str, shapes: Sequence[Shape]) -> Callable[[int], str]:
    """A function from a number of threads to the median speed-up at some shapes, as text."""
    return lambda threads: f"{bench.speedup(bench.timing(name, threads), shapes).median:.2f}x"


def file_line(bench: BenchData, name: str) -> str:
    """How much smaller a file is than the teacher's, and why."""
    teacher_bytes, file_bytes = bench.files["teacher"].bytes, bench.files[name].bytes
    ratio = teacher_bytes / file_bytes
    line = f"File of {name}: {ratio:.2f}x smaller, {file_bytes:,} of {teacher_bytes:,} bytes"
    if bench.resized:  # the bytes are those of another model, not of zeros left out
        return f"{line}."
    packed = [entry for entry in bench.ledger if entry.sparse_bytes is not None]
    if name in bench.sparse and packed:
        dense = sum(entry.dense_bytes for entry in packed)
        sparse = sum(entry.sparse_bytes or 0 for entry in packed)
        return (
            f"{line}: the pruned matrices went from {dense:,} to {sparse:,} bytes (zeros left out, and fewer bits a "
            f"weight), all the rest from {teacher_bytes - dense:,} to {file_bytes - sparse:,} (fewer bits only)."
        )
    if ratio < 1 + SAME_SIZE:
        return f"{line}: it stores the zeros like any other number."
    return f"{line}: it leaves zeros out."


def rounding_lines(file: ModelFile) -> list[str]:
    """What rounding the weights cost, where they were rounded and a dev set was given."""
    if file.rounding is None or file.score is None or file.checkpoint_score is None:
        return []
    values, embeddings = file.rounding
    line = f"Rounding (pruned matrices as {values}, embeddings as {embeddings}): dev score {file.score:.4f}, "
    line += f"that of its checkpoint {file.checkpoint_score:.4f}"
    if file.prediction_change:
        line += f"; {file.prediction_change}"
    return [line + "."]


def rival_line(bench: BenchData, name: str, rival: str) -> str:
    """Compare an engine with a rival at every point of the grid, with every number of threads."""
    ratios: dict[str, float] = {}
    for threads in bench.threads:
        for shape in bench.grid:
            ratio = paired_ratio([bench.timing(rival, threads)], bench.timing(name, threads), [shape])
            ratios[f"{shape} with {thread_count(threads)}"] = ratio.median
    slower_points = [f"{point} ({ratio:.2f}x)" for point, ratio in ratios.items() if ratio < 1]
    result = "faster at every point of the grid"
    if slower_points:
        result = f"slower at {', '.join(slower_points)}"
    rival_file = bench.files.get(rival)
    score = "whose score is not measured"
    if rival_file is not None and rival_file.score is not None:
        score = f"dev score {rival_file.score:.4f}"
    reach = f"{min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x"
    return f"Against the teacher in {rival.removesuffix(' teacher')} ({score}), {name} is {result}: {reach}."


def same_form_line(bench: BenchData, name: str) -> str:
    """Separate what a form (fused, fp16, int8) gives the dense teacher from what the zeros add to it."""
    teacher = bench.pairs[name]

    def form_gain(threads: int) -> str:
        return str(bench.speedup(bench.timing(teacher, threads), bench.grid))

    def zeros_gain(threads: int) -> str:
        timings = [bench.timing(teacher, threads)] * len(bench.grid)
        return str(paired_ratio(timings, bench.timing(name, threads), bench.grid))

    dense_bytes, teacher_bytes = bench.files["teacher"].bytes, bench.files[teacher].bytes
    return (
        f"Treatment {name}, which is not sparsity: it gives the dense teacher "
        f"{with_each_thread_count(bench, form_gain)}, and {dense_bytes / teacher_bytes:.2f}x fewer bytes. The zeros "
        f"add to it, student against teacher in the same form: {with_each_thread_count(bench, zeros_gain)}; "
        f"{teacher_bytes / bench.files[name].bytes:.2f}x fewer bytes."
    )


def other_model_lines(bench: BenchData) -> list[str]:
    """Say that student and teacher are different models, where they are."""
    if not bench.resized:
        return []
    student, teacher = bench.files["student"].size, bench.files["teacher"].size
    return [
        f"The student is another model than the teacher: its matrices hold {student:,} weights, zeros among them, the "
        f"teacher's {teacher:,}. Speed and bytes are those of the other model and of its zeros together."
    ]


def advice_lines(bench: BenchData) -> list[str]:
    """Say what would help where the best form of the student is no faster or no smaller."""
    speeds = [bench.gain_from_zeros(bench.timing(bench.best, threads), bench.grid) for threads in bench.threads]
    advice = []
    if all(speed.median < 1 + SAME_SPEED or speed.low <= 1 for speed in speeds):
        advice.append("for speed, a runtime whose kernels skip zeros, or whole heads, neurons or layers taken out")
    if bench.files["teacher"].bytes / bench.files[bench.best].bytes < 1 + SAME_SIZE:
        advice.append("for size, storage that leaves zeros out, or fewer bits a weight")
    if not advice:
        return []
    return [f"What would help: {'; '.join(advice)}."]


def matrix_table(entries: Sequence[LedgerEntry]) -> str:
    """The whole ledger as a Markdown table: every matrix at every number of tokens."""
    columns = ["matrix", "size", "nonzeros", "density", "dense bytes", "sparse bytes", "tokens"]
    columns += ["dense us", "GFLOP/s", "sparse us", "GFLOP/s", "speed", "bound us", "of the bound"]
    rows: list[list[Cell]] = []
    for entry in entries:
        matrix: list[Cell] = [entry.name, f"{entry.rows}x{entry.columns}", entry.nonzeros, f"{entry.density:.2%}"]
        matrix += [entry.dense_bytes, "-" if entry.sparse_bytes is None else entry.sparse_bytes]
        for tokens, product in entry.products.items():
            dense: list[Cell] = [tokens, f"{product.dense_us:.1f}", f"{product.dense_flops / 1e9:.1f}"]
            rows.append([*matrix, *dense, *sparse_cells(product)])
    return markdown_table(columns, rows)


def sparse_cells(product: ProductTimes) -> list[Cell]:
    """Cells of a sparse product; dashes for a matrix without a sparse form."""
    bound = f"{product.bound_us:.1f}"
    if product.sparse_us is None or product.sparse_flops is None:
        return ["-", "-", "-", bound, "-"]
    cells: list[Cell] = [f"{product.sparse_us:.1f}", f"{product.sparse_flops / 1e9:.1f}", f"{product.ratio:.2f}x"]
    return [*cells, bound, f"{product.bound_us / product.sparse_us:.0%}"]


def percentile_table(bench: BenchData) -> str:
    """Every percentile of every engine as a Markdown table."""
    columns = ["engine", "provider", "threads", "shape", "min ms", *(f"p{rank} ms" for rank in PERCENTILES)]
    rows: list[list[Cell]] = []
    for record in latency_records(bench):
        percentiles = (record.p50, record.p90, record.p95, record.p99)
        speed = "1x" if record.engine == record.dense else str(record.ratio)
        row: list[Cell] = [record.engine, record.provider, record.threads, record.shape, f"{record.min:.3f}"]
        row += [f"{value:.3f}" for value in percentiles]
        rows.append([*row, f"{record.rows_per_second:.1f}", speed])
    return markdown_table([*columns, "rows/s", "speed"], rows)


def nodes_text(timing: Timing) -> str:
    """Number of graph nodes by provider."""
    if timing.nodes is None:
        return timing.provider
    return ", ".join(f"{provider} {sum(counts.values())}" for provider, counts in timing.nodes.items())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; floats have four digits."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
