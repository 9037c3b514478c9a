"""Sweeps: recipes x sparsities x seeds x tasks, every trial an ordinary run folder, every recipe with the same teacher.

    OUT/<task>/teacher-seed<n>/               one teacher for each task and seed, fine-tuned once
    OUT/<task>/<recipe>-<sparsity>-seed<n>/   a trial: a run whose given teacher is that one
    OUT/sweep.json  sweep.md  pareto-*.png    all rows, their averages, score against what it costs

A finished stage is skipped and a killed one resumes, so that the same command goes on with a sweep. `run_trial` is a
function of its trial alone, and of the folder; `cluster.py` has Ray run many at once, on machines that see the folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from spdtool import console, stages
from spdtool.data.dataset import find_dataset, plain_name
from spdtool.errors import RecipeError, SpdError
from spdtool.recipe import PHASES, STAGES, TRAINING
from spdtool.recipe import reading as recipe
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run, write_json
from spdtool.run.records import StudentRow, SweepRecord
from spdtool.sweep import summary
from spdtool.sweep.rows import row_of_recipe, row_of_run

RESULT = "sweep.json"
DECIDED = ("task", "data", "model", "sparsity", "seed", "given_teacher", "name")  # by the sweep, so not by --set


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        recipe: name or TOML file. out: folder of the sweep. sets: `--set` assignments for every recipe and the teacher.
        epochs: sum over the student's phases that the recipe is scaled to; None: as the recipe says.
        bench: also export and time it.
    """

    task: str
    recipe: str
    sparsity: float
    seed: int
    out: str
    data: str | None = None
    model: str | None = None
    sets: tuple[str, ...] = ()
    epochs: float | None = None
    bench: bool = False

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.out) / self.task / f"{Path(self.recipe).stem}-{self.sparsity:g}-seed{self.seed}"

    @property
    def teacher_folder(self) -> Path:
        """The run folder of the teacher that it shares with the other recipes."""
        return Path(self.out) / self.task / f"teacher-seed{self.seed}"


Perform = Callable[[Sequence[Trial]], Iterator[tuple[int, StudentRow]]]


def plan(
    *,
    recipes: Iterable[str],
    sparsities: Iterable[float],
    seeds: Iterable[int],
    tasks: Iterable[str],
    out: Path,
    data: str | None = None,
    model: str | None = None,
    sets: Sequence[str] = (),
    epochs: float | None = None,
    bench: bool = False,
) -> list[Trial]:
    """The trials of a sweep, those that share a teacher one after the other; nothing is written.

    Args:
        data: a folder that holds a folder for each task, or `task=path,...`.

    Raises:
        RecipeError: an unknown recipe, task or field, or one that the sweep decides itself.
        RunMismatch: a finished stage of a trial or of a teacher was made by another recipe.
    """
    _refuse_decided(sets)
    named = [_absolute(name) if name not in recipe.recipe_names() else name for name in dict.fromkeys(recipes)]
    _refuse_namesakes(named)
    wanted = list(dict.fromkeys(name.lower() for name in tasks))
    places = data_of(data, wanted)
    shared = {"out": os.path.abspath(out), "model": model and _absolute(model), "sets": tuple(sets)}
    trials = [
        Trial(task, name, sparsity, seed, data=places[task], epochs=epochs, bench=bench, **shared)  # type: ignore[arg-type]
        for task in wanted
        for seed in dict.fromkeys(seeds)
        for name in named
        for sparsity in dict.fromkeys(sparsities)
    ]
    for trial in trials:
        _check(trial)
    return trials


def data_of(text: str | None, wanted: Sequence[str]) -> dict[str, str | None]:
    """Where the rows of each wanted task lie: one folder for all of them, or `task=path,...`; None: the hub.

    Raises:
        RecipeError: `text` names a task that is not in the sweep.
    """
    if text is None or "=" not in text or os.path.exists(text):
        return dict.fromkeys(wanted, text and _absolute(text))
    found: dict[str, str | None] = dict.fromkeys(wanted)
    for name, _, path in (pair.partition("=") for pair in text.split(",")):
        task = next((task for task in wanted if plain_name(task) == plain_name(name.strip())), None)
        if task is None or not path.strip():
            raise RecipeError(
                f"--data {name!r} is none of the sweep's tasks with its path: {', '.join(wanted)}",
                "--data cola=FOLDER,sst2=FOLDER, or one folder that holds a folder for each",
            )
        found[task] = _absolute(path.strip())
    return found


def teacher_recipe(trial: Trial) -> Recipe:
    """The recipe of the teacher that `trial` shares: that of the task and the sweep's `--set`s, not of its recipe."""
    return recipe.build_recipe("default", _flags(trial), trial.sets)


def trial_recipe(trial: Trial) -> Recipe:
    """The recipe of `trial`, with the shared teacher as the given one, and its epochs scaled."""
    flags = {"sparsity": trial.sparsity, "given_teacher": str(trial.teacher_folder / "teacher")}
    chosen = recipe.build_recipe(trial.recipe, _flags(trial) | flags, trial.sets)
    return chosen if trial.epochs is None else scaled(chosen, trial.epochs)


