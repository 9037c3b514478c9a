"""The commands that make a run again, from its recipe: flags where there are some, `--set` for every other field."""

from __future__ import annotations

import shlex
from pathlib import Path

from spdtool.errors import SpdError
from spdtool.recipe import STAGES
from spdtool.recipe.spelling import recipe_options
from spdtool.run.folder import Run
from spdtool.sweep.rows import teacher_folder


def commands_of(run: Run) -> list[str]:
    """Return what to type to make the run again, after that of its teacher's run, as far as both are finished."""
    commands: list[str] = []
    given = run.recipe.given_teacher
    if given:
        teacher_run = Path(given)
        if run.done("teacher"):
            teacher_run = teacher_folder(run).parent
        if (teacher_run / "run.json").is_file():
            commands += _stage_commands(Run.open(teacher_run))
    return commands + _stage_commands(run)


def _stage_commands(run: Run) -> list[str]:
    """Return `compress` for a run with every stage, else a command for each stage that it has."""
    finished = [stage for stage in STAGES if run.done(stage)]
    try:
        options = shlex.join([*recipe_options(run.recipe), "--run", str(run.path)])
    except SpdError as error:
        return [f"# run.json holds the recipe, which this version cannot spell: {error.message}"]
    if len(finished) == len(STAGES) or not finished:
        return [f"spdtool compress {options}"]
    further = [f"spdtool {stage} --run {shlex.quote(str(run.path))}" for stage in finished[1:]]
    return [f"spdtool teacher {options}", *further]
