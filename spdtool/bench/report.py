"""Put the figures of a bench into tables and sentences.

No sentence of the verdict is fixed: the measured figures choose each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from spdtool.bench.engines import Shape
from spdtool.bench.factors import bound_of_zeros, factors_text, is_above, split_padded_speed, split_speed
from spdtool.bench.latency import MIN_ROUNDS, Timing
from spdtool.bench.ledger_tables import LEDGER_NOTE, markdown_table, matrix_table
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
from spdtool.bench.sizes import (
    DENSE_INT8,
    SAME_SIZE,
    file_line,
    int8_bytes_lines,
    rival_line,
    rival_lines,
    rounding_lines,
    thread_count,
)
from spdtool.run.records import Cell, Ratio

SAME_SPEED = 0.05  # a ratio this close to 1 is not worth calling faster, even if it is no noise
MOSTLY_REAL = 0.8  # above this share of real tokens there is too little padding to see whether it is computed
MIB = 2**20
NO_DIFFERENCE = "no difference beyond the noise."
TIMING_NOTE = (
    "`speed` is how many times as fast an engine is as the dense teacher in onnxruntime: fused or not, whichever is "
    "faster at that shape. In each round the engines take turns. A turn repeats a batch for ten milliseconds, or runs "
    "it once where that takes longer, and its median counts. `min` is the fastest single batch of all rounds. "
    "Milliseconds in the first table are those with the most threads. Means over the grid leave padded shapes out. "
    "An engine whose name ends in `dense` runs the dense teacher, which has no zeros, through the operators of that "
    "form; in `dense fp32` its weights are not rounded. One that ends in `shape` runs the student's own shape, without "
    "the zeros inside."
)


GPU_NOTE = (
    "`speed` is how many times as fast an engine is as the fastest dense teacher at that shape, in whatever runtime "
    "and precision its dev score passes. `ms` is what a client sees: copies to the GPU and back are in it. `device` is "
    "the time between two events of the GPU, with the inputs in its memory. In each round the engines take turns. "
    "`VRAM` is what the used memory of the card grew by while an engine was opened and ran."
)


def overview_table(bench: BenchData) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the table that a run ends with: score, zeros, bytes on disk, peak MiB, speed, latency.

    The latencies are medians at the first and the last shape of the grid with the last number of
    threads, so that the table fits a terminal.
    """
    shapes = list(dict.fromkeys((bench.grid[0], bench.grid[-1])))
    columns = ["engine", "score", "zeros", "bytes", "VRAM" if bench.on_gpu else "RAM"]
    if len(bench.threads) == 1:
        columns.append("speed")
    else:
        columns += [f"speed {bench.threads[0]}t", *(f"{threads}t" for threads in bench.threads[1:])]
    columns += [f"ms {shape}" for shape in shapes]
    if bench.on_gpu:
        columns += [f"device {shape}" for shape in shapes]
    rows: list[list[Cell]] = []
    for name in bench.engines:
        timing = bench.timing(name, bench.threads[-1])
        row: list[Cell] = [name, *file_cells(bench.files.get(name)), f"{timing.peak / MIB:.0f}M"]
        for threads in bench.threads:
            row.append(f"{bench.speedup(bench.timing(name, threads), bench.grid).median:.2f}x")
        row += [median_ms(timing.rounds[shape]) for shape in shapes]
        if bench.on_gpu:
            for shape in shapes:
                row.append(median_ms(timing.device[shape]) if shape in timing.device else None)
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


def describe_verdict(bench: BenchData) -> list[str]:
    """What the zeros bought, in sentences."""
    rivals = rival_lines(bench)
    # on a GPU they are the 1x of all that follows
    lines = [*other_model_lines(bench), *(rivals if bench.on_gpu else [])]
    last = [] if bench.on_gpu else rivals
    for name in bench.sparse:
        for threads in bench.threads:
            lines += [speed_line(bench, name, threads), *factor_lines(bench, name, threads)]
        lines += [*bound_lines(bench, name), *padding_lines(bench, name)]
        lines += [file_line(bench, name), *int8_bytes_lines(bench, name), *rounding_lines(bench.files[name])]
        for rival in DENSE_INT8:
            if rival in bench.engines:
                lines.append(rival_line(bench, name, rival))
    lines += [same_form_line(bench, name) for name in bench.pairs if name in bench.engines]
    student_speeds = with_each_thread_count(bench, lambda threads: gain_text(bench, "student", threads))
    teacher_sparsity, student_sparsity = bench.files["teacher"].sparsity, bench.files["student"].sparsity
    if (student_sparsity or 0.0) <= (teacher_sparsity or 0.0):
        lines.append(f"The student has no more zeros than the teacher; against it, it runs at {student_speeds}.")
        return [*lines, *last, *bench.notes]
    if bench.sparse:
        subject = "The smaller student" if bench.leaves_out else "The same zeros"
        lines.append(f"{subject} in plain onnxruntime: {student_speeds}.")
    else:
        lines += [speed_line(bench, "student", threads) for threads in bench.threads]
        lines += [file_line(bench, "student"), *int8_bytes_lines(bench, "student")]
    return [*lines, *last, *advice_lines(bench), *bench.notes]