def scaled(chosen: Recipe, total: float) -> Recipe:
    """`chosen` with phases of `total` epochs together, in its own proportions of prune, distill and finetune.

    Where a recipe leaves its epochs to the number of rows, the steps that its phases aim at are their proportions.

    Raises:
        RecipeError: some phases have epochs and others steps, which no proportion can join, or all have none.
    """
    sections = {phase: getattr(chosen, phase) for phase in PHASES}
    given = [section.epochs for section in sections.values() if section.epochs]
    open_ = [section for section in sections.values() if section.epochs is None]
    if (given and open_) or not (given or open_):
        raise RecipeError(
            f"--epochs cannot scale recipe {chosen.name!r}: "
            + ("some of its phases have epochs and others have none" if given else "all its phases have no epochs"),
            f"give each a number: {' '.join(f'--set {phase}.epochs=1' for phase in PHASES)}",
        )
    shares = {phase: section.steps if open_ and section.epochs is None else section.epochs or 0
              for phase, section in sections.items()}  # fmt: skip
    whole = sum(shares.values())
    return recipe.override(chosen, [f"{phase}.epochs={total * share / whole!r}" for phase, share in shares.items()])


def make_teacher(trial: Trial) -> Path:
    """Fine-tune the teacher that `trial` shares, unless that is done; return its checkpoint. Raises SpdError."""
    run = Run.at(trial.teacher_folder, teacher_recipe(trial))
    if not run.done("teacher"):
        stages.run_stage(run, "teacher")
    return run.path / "teacher"


def run_trial(trial: Trial) -> StudentRow:
    """Do what `trial` still lacks, its teacher included; return its row, in which an SpdError stands as a message."""
    chosen = trial_recipe(trial)
    try:
        make_teacher(trial)
        run = Run.at(trial.folder, chosen)
        for stage in STAGES if trial.bench else TRAINING:
            if not run.done(stage):
                stages.run_stage(run, stage)
        return _relative(row_of_run(run), trial)
    except SpdError as error:
        reason = f"{type(error).__name__}: {error.message}"
        return blank(trial).model_copy(update={"status": "failed", "error": reason})


def blank(trial: Trial) -> StudentRow:
    """The row of `trial` before anything was measured."""
    return _relative(row_of_recipe(trial_recipe(trial), trial.folder), trial)


def finished(trial: Trial) -> bool:
    """Whether nothing is left to do for `trial`."""
    run = Run(trial.folder, trial_recipe(trial))
    return all(run.done(stage) for stage in (STAGES if trial.bench else TRAINING))


def in_turn(trials: Sequence[Trial]) -> Iterator[tuple[int, StudentRow]]:
    """Run one trial after the other in this process; yields the number of each and its row."""
    for index, trial in enumerate(trials):
        with console.quiet():  # left before the row is told
            row = run_trial(trial)
        yield index, row


def run_sweep(
    trials: Sequence[Trial], out: Path, tell: Callable[[str], None], perform: Perform = in_turn
) -> list[StudentRow]:
    """Run the trials, write the results after each, and return the rows in the order of the trials.

    Args:
        tell: is given one line for each trial, with what is left.
        perform: runs the trials, in whatever order, and yields what comes of each.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [blank(trial) for trial in trials]
    fresh = [not finished(trial) for trial in trials]
    made, started = 0, time.monotonic()
    for count, (index, row) in enumerate(perform(trials), start=1):
        rows[index] = row
        write(rows, out)
        made += fresh[index]
        left = _left(len(trials) - count, sum(fresh) - made, (time.monotonic() - started) / max(made, 1))
        tell(f"[{count}/{len(trials)}] {summary.line(row)}{left}")
    draw(rows, out)
    return rows


def write(rows: Sequence[StudentRow], out: Path) -> None:
    """Write `sweep.json` and `sweep.md`."""
    titled = "SMOKE SWEEP, NO RESULT" if any(row.smoke for row in rows) else "Sweep"
    write_json(out / RESULT, SweepRecord(spdtool=metadata.version("spdtool"), rows=list(rows)))
    (out / "sweep.md").write_text(summary.markdown(titled, rows), "utf-8")


def draw(rows: Sequence[StudentRow], out: Path) -> list[Path]:
    """Write the Pareto plots, as far as something was measured; return their files."""
    from spdtool.report import drawing
    from spdtool.report import figures as plots

    drawn = []
    for name, figure in plots.pareto_figures(summary.summarise(rows)):
        drawn.append(drawing.png(figure, out / f"{name}.png"))
    return drawn


def _check(trial: Trial) -> None:
    """Raise now what would stop the trial: a wrong setting, an unknown task, a folder of another recipe."""
    chosen = trial_recipe(trial)
    find_dataset(chosen)
    Run.at(trial.teacher_folder, teacher_recipe(trial), dry=True)
    Run.at(trial.folder, chosen, dry=True)


def _flags(trial: Trial) -> dict[str, Any]:
    return {"task": trial.task, "data": trial.data, "model": trial.model, "seed": trial.seed}


def _refuse_decided(sets: Sequence[str]) -> None:
    for assignment in sets:
        field = assignment.split("=")[0].strip()
        if field in DECIDED:
            raise RecipeError(f"--set {assignment}: a sweep decides {field!r} for each of its trials", "leave it out")


def _refuse_namesakes(recipes: Sequence[str]) -> None:
    stems = [Path(name).stem for name in recipes]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise RecipeError(f"two recipes are called {twice[0]!r}, and would share their folders", "rename one of them")


def _absolute(path: str) -> str:
    """An existing path made absolute, since trials may run elsewhere; a name as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def _relative(row: StudentRow, trial: Trial) -> StudentRow:
    """The row with its folders seen from the sweep's, so that the sweep can be moved."""
    for each in (row, *row.students):
        each.run = os.path.relpath(each.run, trial.out)
    row.task = trial.task
    return row


def _left(trials: int, to_do: int, seconds: float) -> str:
    if not trials:
        return ""
    return f"; {trials} left" + (f", about {_duration(to_do * seconds)}" if to_do else ", all done before")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"
