"""Why a run folder cannot be used, and what to type then."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool.errors import RunError, SpdError, explain_machine_error
from spdtool.recipe import STAGES
from spdtool.recipe.fields import FieldChange, first_stage_using
from spdtool.recipe.spelling import assign

if TYPE_CHECKING:  # `spdtool --help` imports this module, and must not wait for pydantic
    from spdtool.run.records import DataRecord


def refuse_unusable_path(path: Path, leftovers: Collection[str]) -> None:
    """Raise RunError if no new run can be created at `path`.

    Args:
        leftovers: files that a call which was killed may have left there.
    """
    if path.exists():
        foreign = not path.is_dir() or {file.name for file in path.iterdir()} - set(leftovers)
        if foreign:
            raise RunError(f"{path} exists and is not a run folder", "give another --run")
    # the run folder may be several levels below what exists
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise cannot_create_run(path, f"{existing} may not be written to")


def cannot_create_run(path: Path, reason: str) -> RunError:
    """Return the error of a run folder that cannot be made, for its reason."""
    return RunError(f"no run folder can be made at {path}: {reason}", "give another --run")


def recipe_hint(path: Path, conflicts: list[FieldChange]) -> str:
    """Say what to type where finished stages were made with other values."""
    values = {name: now for name, now, _ in conflicts}
    first = min(map(first_stage_using, values), key=STAGES.index)
    folder = shlex.quote(str(path))
    shared = [name for name in values if name.split(".")[0] not in STAGES]
    if any(first_stage_using(name) == "teacher" for name in shared):
        return f"give another --run; its teacher may be this one: --teacher {shlex.quote(str(path / 'teacher'))}"
    sets = " ".join(f"--set {shlex.quote(assign(name, value))}" for name, value in values.items())
    return f"give another --run, or drop {first} and what follows: `spdtool {first} --run {folder} --again {sets}`"


def describe_data_change(before: DataRecord, now: DataRecord) -> str:
    """Describe how the rows differ: in number, or only in content."""
    there, here = _count_rows(before), _count_rows(now)
    if there != here:
        return f"{there} there, {here} here"
    return f"as many ({here}), but other texts, labels or order (digest {before.digest[:8]}, now {now.digest[:8]})"


def _count_rows(data: DataRecord) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in data.rows.items())


def redo_hint(stage: str, path: Path) -> str:
    """Say what to type to run a stage of the run at `path` again."""
    return f"to redo it and what follows: `spdtool {stage} --run {shlex.quote(str(path))} --again`"


@contextmanager
def explaining_machine_errors() -> Iterator[None]:
    """Raise what the machine ran out of, or does not allow, as an SpdError."""
    try:
        yield
    except SpdError:
        raise
    except Exception as error:
        explained = explain_machine_error(error)
        if explained is None:
            raise
        raise explained from error