def render_markdown(title: str, bench: BenchData) -> str:
    """The report as Markdown: verdict, every percentile, the ledger, where the nodes ran, and the machine."""
    lines = "\n".join(f"- {line}" for line in describe_verdict(bench))
    note = GPU_NOTE if bench.on_gpu else TIMING_NOTE
    sections = [f"# {title}", lines, markdown_table(*overview_table(bench)), note, percentile_table(bench)]
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


def gain_text(bench: BenchData, name: str, threads: int) -> str:
    """What the zeros give an engine, with its interval."""
    return str(bench.speed_of_student(bench.timing(name, threads), bench.grid))


def speed_line(bench: BenchData, name: str, threads: int) -> str:
    """Speed of an engine over the grid, and what it means."""
    timing = bench.timing(name, threads)
    speedup, rounds = bench.speed_of_student(timing, bench.grid), len(timing.rounds[bench.grid[0]])
    sparsity = bench.files[name].sparsity
    assert sparsity is not None, "exported students have a known sparsity"
    share = "zeros"
    if bench.leaves_out and name not in bench.sparse:
        share = "of its matrices left out or zero" if bench.zeros_inside else "of its matrices left out"
    ideal = None
    # The whole of a sparse form is not the zeros' alone: what they give is in the line of its factors.
    if not bench.resized and name not in bench.sparse:
        ideal = math.inf if sparsity == 1 else 1 / (1 - sparsity)
    return (
        f"Speed of {name}, {sparsity:.1%} {share}, {thread_count(threads)}: {speedup} that of the dense teacher on "
        f"{timing.provider}, over {rounds} paired rounds{grid_range(bench, timing)}: "
        f"{meaning(speedup, rounds, ideal)}"
    )


def factor_lines(bench: BenchData, name: str, threads: int) -> list[str]:
    """Where the speed of a sparse form comes from; it is not known if the dense teacher was not timed in its form."""
    factors = split_speed(bench, name, threads)
    if factors is None:
        return [
            f"How much of it is due to the {bench.cause} is not known, {thread_count(threads)}: dense weights were not "
            f"timed in the form {name}."
        ]
    sparsity = bench.files[name].sparsity
    ideal = None if bench.resized or not sparsity or sparsity == 1 else 1 / (1 - sparsity)
    dense = "dense weights"
    if name in bench.shape_forms and factors.shape != 1:
        ideal, dense = 1 / (1 - bench.zeros_inside), "the same shape without zeros inside,"
    rounds = len(bench.timing(name, threads).rounds[bench.grid[0]])
    return [
        f"Where it comes from, {thread_count(threads)}: {factors_text(factors)}. The gain by the {factors.cause} is "
        f"measured against {dense} through the same operators: {factors.zeros_ratio}: "
        f"{meaning(factors.zeros_ratio, rounds, ideal)}"
    ]


def bound_lines(bench: BenchData, name: str) -> list[str]:
    """Say where a ratio is above what zeros can give."""
    if bench.resized:
        return []
    threads = bench.threads[0]
    bound, whole = bound_of_zeros(bench, name), bench.speedup(bench.timing(name, threads), bench.grid)
    reasons = [f"{bound.skipped:.1f}x if every zero were skipped"]
    if bound.ledger is not None:
        reasons.append(f"{bound.ledger:.2f}x by the ledger's bound")
    if bound.measured is not None:
        reasons.append(f"and {bound.measured:.2f}x is what the ledger's matrices gain one by one")
    limits, count = ", ".join(reasons), thread_count(threads)
    lines = []
    if is_above(whole, bound.tightest):
        lines.append(
            f"Above the bound, {count}: {whole.median:.2f}x is more than zeros can give the matrix products "
            f"({limits}); the rest is not sparsity."
        )
    factors = split_speed(bench, name, threads)
    if factors is not None and is_above(factors.zeros_ratio, bound.tightest):
        lines.append(
            f"Above the bound, {count}: even the zeros' {factors.zeros_ratio.median:.2f}x is more than they can give "
            f"({limits}): the form {name} computes dense weights badly, so part of it is not sparsity."
        )
    return lines


def grid_range(bench: BenchData, timing: Timing) -> str:
    """The worst and the best shape of the grid."""
    if len(bench.grid) < 2:
        return ""
    # A mean hides a shape at which the student is slower.
    medians = {str(shape): bench.speed_of_student(timing, [shape]).median for shape in bench.grid}
    speeds = sorted((median, shape) for shape, median in medians.items())
    (lowest, worst), (highest, best) = speeds[0], speeds[-1]
    return f", {lowest:.2f}x at {worst} to {highest:.2f}x at {best}"


