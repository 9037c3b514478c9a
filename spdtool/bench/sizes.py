"""Sentences about files: how much smaller a form is, why, what rounding cost, and how dense int8 compares."""

from __future__ import annotations

from spdtool.bench.ratios import BenchData, ModelFile, paired_ratio

SAME_SIZE = 0.01
STUDENT_IN = "student in"  # start of the name of an engine on a GPU: the student in the form of a dense row
DENSE_INT8 = (
    "int8",
    "onnx-int8 teacher",
    "openvino int8",
)  # engines of the dense teacher in int8, the rivals of a sparse form


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


def rival_lines(bench: BenchData) -> list[str]:
    """Compare the student's best form with the fastest dense rows whose score passes; on a GPU they are the 1x."""
    lines = []
    for threads in bench.threads:
        ratio = bench.speed_over_rivals(bench.timing(bench.best, threads))
        if ratio is None:
            continue
        fastest: dict[str, list[str]] = {}
        for shape in bench.grid:
            rival = bench.fastest_rival(threads, shape)
            assert rival is not None, "the ratio is of the same rows"
            fastest.setdefault(rival.engine.name, []).append(str(shape))
        names = "; ".join(f"{name} at {', '.join(shapes)}" for name, shapes in fastest.items())
        subject = "1x is the fastest dense row" if bench.on_gpu else "Fastest dense row"
        line = f"{subject} whose score passes, {thread_count(threads)}: {names}. "
        line += f"Against it {bench.best} runs at {ratio}."
        untimed = [name for name in fastest if f"{STUDENT_IN} {name}" not in bench.engines]
        untimed = [name for name in untimed if name not in bench.pairs.values()]
        if bench.on_gpu and untimed:
            line += f" The student was not timed in the form {' or '.join(untimed)}."
        lines.append(line)
    return lines


def thread_count(count: int) -> str:
    """A number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def int8_bytes_lines(bench: BenchData, name: str) -> list[str]:
    """Compare the bytes of a sparse form with those of the dense teacher in int8, timed or not."""
    lines = []
    for rival in DENSE_INT8:
        file = bench.files.get(rival)
        if file is None:
            continue
        ratio = file.bytes / bench.files[name].bytes
        times = f"{ratio:.2f}x smaller than" if ratio >= 1 else f"{1 / ratio:.2f}x larger than"
        lines.append(f"Against dense int8: {name} is {times} the teacher in {rival.split()[0]}, {file.bytes:,} bytes.")
    return lines
