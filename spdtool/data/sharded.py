"""A data set of more rows than fit into memory: many files a split, read one after the other into flat arrays.

    spdtool compress --data my-folder       # train/*.parquet and dev/*.parquet, or train-00000-of-00100.parquet ...

The texts and labels go through the cache (`cache.py`), from which they are memory-mapped: what is in memory at any
time is one file (of Parquet: one batch of rows), however many there are. A data set in shards brings its dev set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from spdtool.data import cache
from spdtool.data.columns import Columns, choose_columns, read_texts, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import read_file
from spdtool.data.formats.arrow import iterate_tables
from spdtool.data.formats.table import Table
from spdtool.data.kinds.label_sets import find_label_sets
from spdtool.data.labels import LabelSummary, order_by_schema, read_labels
from spdtool.data.local import (
    has_labels,
    kind_of_labels,
    metrics_of_labels,
    two_test_sets,
)
from spdtool.data.readme import ClassNames, name_classes, read_class_names
from spdtool.data.splits import DEV_NAMES, describe_unused, find_split_files
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

CHUNK_ROWS = 20_000  # read at a time from a Parquet file
FORMAT = 3  # of the rows in the cache: another layout, another number


class MappedTexts(Sequence[str]):
    """A column of texts in two memory-mapped arrays: all their bytes, and where each begins.

    Attributes:
        digest: hash of both arrays.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray, digest: str) -> None:
        self._content = content
        self._offsets = offsets
        self.digest = digest

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            if step != 1:
                return [self[number] for number in range(start, stop, step)]
            return self._read(start, max(start, stop))
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._read(row % len(self), row % len(self) + 1)[0]

    def _read(self, start: int, stop: int) -> list[str]:
        """Read neighbouring texts with one access to the disk."""
        offsets = self._offsets[start : stop + 1].tolist()
        first = offsets[0]
        content = self._content[first : offsets[-1]].tobytes()
        texts = []
        for begin, end in pairwise(offsets):
            texts.append(content[begin - first : end - first].decode("utf-8"))
        return texts


def find_shards(folder: Path) -> dict[str, list[Path]] | None:
    """Return the files of `train`, `dev` and, if there are any, `test`, if a split has more than one; else None.

    Raises:
        DataError: the training rows are in shards, and there is no dev set; or see `splits.find_files`.
    """
    if not folder.is_dir():
        return None
    files = find_split_files(folder)
    train, dev = files["train"], files["dev"]
    if not train or max(map(len, files.values())) < 2:
        return None
    if not dev:
        # None is drawn: that would read and copy all rows once more.
        raise DataError(
            f"{folder} has {len(train)} files of training rows and no dev set",
            f"add a file or a folder called {' or '.join(DEV_NAMES)}",
        )
    return {split: paths for split, paths in files.items() if paths}


def sharded_dataset(recipe: Recipe, files: dict[str, list[Path]]) -> Dataset | None:
    """Describe the data set in these files; None where a row may have several labels, which are not read so.

    The first rows decide which columns there are, all labels what they are.

    Raises:
        DataError: a file cannot be read or lacks values; the columns are unclear; too many classes.
    """
    names = read_class_names(Path(recipe.data or ""))
    first_table = name_classes(next(_iterate_tables(files["train"][0])), names)
    columns = choose_columns(first_table, recipe.text, recipe.label, recipe.multilabel)
    if find_label_sets(first_table, columns, Path(recipe.data or ""), recipe.multilabel) is not None:
        return None
    files, test_note = _choose_test_files(files, columns, recipe)
    as_numbers = recipe.regression is True
    arrays = {}
    for split, paths in files.items():
        arrays[split] = _cache_split(paths, columns, names, as_numbers=as_numbers)
    classes = _label_summary(arrays["train"]).classes(str(recipe.data), recipe.regression)
    if classes:
        classes = order_by_schema(classes, first_table.class_names.get(columns.label))

    def load(_data: str | None, _seed: int) -> dict[str, Rows]:
        return {split: _map_rows(arrays[split], columns, classes, split) for split in arrays}

    return Dataset(
        name="local",
        kind=kind_of_labels(classes),
        text=columns.text,
        labels=classes,
        metrics=metrics_of_labels(classes),
        load=load,
        about=f"{' and '.join(columns.text)} of {len(files['train'])} files in {recipe.data}, by {columns.label}"
        + test_note
        + describe_unused(Path(recipe.data or ""), [path for paths in files.values() for path in paths]),
    )


def _choose_test_files(
    files: dict[str, list[Path]], columns: Columns, recipe: Recipe
) -> tuple[dict[str, list[Path]], str]:
    """Leave out test files without labels; return the files, and a phrase on the test set for the plan.

    Raises:
        DataError: a share of the rows is to be the test set, which would copy all of them.
    """
    has_test = "test" in files and has_labels(next(_iterate_tables(files["test"][0])), columns)
    if recipe.test_share and has_test:
        raise two_test_sets(files["test"][0])
    if recipe.test_share:
        raise DataError(
            f"--test-share is not for rows in several files: {recipe.data} has {len(files['train'])}",
            "add a file or a folder called test",
        )
    if has_test:
        return files, "; test is scored once, at the end"
    others = {split: paths for split, paths in files.items() if split != "test"}
    return others, "; test has no labels: `spdtool predict` gives it some" if "test" in files else ""


