"""Rows become averages: per task, recipe and sparsity over seeds, and per recipe over tasks; as tables and points.

Deviations are of the sample (n - 1), so that one seed has none. What was kept is averaged over the seeds' own ratios,
since each seed has its own teacher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spdtool.run.records import StudentRow
from spdtool.sweep.rows import with_intermediate

COLUMNS = ("task", "recipe", "sparsity", "teacher", "student", "kept", "gap teacher", "gap student", "seeds")
BENCHED = ("bytes", "speed")
AVERAGED = ("recipe", "sparsity", "kept on average", "tasks")
LEGEND = (
    "Scores are dev scores times 100: mean ± sample deviation over seeds. Kept: student over teacher, a mean of the "
    "seeds' own ratios. Gap: score on rows that were trained on, minus the dev score; the larger, the more a model "
    "overfits. A dash: not measured, or no deviation with one seed."
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation of `count` values; `deviation` is None for one value, `mean` for none."""

    mean: float | None
    deviation: float | None
    count: int

    def __str__(self) -> str:
        """Times 100, as scores are read."""
        return f"{_hundredfold(self.mean)} ± {_hundredfold(self.deviation)}" if self.count else "-"


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


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample deviation of the values that are known."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return Spread(None, None, 0)
    return Spread(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def summarise(rows: Iterable[StudentRow]) -> list[Summary]:
    """Averages over the seeds of the finished rows, and of the students left on the way, tasks and recipes in order.

    A row that failed counts as failed, and is no part of a mean. Where one was stopped as hopeless there is no mean at
    all, since that of the others would flatter the recipe.
    """
    groups: dict[tuple[str, str, float], list[StudentRow]] = {}
    for row in with_intermediate(rows):
        if row.status in ("done", "failed", "stopped"):
            groups.setdefault((row.task, row.label, row.sparsity), []).append(row)
    tasks, labels = ([*dict.fromkeys(key[part] for key in groups)] for part in (0, 1))
    ordered = sorted(groups, key=lambda key: (tasks.index(key[0]), labels.index(key[1]), key[2]))
    return [_summary(key, groups[key]) for key in ordered]


def averages(summaries: Sequence[Summary]) -> list[tuple[str, float, float | None, int]]:
    """`(recipe, sparsity, share kept on average over tasks, number of tasks)`."""
    groups: dict[tuple[str, float], list[Spread]] = {}
    for summary in summaries:
        groups.setdefault((summary.recipe, summary.sparsity), []).append(summary.retention)
    found = []
    for (recipe, sparsity), kept in groups.items():
        over = spread(each.mean for each in kept)
        found.append((recipe, sparsity, over.mean, over.count))
    return found


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the comparison; bytes and speed only where something was benched."""
    benched = any(summary.bytes.count for summary in summaries)
    return [*COLUMNS, *(BENCHED if benched else ())], [_cells(summary, benched) for summary in summaries]


def averages_table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of what each recipe keeps on average over tasks."""
    rows = [[recipe, f"{sparsity:g}", _percent(kept), count] for recipe, sparsity, kept, count in averages(summaries)]
    return list(AVERAGED), rows


def failures(rows: Iterable[StudentRow]) -> list[str]:
    """One line for each run that failed, or was stopped."""
    return [f"{name(row)}: {row.status}: {row.error}" for row in rows if row.status in ("failed", "stopped")]


def name(row: StudentRow) -> str:
    """A run as lines name it."""
    return f"{row.task} {row.label} {row.sparsity:g} seed {row.seed}"


def line(row: StudentRow) -> str:
    """One run on one line."""
    if row.status in ("failed", "stopped"):
        return f"{name(row)}: {row.status}: {row.error}"
    gap = "" if row.student_gap is None else f", gap {_hundredfold(row.student_gap)}"
    seconds = "" if row.seconds is None else f"; {row.seconds:,.0f} s"
    scores = f"teacher {_hundredfold(row.teacher)}, student {_hundredfold(row.student)}"
    return f"{name(row)}: {scores} ({_percent(row.retention)} kept{gap}){seconds}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The `(cost, score)` points that no other point matches at less cost, or betters at the same; cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def markdown(title: str, rows: Sequence[StudentRow]) -> str:
    """The comparison as Markdown: the tables, what failed, and how to read them."""
    summaries = summarise(rows)
    parts = [f"# {title}", _markdown_table(*table(summaries)), LEGEND]
    parts += ["## Average over tasks", _markdown_table(*averages_table(summaries))] if summaries else []
    failed = failures(rows)
    parts += ["## Failed or stopped", "\n".join(f"- {each}" for each in failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def _summary(key: tuple[str, str, float], rows: Sequence[StudentRow]) -> Summary:
    failed, stopped = (sum(row.status == status for row in rows) for status in ("failed", "stopped"))
    done = [] if stopped else [row for row in rows if row.status == "done"]

    def over(value: Callable[[StudentRow], float | None]) -> Spread:
        return spread(map(value, done))

    return Summary(
        *key,
        teacher=over(lambda row: row.teacher),
        student=over(lambda row: row.student),
        retention=over(lambda row: row.retention),
        teacher_gap=over(lambda row: row.teacher_gap),
        student_gap=over(lambda row: row.student_gap),
        nonzeros=over(lambda row: row.nonzeros),
        bytes=over(lambda row: row.bytes),
        speed=over(lambda row: row.speed),
        slowness=over(lambda row: 1 / row.speed if row.speed else None),
        teacher_bytes=over(lambda row: row.teacher_bytes),
        weights=over(lambda row: row.weights),
        failed=failed,
        stopped=stopped,
    )


def _cells(summary: Summary, benched: bool) -> list[Any]:
    cells: list[Any] = [summary.task, summary.recipe, f"{summary.sparsity:g}", summary.teacher, summary.student]
    cells += [_percent(summary.retention.mean), _hundredfold(summary.teacher_gap.mean)]
    cells += [_hundredfold(summary.student_gap.mean)]
    lost = [f"{count} {how}" for count, how in ((summary.failed, "failed"), (summary.stopped, "stopped")) if count]
    cells += [f"{summary.student.count}" + (f" ({', '.join(lost)})" if lost else "")]
    if benched:
        size, speed = summary.bytes.mean, summary.speed.mean
        cells += ["-" if size is None else f"{size:,.0f}", "-" if speed is None else f"{speed:.2f}x"]
    return [str(cell) for cell in cells]


def _hundredfold(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
