"""Data sets: a description of one, its rows, and how `--task NAME` becomes one.

`glue.py` describes the nine GLUE data sets, `local.py` a file or folder of the user, `demo.py` generates one. A plugin
registers its own with `spdtool.plugins.datasets`. What is predicted from the rows is the business of `spdtool.tasks`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool import plugins
from spdtool.data.cache import cache_key, hash_array
from spdtool.errors import DataError, RecipeError
from spdtool.recipe.fields import Recipe
from spdtool.run.records import DataRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLABELED = "unlabeled"  # name of the split of texts without labels
HASHED_ROWS = 10_000  # texts joined before they are hashed: one copy of a chunk, not of the whole column

Column = Sequence[str]
Labels = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as columns of equal length.

    Attributes:
        first: the first text of each row, or its only one.
        second: the second text of each row; None for single texts.
        labels: class indices (int) or, for regression, floats; where a row may have several labels, 0 or 1 for each,
            an array [rows, labels]; other kinds of task have lists.
    """

    first: Column
    second: Column | None
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> Rows:
        """Return the rows with these numbers, in this order."""
        first = [self.first[row] for row in rows]
        labels: Labels = [self.labels[row] for row in rows]
        if isinstance(self.labels, np.ndarray) and self.labels.ndim == 2:
            labels = self.labels[rows]
        if self.second is None:
            return Rows(first, None, labels)
        return Rows(first, [self.second[row] for row in rows], labels)

    def sample(self, count: int | None, seed: int) -> Rows:
        """Draw `count` rows and keep their order (None: all rows)."""
        if count is None or count >= len(self):
            return self
        # Drawn, not cut off: files are often sorted by their labels.
        return self.select(sorted(random.Random(seed).sample(range(len(self)), count)))


Splits = Mapping[str, Rows]


@dataclass(frozen=True)
class Dataset:
    """A data set that `--task NAME` can name.

    Attributes:
        name: as the user types it.
        kind: registered name of the kind of task, see `spdtool.tasks`.
        text: names of the one or two text columns.
        labels: label names in the order of their indices; empty where labels are numbers.
        metrics: names in `METRICS` of `spdtool.tasks.scores.metrics`; the headline score is the recipe's `metric`,
            else their mean, as GLUE reports it.
        load: `load(data, seed)` returns the splits: `train` and `dev`, perhaps `test`, which is scored once at the end,
            and any further dev sets under names that start with `dev_`. `data` is a path, or None for the data set's
            usual source (the hub).
        build: for a data set with a small model to go with it: `build(seed)` returns `(model, tokenizer)`, untrained.
        about: one line for listings.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    load: Callable[[str | None, int], dict[str, Rows]]
    build: Callable[[int], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None
    about: str = ""


def find_dataset(recipe: Recipe) -> Dataset:
    """Return the data set that the recipe names, or describe its local file or folder.

    Raises:
        UnknownName: no data set has this name.
        RecipeError: columns are named for a data set that knows its columns.
        DataError: the local data cannot be read.
    """
    if recipe.task == "local":
        from spdtool.data.local import local_dataset  # it imports this module

        return local_dataset(recipe)
    if recipe.text or recipe.label or recipe.regression is not None or recipe.multilabel is not None:
        raise RecipeError(
            f"task {recipe.task!r} knows its own columns and labels",
            "leave out --text, --label, regression and multilabel, or leave out --task",
        )
    dataset = plugins.datasets.get(_registered_name(recipe.task))
    assert isinstance(dataset, Dataset), f"{recipe.task}: register a spdtool.data.dataset.Dataset"
    return dataset


def _registered_name(name: str) -> str:
    """Return the registered name that `name` is another spelling of, or `name` itself."""
    if plugins.datasets.find(name) is not None:
        return name
    matches = []
    for entry in plugins.datasets.entries():
        if plain_name(entry.name) == plain_name(name):
            matches.append(entry.name)
    return matches[0] if len(matches) == 1 else name


def plain_name(name: str) -> str:
    """Drop what people write differently: `SST-2`, `sst_2` and `sst2` are one name."""
    return name.lower().replace("-", "").replace("_", "")


def load_splits(dataset: Dataset, recipe: Recipe) -> dict[str, Rows]:
    """Load all rows of a data set.

    Raises:
        DataError: a split is missing or empty, or cannot be read.
    """
    splits = dataset.load(recipe.data, recipe.seed)
    if recipe.test_share and recipe.task != "local":  # rows of the user's files: before their dev set was drawn
        from spdtool.data.splits import draw_test_rows  # it imports this module

        if "test" in splits:
            raise DataError(f"task {dataset.name!r} has test rows", "leave --test-share out")
        splits = splits | draw_test_rows(splits["train"], recipe.seed, recipe.test_share)
    if recipe.test_share and "test" not in splits:
        raise DataError(
            f"--test-share takes no rows from a task of the kind {dataset.kind!r}", "leave it out, or add a test file"
        )
    for name in ("train", "dev"):
        if not splits.get(name):
            raise DataError(
                f"task {dataset.name!r} has no rows in its {name} split", f"looked in {recipe.data or 'the hub'}"
            )
    return splits


def identify_rows(dataset: Dataset, splits: Splits) -> DataRecord:
    """Identify the rows of a run, whatever the model.

    The digest of texts in shards is stored; other texts are read once, a gigabyte in about a second.
    """
    counts, hashes = {}, {}
    for name, rows in splits.items():
        counts[name] = len(rows)
        hashes[name] = [hash_texts(rows), hash_labels(rows.labels)]
    unlabeled = hashes.pop(UNLABELED, None)
    return DataRecord(
        rows=counts,
        digest=cache_key(dataset.labels, hashes),
        # the labels of such rows may say what is read of a text, such as its words
        unlabeled=None if unlabeled is None else cache_key(*unlabeled),
    )


def hash_labels(labels: Labels) -> str:
    """Hash the labels of a split: numbers by their bytes, lists by their values."""
    if len(labels) and isinstance(labels[0], list | tuple):
        return cache_key([list(label) for label in labels])
    return hash_array(np.asarray(labels))


def hash_texts(rows: Rows) -> str:
    """Hash the texts of a split in their order; a column with a stored `digest` is not read."""
    hasher = hashlib.blake2b(digest_size=16)
    for column in (rows.first, rows.second):
        hasher.update(b"none" if column is None else b"texts")
        if column is None:
            continue
        stored_digest = getattr(column, "digest", None)
        if stored_digest:
            hasher.update(stored_digest.encode())
            continue
        for start in range(0, len(rows), HASHED_ROWS):
            texts = column[start : start + HASHED_ROWS]
            # Lengths as well: without them ("ab", "c") and ("a", "bc") would be one.
            hasher.update(np.array(list(map(len, texts)), np.int64).data)
            hasher.update("".join(texts).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()