def meaning(speedup: Ratio, rounds: int, ideal: float | None) -> str:
    """Say what a ratio means.

    Args:
        ideal: speed-up of the matrix products if every zero were skipped; None if student and
            teacher are different models.
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
        # Without it a reader would take padding that is left out for a gain of the zeros.
        real_share = sum(shape.real) / (shape.batch * shape.length)
        line = f"Padding: at {shape}, where {real_share:.0%} of the tokens are real, {name} has {speeds}"
        factors = split_padded_speed(bench, name, bench.threads[0], shape)
        if factors is not None:
            line += f" ({factors_text(factors)}, {thread_count(bench.threads[0])})"
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


def same_form_line(bench: BenchData, name: str) -> str:
    """Separate what a form (fused, fp16, int8) gives the dense teacher from what the zeros add to it."""
    teacher = bench.pairs[name]

    def form_gain(threads: int) -> str:
        if bench.on_gpu:  # there the form itself may be the 1x
            plain = bench.timing(bench.timings[0].engine.name, threads)
            return str(paired_ratio([plain] * len(bench.grid), bench.timing(teacher, threads), bench.grid))
        return str(bench.speedup(bench.timing(teacher, threads), bench.grid))

    def zeros_gain(threads: int) -> str:
        timings = [bench.timing(teacher, threads)] * len(bench.grid)
        return str(paired_ratio(timings, bench.timing(name, threads), bench.grid))

    dense_bytes, teacher_bytes = bench.files["teacher"].bytes, bench.files[teacher].bytes
    return (
        f"Treatment {name}, which is not sparsity: it gives the dense teacher "
        f"{with_each_thread_count(bench, form_gain)}, and {dense_bytes / teacher_bytes:.2f}x fewer bytes. "
        f"The gain by the {bench.cause}, student against teacher in the same form: "
        f"{with_each_thread_count(bench, zeros_gain)}; "
        f"{teacher_bytes / bench.files[name].bytes:.2f}x fewer bytes."
    )


def other_model_lines(bench: BenchData) -> list[str]:
    """Say that student and teacher are different models, where they are."""
    if not bench.resized:
        return []
    if bench.leaves_out:
        share = bench.files["student"].sparsity or 0.0
        if bench.zeros_inside:
            return [
                f"The student is a smaller model: {share:.1%} of the weights in its matrices were removed as whole "
                f"heads and neurons, or are among the {bench.zeros_inside:.0%} zeros inside of what remains. Its plain "
                "ONNX file does not hold what was removed. Its speed there is not that of zeros."
            ]
        return [
            f"The student is a smaller dense model: {share:.1%} of the weights in its matrices were removed, "
            "as whole heads and neurons. Its plain ONNX file does not hold them. Its speed is not that of zeros."
        ]
    student, teacher = bench.files["student"].size, bench.files["teacher"].size
    among, together = ", zeros among them", "the other model and of its zeros together"
    if not bench.files["student"].sparsity:
        among, together = "", "the other model, which has no zeros"
    return [
        f"The student is another model than the teacher: its matrices hold {student:,} weights{among}, the "
        f"teacher's {teacher:,}. Speed and bytes are those of {together}."
    ]


def advice_lines(bench: BenchData) -> list[str]:
    """Say what would help where the best form of the student is no faster or no smaller."""
    speeds = [bench.speed_of_student(bench.timing(bench.best, threads), bench.grid) for threads in bench.threads]
    advice = []
    if all(speed.median < 1 + SAME_SPEED or speed.low <= 1 for speed in speeds):
        advice.append("for speed, a runtime whose kernels skip zeros, or whole heads, neurons or layers taken out")
    if bench.files["teacher"].bytes / bench.files[bench.best].bytes < 1 + SAME_SIZE:
        advice.append("for size, storage that leaves zeros out, or fewer bits a weight")
    if not advice:
        return []
    return [f"What would help: {'; '.join(advice)}."]


def percentile_table(bench: BenchData) -> str:
    """Every percentile of every engine as a Markdown table."""
    columns = ["engine", "provider", "threads", "shape", "min ms", *(f"p{rank} ms" for rank in PERCENTILES)]
    if bench.on_gpu:
        columns.append("device ms")
    rows: list[list[Cell]] = []
    for record in latency_records(bench):
        percentiles = (record.p50, record.p90, record.p95, record.p99)
        speed = "1x" if record.engine == record.dense else str(record.ratio)
        row: list[Cell] = [record.engine, record.provider, record.threads, record.shape, f"{record.min:.3f}"]
        row += [f"{value:.3f}" for value in percentiles]
        if bench.on_gpu:
            row.append("-" if record.device_p50 is None else f"{record.device_p50:.3f}")
        rows.append([*row, f"{record.rows_per_second:.1f}", speed])
    return markdown_table([*columns, "rows/s", "speed"], rows)


def nodes_text(timing: Timing) -> str:
    """Number of graph nodes by provider."""
    if timing.nodes is None:
        return timing.provider
    return ", ".join(f"{provider} {sum(counts.values())}" for provider, counts in timing.nodes.items())
