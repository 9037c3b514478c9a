"""Averages of rows: per task, recipe and sparsity over seeds, and per recipe over tasks; as tables and points.

Deviations are of the sample (n - 1), so that one seed has none. Retention (the student's score over
the teacher's) is averaged over the ratios of the seeds, since each seed has its own teacher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spdtool.run.records import StudentRow
from spdtool.sweep.rows import with_intermediate

COLUMNS = ("task", "recipe", "sparsity", "teacher", "student", "kept", "gap teacher", "gap student", "seeds")
BENCH_COLUMNS = ("bytes", "speed")
AVERAGE_COLUMNS = ("recipe", "sparsity", "kept on average", "tasks")
LEGEND = (
    "Scores are dev scores times 100: mean ± sample deviation over seeds. Kept: student over teacher, a mean of the "
    "seeds' own ratios. Gap: score on rows that were trained on, minus the dev score; the larger, the more a model "
    "overfits. A dash: not measured, no deviation with one seed, or nothing to keep of a teacher that is no better "
    "than chance."
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation of `count` values; `deviation` is None for one value, `mean` for none."""

    mean: float | None
    deviation: float | None
    count: int

    def __str__(self) -> str:
        """Return the spread times 100, as scores are read."""
        if not self.count:
            return "-"
        return f"{_hundredfold(self.mean)} ± {_hundredfold(self.deviation)}"


@dataclass(frozen=True)
class Summary:
    """One task, recipe and sparsity over its seeds; `slowness` is time relative to the dense teacher."""

    task: str
    recipe: str
    sparsity: float
    teacher: Spread
    student: Spread
    retention: Spread
    teacher_gap: Spread
    student_gap: Spread
    nonzeros: Spread
    bytes: Spread
    speed: Spread
    slowness: Spread
    teacher_bytes: Spread
    weights: Spread
    failed: int
    stopped: int


@dataclass(frozen=True)
class Average:
    """One recipe and sparsity over its tasks, every task with the same weight."""

    recipe: str
    sparsity: float
    retention: float | None
    tasks: int


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean and sample deviation of the values that are not None."""
    measured = [float(value) for value in values if value is not None]
    if not measured:
        return Spread(None, None, 0)
    deviation = None  # of one value there is none
    if len(measured) > 1:
        deviation = statistics.stdev(measured)
    return Spread(statistics.mean(measured), deviation, len(measured))


def summarise(rows: Iterable[StudentRow]) -> list[Summary]:
    """Average over the seeds of finished rows and of intermediate students, tasks and recipes in their order.

    A row that failed counts as failed, and does not enter a mean. Where a trial was stopped there
    is no mean at all, since that of the others would flatter the recipe.
    """
    groups: dict[tuple[str, str, float], list[StudentRow]] = {}
    for row in with_intermediate(rows):
        if row.status != "unfinished":
            groups.setdefault((row.task, row.label, row.sparsity), []).append(row)
    tasks: dict[str, int] = {}
    labels: dict[str, int] = {}
    for task, label, _ in groups:
        tasks.setdefault(task, len(tasks))
        labels.setdefault(label, len(labels))
    # tasks and recipes as they were asked for, sparsities by their size
    ordered = sorted(groups, key=lambda key: (tasks[key[0]], labels[key[1]], key[2]))
    return [_summarise_group(*key, groups[key]) for key in ordered]


def averages(summaries: Sequence[Summary]) -> list[Average]:
    """Average the retention of each recipe and sparsity over tasks."""
    groups: dict[tuple[str, float], list[float | None]] = {}
    for summary in summaries:
        groups.setdefault((summary.recipe, summary.sparsity), []).append(summary.retention.mean)
    over_tasks = []
    for (recipe, sparsity), retentions in groups.items():
        average = spread(retentions)
        over_tasks.append(Average(recipe, sparsity, average.mean, average.count))
    return over_tasks


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the comparison; bytes and speed only where something was benched."""
    benched = any(summary.bytes.count for summary in summaries)
    columns = list(COLUMNS)
    if benched:
        columns += BENCH_COLUMNS
    return columns, [_table_row(summary, benched) for summary in summaries]


