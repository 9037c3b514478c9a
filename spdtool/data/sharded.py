"""A task made of more rows than fit into memory: many files a split, read one after the other and kept as flat arrays.

    spdtool compress --data my-folder       # train/*.parquet and dev/*.parquet, or train-00000-of-00100.parquet ...

The texts and labels go through the cache (`cache.py`), from which they are memory-mapped: what is in memory at any
time is one file (of Parquet: one batch of rows), however many there are. A data set in shards brings its own dev set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from spdtool.data import cache, local
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import Table
from spdtool.data.labels import Labels, of_column
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

PIECE = 20_000  # rows of a Parquet file that are read at a time
FORMAT = 2  # of the rows in the cache: another layout, another number


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
    """The files of `train` and `dev` in order of their names, if one of them has more than one; else None.

    Raises:
        DataError: the training rows are in shards, and there is no dev set; or see `local.files_of`.
    """
    if not folder.is_dir():
        return None
    files = local.splits_of(folder)
    train, dev = files["train"], files["dev"]
    if not train or max(len(train), len(dev)) < 2:
        return None
    if not dev:
        raise DataError(
            f"{folder} has {len(train)} files of training rows and no dev set",
            f"add a file or a folder called {' or '.join(local.DEV_NAMES)}",
        )
    return files


def sharded_dataset(recipe: Recipe, files: dict[str, list[Path]]) -> Dataset:
    """The task that the files describe; the first rows say which columns there are, all labels what they are.

    Raises:
        DataError: a file cannot be read or lacks values; the columns cannot be told; too many classes.
    """
    first = next(_pieces(files["train"][0]))
    columns = local.choose_columns(first, recipe.text, recipe.label)
    stored = {split: _stored(paths, columns) for split, paths in files.items()}
    classes = _labels(stored["train"]).classes(str(recipe.data), recipe.regression)

    def load(_data: str | None, _seed: int) -> dict[str, Rows]:
        return {split: _rows(arrays, columns, classes, split) for split, arrays in stored.items()}

    return Dataset(
        name="local",
        kind="classification" if classes else "regression",
        text=columns.text,
        labels=classes,
        metrics=local.metrics_for(classes),
        load=load,
        about=f"{' and '.join(columns.text)} of {len(files['train'])} files in {recipe.data}, by {columns.label}",
    )


def _pieces(path: Path) -> Iterator[Table]:
    """The rows of one file: of Parquet some at a time, of a text file all."""
    if path.suffix.lower() != ".parquet":
        yield local.read_file(path)
        return
    yield from local.parquet_pieces(path, PIECE)


def _stored(paths: list[Path], columns: local.Columns) -> cache.Arrays:
    """The columns of a split as flat arrays, from the cache or by reading every file once.

    `labels` has what the labels are as JSON (`Labels`); `codes` is the number of each row's label, as long as they may
    be classes, and `numbers` what they spell, as long as all are numbers.
    """
    seen = Labels()

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
                labels = of_column(table, columns.label)
                seen.add(table, labels)
                if not seen.too_many:
                    append("codes", np.array([seen.names[label] for label in labels], np.int64))
                if seen.odd is None:
                    append("numbers", np.array(labels, np.float64))
        append("labels", np.frombuffer(json.dumps(asdict(seen)).encode(), np.uint8))

    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return cache.cached_arrays("rows", cache.cache_key(FORMAT, facts, columns.text, columns.label), fill)


def _append_texts(append: cache.Append, place: int, texts: list[str], end: int) -> int:
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    append(f"{place} texts", np.frombuffer(b"".join(encoded), np.uint8))
    append(f"{place} offsets", end + np.cumsum(lengths))
    return int(lengths.sum())


def _labels(arrays: cache.Arrays) -> Labels:
    return Labels(**json.loads(arrays["labels"].tobytes()))


def _rows(arrays: cache.Arrays, columns: local.Columns, classes: tuple[str, ...], split: str) -> Rows:
    texts = [_texts(arrays, place) for place in range(len(columns.text))]
    labels = _classes(arrays, classes, split) if classes else _numbers(arrays)
    return Rows(texts[0], texts[1] if len(texts) == 2 else None, labels)


def _numbers(arrays: cache.Arrays) -> Any:
    odd = _labels(arrays).odd
    if odd is not None:
        raise DataError(f"{odd[0]}: the label {odd[1]!r} is not a number", "all others are; this is a regression")
    return arrays["numbers"]


def _classes(arrays: cache.Arrays, classes: tuple[str, ...], split: str) -> Any:
    """The labels as indices into `classes`; as they are stored, where that is their order already."""
    index = {name: place for place, name in enumerate(classes)}
    names = _labels(arrays).names
    strange = [name for name in names if name not in index]
    if strange:
        raise DataError(f"the label {strange[0]!r} of the {split} rows is in no training row")
    order = np.array([index[name] for name in names])
    if order.tolist() == list(range(len(order))):
        return arrays["codes"]
    return _renumbered(arrays["codes"], order, arrays.hashes["codes"])


def _texts(arrays: cache.Arrays, place: int) -> Any:
    content, offsets = f"{place} texts", f"{place} offsets"
    return Texts(arrays[content], arrays[offsets], arrays.hashes[content] + arrays.hashes[offsets])


def _renumbered(labels: np.ndarray, order: np.ndarray, hashed: str) -> np.ndarray:
    def fill(append: cache.Append) -> None:
        for start in range(0, len(labels), PIECE):
            append("labels", order[labels[start : start + PIECE]])

    return cache.cached_arrays("labels", cache.cache_key(hashed, order.tolist()), fill)["labels"]
