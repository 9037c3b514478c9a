"""Run the trials of a sweep, and write their rows after each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from spdtool import console
from spdtool.errors import SpdError
from spdtool.run.folder import Run
from spdtool.run.records import StudentRow, SweepRecord
from spdtool.run.storage import write_json, write_text
from spdtool.stages.api import compress
from spdtool.sweep import summary
from spdtool.sweep.rows import row_of_recipe, row_of_run
from spdtool.sweep.trials import Trial, is_finished, teacher_recipe, trial_recipe

RESULT = "sweep.json"

TrialRunner = Callable[[Sequence[Trial]], Iterator[tuple[int, StudentRow]]]
"""Runs trials in whatever order; yields the index and the row of each as it ends."""


def train_teacher(trial: Trial) -> Path:
    """Fine-tune the teacher that `trial` shares, unless that is done; return its checkpoint. Raises SpdError."""
    run = Run.for_recipe(trial.teacher_folder, teacher_recipe(trial))
    if not run.done("teacher"):
        compress(recipe=run.recipe, run=run.path, until="teacher")
    return run.path / "teacher"


def run_trial(trial: Trial) -> StudentRow:
    """Do what `trial` still lacks, its teacher included; return its row, in which an SpdError stands as a message."""
    recipe = trial_recipe(trial)
    try:
        train_teacher(trial)
        run = Run.for_recipe(trial.folder, recipe)
        if not is_finished(trial):  # planning alone would read the data of every finished trial again
            compressed = compress(recipe=recipe, run=trial.folder, until=trial.stages[-1])
            if compressed.refusal is not None:
                raise compressed.refusal
        return _make_relative(row_of_run(run), trial)
    except SpdError as error:
        return failed_row(trial, f"{type(error).__name__}: {error.message}")


def unmeasured_row(trial: Trial) -> StudentRow:
    """Return the row of `trial` before anything was measured."""
    return _make_relative(row_of_recipe(trial_recipe(trial), trial.folder), trial)


def failed_row(trial: Trial, error: str) -> StudentRow:
    """Return the row of a trial that failed."""
    row = unmeasured_row(trial)
    row.status, row.error = "failed", error
    return row


def run_in_turn(trials: Sequence[Trial]) -> Iterator[tuple[int, StudentRow]]:
    """Run one trial after the other in this process; yield the index of each and its row."""
    for index, trial in enumerate(trials):
        with console.quiet():  # ends before the row is yielded, and printed
            row = run_trial(trial)
        yield index, row


def run_sweep(
    trials: Sequence[Trial], out: Path, on_line: Callable[[str], None], runner: TrialRunner = run_in_turn
) -> list[StudentRow]:
    """Run the trials, write the results after each, and return the rows in the order of the trials.

    Args:
        on_line: is called with one line for each trial, with what remains.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [unmeasured_row(trial) for trial in trials]
    unfinished = {index for index, trial in enumerate(trials) if not is_finished(trial)}
    open_at_start, started = len(unfinished), time.monotonic()
    for count, (index, row) in enumerate(runner(trials), start=1):
        rows[index] = row
        write_results(rows, out)  # after each, so that a killed sweep has a table
        unfinished.discard(index)
        trained = open_at_start - len(unfinished)  # trials of earlier sessions took no time now
        seconds_each = (time.monotonic() - started) / max(trained, 1)
        remaining = _describe_remaining(len(trials) - count, len(unfinished), seconds_each)
        on_line(f"[{count}/{len(trials)}] {summary.describe_row(row)}{remaining}")
    return rows


def write_results(rows: Sequence[StudentRow], out: Path) -> None:
    """Write `sweep.json` and `sweep.md`."""
    title = "Sweep"
    if any(row.smoke for row in rows):
        title = "SMOKE SWEEP, NO RESULT"
    write_json(out / RESULT, SweepRecord(spdtool=metadata.version("spdtool"), rows=list(rows)))
    write_text(out / "sweep.md", summary.markdown(title, rows))


def _make_relative(row: StudentRow, trial: Trial) -> StudentRow:
    """Make the folders of the row relative to the sweep's, so that the sweep can be moved."""
    for each in (row, *row.students):
        each.run = os.path.relpath(each.run, trial.out)
        each.task = trial.task
    return row


def _describe_remaining(trials: int, unfinished: int, seconds_each: float) -> str:
    """Say how many trials remain, and for about how long."""
    if not trials:
        return ""
    if not unfinished:
        return f"; {trials} left, all done before"
    minutes = round(unfinished * seconds_each / 60)
    if minutes < 60:
        return f"; {trials} left, about {max(1, minutes)} min"
    return f"; {trials} left, about {minutes // 60} h {minutes % 60} min"
