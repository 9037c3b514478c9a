"""Rows without labels, from which the student learns what the teacher says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from spdtool.data.columns import read_texts, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import LINES, READERS, read_file
from spdtool.data.formats.table import Table, compose, read_text, refuse_foreign
from spdtool.errors import DataError


def read_unlabeled(file: Path, columns: Sequence[str], dataset: Dataset, labels: np.ndarray) -> Rows:
    """Read texts without labels; raises as `read_unlabeled_table` does.

    Args:
        columns: of the one or two texts; empty: those of the training rows, or the only one.
        dataset: of the training rows.
        labels: of the training rows; the texts get zeros of the same kind, which no loss reads.
    """
    table, names = read_unlabeled_table(file, columns, dataset)
    texts = [read_texts(table, name) for name in names]
    zeros = np.zeros((len(table.rows), *labels.shape[1:]), labels.dtype)
    return Rows(texts[0], texts[1] if len(texts) == 2 else None, zeros)


def read_unlabeled_table(
    file: Path,
    columns: Sequence[str],
    dataset: Dataset,
    *,
    further: Sequence[str] = (),
    readers: Mapping[str, Callable[[Path], Table]] = READERS,
) -> tuple[Table, list[str]]:
    """Read a file of rows without labels; return its table and the names of its one or two text columns.

    A .txt file has a text a line, or a pair separated by a tab; blank lines are passed over. Other files have columns.

    Args:
        columns: that the user names; empty: those of the training rows, or the only one.
        dataset: of the training rows.
        further: names that the only text column may have instead of that of the training rows.
        readers: ending of a file to the function that reads it.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file} of texts without labels", f"a file that ends in {_endings()}")
    if len(columns) not in (0, len(dataset.text)):
        raise DataError(
            f"unlabeled_text names {len(columns)} columns, and a training row has {len(dataset.text)} texts",
            "name as many",
        )
    if file.suffix.lower() == LINES:
        table = _read_lines(file, tuple(map(compose, dataset.text)))
        return table, list(table.columns)
    table = read_file(file, readers)
    return table, _choose_columns(table, columns, dataset, further)


def _read_lines(file: Path, names: tuple[str, ...]) -> Table:
    """Read a .txt file as a table of one or two columns."""
    refuse_foreign(file)
    rows: list[list[object]] = []
    numbers: list[int] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        # a tab may be part of a single text
        texts = [line] if len(names) == 1 else line.split("\t")
        if len(texts) != len(names):
            problem = f"{file}, line {number}: {len(texts)} texts where {len(names)} were expected"
            raise DataError(problem, f"{names[0]} and {names[-1]}, separated by one tab")
        rows.append([*texts])
        numbers.append(number)
    return Table(file, names, rows, numbers)


def _choose_columns(table: Table, columns: Sequence[str], dataset: Dataset, further: Sequence[str]) -> list[str]:
    names = [compose(name) for name in columns or dataset.text]
    if not columns and len(names) == 1:
        usual = [name for name in (*names, *further) if name in table.columns]
        if usual or len(table.columns) == 1:
            names = [*usual, table.columns[0]][:1]
    for name in names:
        if name not in table.columns and not columns:
            raise DataError(
                f"{table.path} has no column {name!r}, where the training rows have their text; "
                f"it has {', '.join(map(repr, table.columns))}",
                f"name its text: --set unlabeled_text={','.join(table.columns[: len(names)])}",
            )
        require_column(table, name)
    return names


def _endings() -> str:
    return ", ".join((LINES, *READERS))