def _iterate_tables(path: Path) -> Iterator[Table]:
    """Read the rows of one file: of Parquet some at a time, of a text file all at once."""
    if path.suffix.lower() in (".parquet", ".arrow"):
        yield from iterate_tables(path, CHUNK_ROWS)
    else:
        yield read_file(path)


def _cache_split(paths: list[Path], columns: Columns, names: ClassNames, *, as_numbers: bool) -> cache.Arrays:
    """Return the columns of a split as flat arrays, from the cache or by reading every file once.

    The arrays `0 texts` and `0 offsets` hold the first text of each row, `1 ...` the second. `labels` is a
    `LabelSummary` as JSON; `codes` is the number of each row's label, unless there are too many to be classes, and
    `numbers` is the value of each row's label, unless one is no number.

    Args:
        names: that a README gives to classes.
        as_numbers: as in `read_labels`.
    """
    summary = LabelSummary()

    def fill(append: cache.Append) -> None:
        ends = [0] * len(columns.text)
        for index in range(len(columns.text)):
            append(f"{index} offsets", np.zeros(1, np.int64))
        for path in paths:
            for table in _iterate_tables(path):
                for name in (*columns.text, columns.label):
                    require_column(table, name)
                for index, name in enumerate(columns.text):
                    ends[index] += _append_texts(append, index, read_texts(table, name), ends[index])
                labels = read_labels(name_classes(table, names), columns.label, as_numbers=as_numbers)
                summary.add(table, labels)
                # One that stops being possible is not used later: it may stay incomplete.
                if not summary.too_many:
                    append("codes", np.array([summary.names[label] for label in labels], np.int64))
                if summary.odd is None:
                    append("numbers", np.array(labels, np.float64))
        append("labels", np.frombuffer(json.dumps(asdict(summary)).encode(), np.uint8))

    # A file that was changed in any usual way has another size or time: none is read to find that out.
    identity = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = cache.cache_key(FORMAT, identity, columns.text, columns.label, as_numbers, names.get(columns.label))
    return cache.cached_arrays("rows", key, fill)


def _append_texts(append: cache.Append, index: int, texts: list[str], end: int) -> int:
    """Append texts to column `index`, which has `end` bytes; return how many bytes they are."""
    encoded = list(map(str.encode, texts))
    lengths = np.array(list(map(len, encoded)), np.int64)
    append(f"{index} texts", np.frombuffer(b"".join(encoded), np.uint8))
    append(f"{index} offsets", end + np.cumsum(lengths))
    return int(lengths.sum())


def _label_summary(arrays: cache.Arrays) -> LabelSummary:
    return LabelSummary(**json.loads(arrays["labels"].tobytes()))


def _map_rows(arrays: cache.Arrays, columns: Columns, classes: tuple[str, ...], split: str) -> Rows:
    labels = _map_classes(arrays, classes, split) if classes else _map_numbers(arrays)
    if len(columns.text) == 2:
        return Rows(_map_texts(arrays, 0), _map_texts(arrays, 1), labels)
    return Rows(_map_texts(arrays, 0), None, labels)


def _map_texts(arrays: cache.Arrays, index: int) -> MappedTexts:
    content, offsets = f"{index} texts", f"{index} offsets"
    return MappedTexts(arrays[content], arrays[offsets], arrays.hashes[content] + arrays.hashes[offsets])


def _map_numbers(arrays: cache.Arrays) -> np.ndarray:
    odd = _label_summary(arrays).odd
    if odd is not None:
        location, label = odd
        raise DataError(f"{location}: the label {label!r} is not a number", "all others are; this is a regression")
    return arrays["numbers"]


def _map_classes(arrays: cache.Arrays, classes: tuple[str, ...], split: str) -> np.ndarray:
    """Return the labels as indices into `classes`; as they are stored, if that is their order already."""
    index = {name: number for number, name in enumerate(classes)}
    names = _label_summary(arrays).names
    for name in names:
        if name not in index:
            raise DataError(f"the label {name!r} of the {split} rows is in no training row")
    order = np.array([index[name] for name in names])
    if order.tolist() == list(range(len(order))):
        return arrays["codes"]
    codes = arrays["codes"]

    def fill(append: cache.Append) -> None:
        for start in range(0, len(codes), CHUNK_ROWS):
            append("labels", order[codes[start : start + CHUNK_ROWS]])

    key = cache.cache_key(arrays.hashes["codes"], order.tolist())
    return cache.cached_arrays("labels", key, fill)["labels"]
