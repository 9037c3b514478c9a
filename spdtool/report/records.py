"""Records of the finished stages of a run, and their figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spdtool import console
from spdtool.recipe import PHASES, STAGES
from spdtool.run.folder import Run
from spdtool.run.records import BenchResult, ExportResult, StageRecord, TrainingResult


@dataclass
class RunRecords:
    """Records of the finished stages of a run, and their results by type."""

    stages: dict[str, StageRecord] = field(default_factory=dict)
    training: dict[str, TrainingResult] = field(default_factory=dict)
    export: ExportResult | None = None
    bench: BenchResult | None = None

    @property
    def last_phase(self) -> str | None:
        """The last of the student's phases that is done."""
        for phase in reversed(PHASES):
            if phase in self.training:
                return phase
        return None


@dataclass(frozen=True)
class TextTable:
    """A table with its cells as text; `words` tells which columns are no numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    words: list[bool]


def read_records(run: Run) -> RunRecords:
    """Read the records of all finished stages, in their order.

    Raises:
        Corrupt: a stage's record cannot be read.
    """
    records = RunRecords()
    for stage in STAGES:
        if not run.done(stage):
            continue
        record = run.record(stage)
        records.stages[stage] = record
        match record.result:
            case TrainingResult():
                records.training[stage] = record.result
            case ExportResult():
                records.export = record.result
            case BenchResult():
                records.bench = record.result
    return records


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> TextTable:
    """Return a table for the template, its cells as text."""
    texts = [list(map(console.format_cell, row)) for row in rows]
    words = [not console.is_numeric(column) for column in zip(*texts, strict=True)]
    return TextTable(title, list(columns), texts, words)


def format_score(value: float | None) -> str:
    """Format a score times 100, or return a dash for None."""
    return format_optional(None if value is None else 100 * value, ".2f")


def format_optional(value: float | None, spec: str) -> str:
    """Format a figure, or return a dash for None."""
    return "-" if value is None else format(value, spec)