def averages_table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of what each recipe keeps on average over tasks."""
    rows = []
    for average in averages(summaries):
        rows.append([average.recipe, f"{average.sparsity:g}", _percent(average.retention), str(average.tasks)])
    return list(AVERAGE_COLUMNS), rows


def failures(rows: Iterable[StudentRow]) -> list[str]:
    """Return one line for each run that failed, or was stopped."""
    return [describe_row(row) for row in rows if row.status in ("failed", "stopped")]


def row_name(row: StudentRow) -> str:
    """Return the name of a run in lines of text."""
    return f"{row.task} {row.label} {row.sparsity:g} seed {row.seed}"


def describe_row(row: StudentRow) -> str:
    """Describe one run on one line."""
    if row.status in ("failed", "stopped"):
        return f"{row_name(row)}: {row.status}: {row.error}"
    scores = f"teacher {_hundredfold(row.teacher)}, student {_hundredfold(row.student)}"
    relative = f"{_percent(row.retention)} kept"
    if row.teacher is not None and not row.has_learned_teacher:
        relative = "nothing to keep: the teacher is no better than chance"
    if row.student_gap is not None:
        relative += f", gap {_hundredfold(row.student_gap)}"
    line = f"{row_name(row)}: {scores} ({relative})"
    if row.seconds is not None:
        line += f"; {row.seconds:,.0f} s"
    return line


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the `(cost, score)` points that no other matches at less cost or beats at the same, cheapest first."""
    best: list[tuple[float, float]] = []
    # cheapest first, and of equal costs the best score first: a point is on the front if it beats
    # all before it
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def markdown(title: str, rows: Sequence[StudentRow]) -> str:
    """Return the comparison as Markdown: the tables, what failed, and how to read them."""
    summaries = summarise(rows)
    sections = [f"# {title}", _markdown_table(*table(summaries)), LEGEND]
    if summaries:
        sections += ["## Average over tasks", _markdown_table(*averages_table(summaries))]
    failed = failures(rows)
    if failed:
        sections += ["## Failed or stopped", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(sections) + "\n"


def _summarise_group(task: str, recipe: str, sparsity: float, rows: Sequence[StudentRow]) -> Summary:
    by_status: dict[str, list[StudentRow]] = {"done": [], "failed": [], "stopped": []}
    for row in rows:
        by_status[row.status].append(row)
    done = by_status["done"]
    if by_status["stopped"]:  # only a bad seed is stopped: the mean of the others would flatter
        done = []

    def over_seeds(value: Callable[[StudentRow], float | None]) -> Spread:
        return spread(value(row) for row in done)

    return Summary(
        task,
        recipe,
        sparsity,
        teacher=over_seeds(lambda row: row.teacher),
        student=over_seeds(lambda row: row.student),
        retention=over_seeds(lambda row: row.retention),
        teacher_gap=over_seeds(lambda row: row.teacher_gap),
        student_gap=over_seeds(lambda row: row.student_gap),
        nonzeros=over_seeds(lambda row: row.nonzeros),
        bytes=over_seeds(lambda row: row.bytes),
        speed=over_seeds(lambda row: row.speed),
        slowness=over_seeds(lambda row: 1 / row.speed if row.speed else None),
        teacher_bytes=over_seeds(lambda row: row.teacher_bytes),
        weights=over_seeds(lambda row: row.weights),
        failed=len(by_status["failed"]),
        stopped=len(by_status["stopped"]),
    )


def _table_row(summary: Summary, benched: bool) -> list[str]:
    seeds = str(summary.student.count)
    lost = []
    for count, status in ((summary.failed, "failed"), (summary.stopped, "stopped")):
        if count:
            lost.append(f"{count} {status}")
    if lost:
        seeds += f" ({', '.join(lost)})"
    row = [summary.task, summary.recipe, f"{summary.sparsity:g}", str(summary.teacher), str(summary.student)]
    row += [_percent(summary.retention.mean), _hundredfold(summary.teacher_gap.mean)]
    row += [_hundredfold(summary.student_gap.mean), seeds]
    if benched:
        size, speed = summary.bytes.mean, summary.speed.mean
        row += ["-" if size is None else f"{size:,.0f}", "-" if speed is None else f"{speed:.2f}x"]
    return row


def _hundredfold(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells in (columns, ["---"] * len(columns), *rows):
        # a bar inside a cell would begin another one
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)
