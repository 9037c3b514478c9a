"""The task of a recipe and its rows, for a model whose labels have names; and the check of the teacher's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spdtool import console, plugins
from spdtool.data import dataset as datasets
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.tokens import Encoded, mix_rows
from spdtool.errors import DataError, UnknownName
from spdtool.recipe.fields import Recipe
from spdtool.run.records import DataRecord
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CheckRows = Callable[[DataRecord], None]
"""Receives the record of the rows of a run, and may refuse them."""


def find_task(recipe: Recipe) -> Task:
    """Return the task of the recipe's data set.

    Raises:
        UnknownName: no data set has this name, or no kind of task that which the data set states; or the task has no
            such metric.
        RecipeError, DataError: as `find_dataset` raises.
    """
    task = task_of(datasets.find_dataset(recipe))
    if recipe.metric is not None and recipe.metric not in task.dataset.metrics:
        raise UnknownName(f"metric of task {task.name!r}", recipe.metric, task.dataset.metrics)
    task.metric = recipe.metric
    return task


def task_of(dataset: Dataset) -> Task:
    """Return the task of a data set; raises UnknownName where its kind of task is not supported."""
    task: Task = plugins.task_kinds.get(dataset.kind)(dataset)  # the registry holds classes, and imports them late
    return task


def check_teacher_score(task: Task, dev: Encoded, score: float, recipe: Recipe) -> None:
    """Refuse a teacher whose dev score is that of chance: a student would keep 100 % of nothing.

    Raises:
        DataError: the teacher scores no better, and the recipe does not accept that. A smoke run does.
    """
    chance = task.chance_score(dev)
    if score > chance:  # a NaN is none either
        return
    message = (
        f"the teacher's dev score {score:.4f} is no better than the {chance:.4f} that chance gives on {len(dev)} "
        "rows: there is nothing in it for a student to learn"
    )
    if recipe.smoke:
        console.say(f"[dim]smoke run: {message}; accepted, as every teacher of a smoke run is[/]")
    elif recipe.teacher.accept:
        console.warn(f"{message}; accepted, because teacher.accept is set")
    else:
        raise DataError(message, "look at labels and columns, train it longer, or go on: --set teacher.accept=true")


def prepare_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    check_rows: CheckRows | None = None,
) -> tuple[Task, dict[str, Encoded]]:
    """Return the recipe's task and the tokenized splits of a training stage, all but `test`.

    Texts without labels are among the training rows. Arguments and errors are those of `prepare_rows`.
    """
    task, splits = prepare_rows(recipe, label_names, check_rows)
    splits.pop("test", None)  # no stage that trains or chooses has it in its hands
    encoded = task.encode(tokenizer, splits, recipe)
    unlabeled = encoded.pop(datasets.UNLABELED, None)
    if unlabeled is not None:
        per_epoch = recipe.unlabeled_per_epoch(len(encoded["train"]), len(unlabeled))
        encoded["train"] = mix_rows(encoded["train"], unlabeled, per_epoch)
    return task, encoded


def prepare_rows(
    recipe: Recipe, label_names: Sequence[str], check_rows: CheckRows | None = None, task: Task | None = None
) -> tuple[Task, dict[str, Rows]]:
    """Return the recipe's task and its splits, for a model whose labels have these names.

    Args:
        check_rows: is called with the record of the rows before they are used.
        task: of the recipe, where the caller has it: to find it may read a whole file.

    Raises:
        DataError: the data cannot be used.
        ModelError: model and task do not fit together.
    """
    task = (task or find_task(recipe)).widen(label_names)
    splits = task.read_rows(recipe)
    if check_rows is not None:
        check_rows(datasets.identify_rows(task.dataset, splits))
    return task, task.align_labels(splits, label_names)
