"""Tasks: what is classified, how it is scored, and where its rows come from.

A task is a value of `Task`; `load` gives its rows. `glue.py` holds the nine GLUE tasks as data, `local.py` makes a task
of a file or folder of yours, `demo.py` generates one. A plugin registers its own with `spdtool.plugins.tasks`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spdtool import plugins
from spdtool.data import cache
from spdtool.errors import DataError, RecipeError
from spdtool.recipe.fields import Recipe

HASHED_ROWS = 10_000  # whose texts are put together at a time


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as columns of equal length.

    `second` is None for single sentences. `labels` holds class indices (int) or, for regression, floats.
    """

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Sequence[int]) -> Rows:
        """The rows with these numbers, in this order."""
        labels: list[Any] = [self.labels[row] for row in rows]
        second = None if self.second is None else [self.second[row] for row in rows]
        return Rows([self.first[row] for row in rows], second, labels)

    def sample(self, count: int | None, seed: int) -> Rows:
        """`count` rows drawn at random, in their order (None: all): files are often sorted by their labels."""
        if count is None or count >= len(self):
            return self
        return self.pick(sorted(random.Random(seed).sample(range(len(self)), count)))


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as the user types it.
        text: names of the one or two text columns.
        labels: label names in the order of their indices; empty for regression.
        metrics: names in `spdtool.models.predict.METRICS`; the headline score is their mean, as GLUE reports it.
        load: `load(data, seed)` gives the splits: `train` and `dev`, and any further dev sets under names that start
            with `dev_`. `data` is a path, or None for the task's own source (the hub).
        build: for a task that brings its own small model: `build(seed)` gives `(model, tokenizer)`, untrained.
        about: one line for listings.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    load: Callable[[str | None, int], dict[str, Rows]]
    build: Callable[[int], tuple[Any, Any]] | None = None
    about: str = ""

    @property
    def regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return not self.labels


def resolve(recipe: Recipe) -> Task:
    """The task that `recipe` names, or one made of its local file or folder.

    Raises:
        UnknownName: no such task.
        RecipeError: columns named for a task that has its own.
        DataError: the local data cannot be read.
    """
    if recipe.task == "local":
        from spdtool.data import local

        return local.task(recipe)
    if recipe.text or recipe.label or recipe.regression is not None:
        raise RecipeError(
            f"task {recipe.task!r} knows its own columns and labels",
            "leave out --text, --label and regression, or leave out --task",
        )
    task = plugins.tasks.get(_registered(recipe.task))
    assert isinstance(task, Task)
    return task


def plain(name: str) -> str:
    """`name` without what people write differently: `SST-2`, `sst_2` and `sst2` are one."""
    return name.lower().replace("-", "").replace("_", "")


def rows(task: Task, recipe: Recipe) -> dict[str, Rows]:
    """The splits of `task`, checked and cut to `recipe.max_rows`.

    Raises:
        DataError: a split is missing or empty, or the training rows show one class only.
    """
    splits = task.load(recipe.data, recipe.seed)
    for name in ("train", "dev"):
        if not splits.get(name):
            raise DataError(
                f"task {task.name!r} has no rows in its {name} split", f"looked in {recipe.data or 'the hub'}"
            )
    labels = splits["train"].labels
    if not task.regression and all(label == labels[0] for label in labels):  # ends at the second label
        only = task.labels[int(labels[0])]
        raise DataError(f"every training row of {task.name!r} has the label {only!r}", "two classes are the least")
    return {name: split.sample(recipe.max_rows, recipe.seed) for name, split in splits.items()}


def facts(task: Task, splits: dict[str, Rows]) -> dict[str, Any]:
    """What tells these rows from others, whatever the model: `rows` of each split, and the `digest` of all of them.

    Of texts in shards the digest is known; others are read once, a gigabyte in about a second.
    """
    parts = {name: [texts_hash(split), cache.hash_of(np.asarray(split.labels))] for name, split in splits.items()}
    return {"rows": {name: len(split) for name, split in splits.items()}, "digest": cache.key(task.labels, parts)}


def texts_hash(rows: Rows) -> str:
    """Hash of the texts of a split, in their order; of a column that knows its own `digest`, that."""
    hashed = hashlib.blake2b(digest_size=16)
    for column in (rows.first, rows.second):
        hashed.update(b"none" if column is None else b"texts")
        if known := getattr(column, "digest", None):
            hashed.update(known.encode())
            continue
        for start in range(0, 0 if column is None else len(rows), HASHED_ROWS):
            texts = column[start : start + HASHED_ROWS]  # type: ignore[index]
            hashed.update(np.array([len(text) for text in texts], np.int64).data)
            hashed.update("".join(texts).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()


def _registered(name: str) -> str:
    """The registered name that `name` is another spelling of, or `name` itself."""
    if plugins.tasks.find(name) is not None:
        return name
    alike = [part.name for part in plugins.tasks.entries() if plain(part.name) == plain(name)]
    return alike[0] if len(alike) == 1 else name
