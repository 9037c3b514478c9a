"""A task made of more rows than fit into memory: many files a split, read one after the other and kept as flat arrays.

    spdtool compress --data my-folder       # train/*.parquet and dev/*.parquet, or train-00000-of-00100.parquet ...

The texts and labels go through the cache (`cache.py`), from which they are memory-mapped: what is in memory at any
time is one file (of Parquet: one batch of rows), however many there are. A data set in shards brings its own dev set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from spdtool import cache
from spdtool.errors import DataError
from spdtool.recipe import Recipe
from spdtool.tasks import Rows, Task, local
from spdtool.tasks.files import Table

PIECE = 20_000  # rows of a Parquet file that are read at a time
MOST_CLASSES = 10_000


class Texts(Sequence[str]):
    """A column of texts in two memory-mapped arrays: all their bytes, and where each begins.

    Attributes:
        digest: tells this column from others.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray, digest: str) -> None:
        self._content, self._offsets, self.digest = content, offsets, digest

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            first, stop, step = row.indices(len(self))
            if step != 1:
                return [self[each] for each in range(first, stop, step)]
            ends = self._offsets[first : max(first, stop) + 1].tolist()  # one look at the disk for all of them
            content = self._content[ends[0] : ends[-1]].tobytes()
            return [content[start - ends[0] : end - ends[0]].decode("utf-8") for start, end in pairwise(ends)]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        start, stop = self._offsets[row % len(self)], self._offsets[row % len(self) + 1]
        return self._content[start:stop].tobytes().decode("utf-8")


def found(folder: Path) -> dict[str, list[Path]] | None:
    """The files of `train` and `dev` in order of their names, if the training rows are in more than one; else None.

    Raises:
        DataError: the training rows are in shards, and there is no dev set.
    """
    if not folder.is_dir():
        return None
    train = _files(folder, ("train",))
    if len(train) < 2:
        return None
    dev = _files(folder, local.DEV_NAMES)
    if not dev:
        raise DataError(
            f"{folder} has {len(train)} files of training rows and no dev set",
            f"add a file or a folder called {' or '.join(local.DEV_NAMES)}",
        )
    return {"train": train, "dev": dev}


def task(recipe: Recipe, files: dict[str, list[Path]]) -> Task:
    """The task that the files describe; the first rows say which columns there are, and whether labels are numbers.

    Raises:
        DataError: a file cannot be read or lacks values; the columns cannot be told; too many classes.
    """
    first = next(_pieces(files["train"][0]))
    columns = local.choose_columns(first, recipe.text, recipe.label)
    regression = not local.label_names(first, columns.label)
    stored = {split: _stored(paths, columns, regression=regression) for split, paths in files.items()}
    classes = () if regression else local.in_order(_names(stored["train"]))

    def load(_data: str | None, _seed: int) -> dict[str, Rows]:
        return {split: _rows(arrays, columns, classes, split) for split, arrays in stored.items()}

    return Task(
        name="local",
        text=columns.text,
        labels=classes,
        metrics=local.metrics_for(classes),
        load=load,
        about=f"{' and '.join(columns.text)} of {len(files['train'])} files in {recipe.data}, by {columns.label}",
    )


def _files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The files of a split: those in the folder of its name, else those whose names begin with it."""
    for stem in stems:
        inside = folder / stem
        listed = inside.iterdir() if inside.is_dir() else folder.iterdir()
        fitting = [path for path in listed if path.suffix.lower() in local.READERS and path.is_file()]
        if not inside.is_dir():
            fitting = [path for path in fitting if path.stem == stem or path.stem.startswith(f"{stem}-")]
        if fitting:
            return sorted(fitting)
    return []


def _pieces(path: Path) -> Iterator[Table]:
    """The rows of one file: of Parquet some at a time, of a text file all."""
    if path.suffix.lower() != ".parquet":
        yield local.read_file(path)
        return
    yield from local.parquet_pieces(path, PIECE)


def _stored(paths: list[Path], columns: local.Columns, *, regression: bool) -> cache.Arrays:
    """The columns of a split as flat arrays, from the cache or by reading every file once."""
    known: dict[str, int] = {}

    def fill(append: cache.Append) -> None:
        ends = [0] * len(columns.text)
        for place in range(len(columns.text)):
            append(f"{place} offsets", np.zeros(1, np.int64))
        for path in paths:
            for table in _pieces(path):
                for name in (*columns.text, columns.label):
                    local.must_exist(table, name)
                for place, name in enumerate(columns.text):
                    ends[place] += _append_texts(append, place, local.texts(table, name), ends[place])
                labels = [local.label_of(table, row, value) for row, value in enumerate(table.column(columns.label))]
                append("labels", _numbers(table, labels) if regression else _codes(labels, known, path))
        append("names", np.frombuffer("\n".join(known).encode(), np.uint8))

    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return cache.arrays("rows", cache.key(facts, columns.text, columns.label, regression), fill)


def _append_texts(append: cache.Append, place: int, texts: list[str], end: int) -> int:
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    append(f"{place} texts", np.frombuffer(b"".join(encoded), np.uint8))
    append(f"{place} offsets", end + np.cumsum(lengths))
    return int(lengths.sum())


def _codes(labels: list[str], known: dict[str, int], path: Path) -> np.ndarray:
    codes = np.array([known.setdefault(label, len(known)) for label in labels], np.int64)
    if len(known) > MOST_CLASSES:
        raise DataError(f"{path} brings the labels to more than {MOST_CLASSES} different ones", "are they classes?")
    return codes


def _numbers(table: Table, labels: list[str]) -> np.ndarray:
    numbers = [local.number(label) for label in labels]
    for row, value in enumerate(numbers):
        if value is None:
            table.refuse(row, f"the label {labels[row]!r} is not a number", "all others are; this is a regression")
    return np.array(numbers, np.float64)


def _names(arrays: cache.Arrays) -> list[str]:
    return arrays["names"].tobytes().decode().split("\n")


def _rows(arrays: cache.Arrays, columns: local.Columns, classes: tuple[str, ...], split: str) -> Rows:
    texts = [_texts(arrays, place) for place in range(len(columns.text))]
    labels: Any = arrays["labels"]
    if classes:
        names = _names(arrays)
        strange = [name for name in names if name not in classes]
        if strange:
            raise DataError(f"the label {strange[0]!r} of the {split} rows is in no training row")
        order = np.array([classes.index(name) for name in names])
        if order.tolist() != list(range(len(order))):
            labels = _renumbered(labels, order, arrays.hashes["labels"])
    return Rows(texts[0], texts[1] if len(texts) == 2 else None, labels)


def _texts(arrays: cache.Arrays, place: int) -> Any:
    content, offsets = f"{place} texts", f"{place} offsets"
    return Texts(arrays[content], arrays[offsets], arrays.hashes[content] + arrays.hashes[offsets])


def _renumbered(labels: np.ndarray, order: np.ndarray, hashed: str) -> np.ndarray:
    def fill(append: cache.Append) -> None:
        for start in range(0, len(labels), PIECE):
            append("labels", order[labels[start : start + PIECE]])

    return cache.arrays("labels", cache.key(hashed, order.tolist()), fill)["labels"]
