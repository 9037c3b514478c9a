"""The trials of a sweep: which there are, and the recipe of each and of the teacher that it shares."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spdtool.data.dataset import find_dataset, plain_name
from spdtool.errors import RecipeError
from spdtool.recipe import PHASES, STAGES, TRAINING, reading
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run

DECIDED = ("task", "data", "model", "sparsity", "seed", "given_teacher", "name")  # by the sweep, so not by --set


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        recipe: name or TOML file. out: folder of the sweep. sets: `--set` assignments for every
            recipe and the teacher.
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
        """Run folder of the trial."""
        return Path(self.out) / self.task / f"{Path(self.recipe).stem}-{self.sparsity:g}-seed{self.seed}"

    @property
    def teacher_folder(self) -> Path:
        """Run folder of the teacher that it shares with the other recipes."""
        return Path(self.out) / self.task / f"teacher-seed{self.seed}"

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the trial."""
        return STAGES if self.bench else TRAINING


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep compares: every recipe at every sparsity with every seed, on every task.

    Attributes:
        data: a folder that holds a folder for each task, or `task=path,...`.
        sets, epochs, bench: of every trial, see `Trial`.
    """

    recipes: Sequence[str]
    sparsities: Sequence[float]
    seeds: Sequence[int]
    tasks: Sequence[str]
    out: Path
    data: str | None = None
    model: str | None = None
    sets: Sequence[str] = ()
    epochs: float | None = None
    bench: bool = False


def plan_trials(sweep: Sweep) -> list[Trial]:
    """Return the trials of a sweep, those that share a teacher one after the other; nothing is written.

    Raises:
        RecipeError: an unknown recipe, task or field, or one that the sweep decides itself.
        RunMismatch: a finished stage of a trial or of a teacher was made by another recipe.
    """
    _refuse_decided(sweep.sets)
    recipe_names = _find_recipes(sweep.recipes)
    task_names = list(dict.fromkeys(name.lower() for name in sweep.tasks))
    data_paths = data_by_task(sweep.data, task_names)
    sparsities = tuple(dict.fromkeys(sweep.sparsities))
    trials = []
    for task in task_names:
        for seed in dict.fromkeys(sweep.seeds):
            for recipe in recipe_names:  # inside a seed: trials that share a teacher follow it
                for sparsity in sparsities:
                    trial = Trial(
                        task,
                        recipe,
                        sparsity,
                        seed,
                        # Trials on Ray run in another folder.
                        out=os.path.abspath(sweep.out),
                        data=data_paths[task],
                        model=sweep.model and _make_absolute(sweep.model),
                        sets=tuple(sweep.sets),
                        epochs=sweep.epochs,
                        bench=sweep.bench,
                    )
                    _check(trial)
                    trials.append(trial)
    return trials


def data_by_task(text: str | None, tasks: Sequence[str]) -> dict[str, str | None]:
    """Return the path of each task's rows: one folder for all of them, or `task=path,...`; None: the hub.

    Raises:
        RecipeError: `text` names a task that is not in the sweep.
    """
    if text is None or "=" not in text or os.path.exists(text):
        return dict.fromkeys(tasks, text and _make_absolute(text))
    paths: dict[str, str | None] = dict.fromkeys(tasks)
    for pair in text.split(","):
        name, _, path = pair.partition("=")
        matching = [task for task in tasks if plain_name(task) == plain_name(name.strip())]
        if not matching or not path.strip():
            raise RecipeError(
                f"--data {name!r} is none of the sweep's tasks with its path: {', '.join(tasks)}",
                "--data cola=FOLDER,sst2=FOLDER, or one folder that holds a folder for each",
            )
        paths[matching[0]] = _make_absolute(path.strip())
    return paths


def teacher_recipe(trial: Trial) -> Recipe:
    """Return the recipe of the teacher that `trial` shares: of the task and the `--set`s, not of the trial's recipe."""
    # the same for every recipe of the sweep, so that they are compared with one teacher
    return reading.build_recipe("default", _flags(trial), trial.sets)


def trial_recipe(trial: Trial) -> Recipe:
    """Return the recipe of `trial`, with the shared teacher as the given one, and its epochs scaled."""
    flags = {"sparsity": trial.sparsity, "given_teacher": str(trial.teacher_folder / "teacher")}
    recipe = reading.build_recipe(trial.recipe, _flags(trial) | flags, trial.sets)
    if trial.epochs is None:
        return recipe
    return scale_epochs(recipe, trial.epochs)


def scale_epochs(recipe: Recipe, total: float) -> Recipe:
    """Return `recipe` with phases of `total` epochs together, in the proportions of its phases.

    Where a recipe leaves its epochs to the number of rows, the steps that its phases aim at are their proportions.

    Raises:
        RecipeError: some phases have epochs and others steps, which no proportion can join, or all have none.
    """
    weights = {}
    with_epochs = without_epochs = 0
    for phase in PHASES:
        section = getattr(recipe, phase)
        if section.epochs is None:
            without_epochs += 1
            weights[phase] = section.steps
        else:
            with_epochs += section.epochs > 0  # a phase of 0 epochs is left out, and fits to both
            weights[phase] = section.epochs
    if bool(with_epochs) == bool(without_epochs):
        reason = "all its phases have no epochs"
        if with_epochs:
            reason = "some of its phases have epochs and others have none"
        raise RecipeError(
            f"--epochs cannot scale recipe {recipe.name!r}: {reason}",
            f"give each a number: {' '.join(f'--set {phase}.epochs=1' for phase in PHASES)}",
        )
    whole = sum(weights.values())
    sets = []
    for phase, weight in weights.items():
        sets.append(f"{phase}.epochs={total * weight / whole!r}")  # repr keeps every bit of a float
    return reading.override(recipe, sets)


def is_finished(trial: Trial) -> bool:
    """Return whether nothing remains to do for `trial`."""
    run = Run(trial.folder, trial_recipe(trial))
    return all(run.done(stage) for stage in trial.stages)


def _check(trial: Trial) -> None:
    """Raise now what would stop the trial: a wrong setting, an unknown task, a folder of another recipe."""
    recipe = trial_recipe(trial)
    find_dataset(recipe)  # raises for an unknown task
    Run.for_recipe(trial.teacher_folder, teacher_recipe(trial), dry=True)
    Run.for_recipe(trial.folder, recipe, dry=True)


def _flags(trial: Trial) -> dict[str, str | int | None]:
    return {"task": trial.task, "data": trial.data, "model": trial.model, "seed": trial.seed}


def _refuse_decided(sets: Sequence[str]) -> None:
    for assignment in sets:
        field = assignment.split("=")[0].strip()
        if field in DECIDED:
            raise RecipeError(f"--set {assignment}: a sweep decides {field!r} for each of its trials", "leave it out")


def _find_recipes(recipes: Iterable[str]) -> list[str]:
    """Return names of recipes as they are, and files as absolute paths.

    Raises:
        RecipeError: two have the same stem, and would share their folders.
    """
    known = reading.recipe_names()
    by_stem: dict[str, str] = {}
    for recipe in dict.fromkeys(recipes):
        stem = Path(recipe).stem
        if stem in by_stem:
            raise RecipeError(f"two recipes are called {stem!r}, and would share their folders", "rename one of them")
        # A name stays a name, as it stands in tables.
        by_stem[stem] = recipe if recipe in known else _make_absolute(recipe)
    return list(by_stem.values())


def _make_absolute(path: str) -> str:
    """Make an existing path absolute, since trials may run elsewhere; return a name as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path
