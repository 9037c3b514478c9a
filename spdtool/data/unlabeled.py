"""Texts without labels, from which the student learns what the teacher says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spdtool.data.columns import read_texts, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import READERS, read_file
from spdtool.data.formats.table import Table, compose, read_text, refuse_pointer
from spdtool.errors import DataError

LINES = ".txt"


def read_unlabeled(file: Path, columns: Sequence[str], dataset: Dataset, labels: np.ndarray) -> Rows:
    """Read texts without labels.

    A .txt file has a text a line, or a pair parted by a tab; blank lines are passed over. Other files have the columns.

    Args:
        columns: of the one or two texts; empty: those of the training rows, or the only one.
        dataset: of the training rows.
        labels: of the training rows; the texts get zeros of the same kind, which no loss reads.

    Raises:
        DataError: the file cannot be read, or lacks a column or a text.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file} of texts without labels", f"a file that ends in {_endings()}")
    if len(columns) not in (0, len(dataset.text)):
        raise DataError(
            f"unlabeled_text names {len(columns)} columns, and a training row has {len(dataset.text)} texts",
            "name as many",
        )
    if file.suffix.lower() == LINES:
        texts = _read_lines(file, len(dataset.text))
    else:
        table = read_file(file)
        names = _choose_columns(table, columns, dataset)
        texts = [read_texts(table, name) for name in names]
    zeros = np.zeros((len(texts[0]), *labels.shape[1:]), labels.dtype)
    return Rows(texts[0], texts[1] if len(texts) == 2 else None, zeros)


def _read_lines(file: Path, count: int) -> list[list[str]]:
    """Read a .txt file as one or two columns."""
    refuse_pointer(file)
    columns: list[list[str]] = [[] for _ in range(count)]
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        # a tab may be part of a single text
        texts = [line] if count == 1 else line.split("\t")
        if len(texts) != count or not all(text.strip() for text in texts):
            raise DataError(
                f"{file}, line {number}: {len(texts)} texts where 2 were expected", "a pair is parted by one tab"
            )
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    return columns


def _choose_columns(table: Table, columns: Sequence[str], dataset: Dataset) -> list[str]:
    names = [compose(name) for name in columns or dataset.text]
    if not columns and len(names) == 1 and len(table.columns) == 1:
        names = [table.columns[0]]
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
