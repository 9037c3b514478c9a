"""Reading text files strictly: every defect is a DataError that names the file, the line and what stands there.

Rows end at `\\n` only and fields at `\\t` only: `str.splitlines` and the csv module's quoting both break real files.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from spdtool.errors import DataError


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: where it was read.
        columns: the names, as the file has them.
        rows: one list of cells per row, each as long as `columns`.
        lines: the number of each row in the file, from 1, for messages.
        unit: what `lines` counts: `line`, or `row` where the format has no lines.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[Any]]
    lines: list[int]
    unit: str = "line"

    def column(self, name: str) -> list[Any]:
        """The cells of the column `name`, which must exist."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def refuse(self, row: int, problem: str, hint: str | None = None) -> NoReturn:
        """Raise DataError about row number `row` (from 0)."""
        raise DataError(f"{self.place(row)}: {problem}", hint)

    def place(self, row: int) -> str:
        """Where row number `row` (from 0) stands, for messages."""
        return f"{self.path}, {self.unit} {self.lines[row]}"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        DataError: it cannot be opened, is empty, or is not UTF-8 (with the line and the byte).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not content.strip():
        raise DataError(f"{path} is empty", "a file of rows was expected")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path} is UTF-16, not UTF-8", f"convert the file first: iconv -f utf-16 -t utf-8 {path.name} > NEW"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error's offsets count from behind a byte-order mark, in its own copy of the bytes.
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8",
            f"convert the file first, for example: iconv -f latin1 -t utf-8 {path.name}",
        ) from None


def read_tsv(path: Path, columns: tuple[str, ...] | None = None, *, short: float = 0.0) -> Table:
    """A file of tab-separated rows without quoting.

    Args:
        columns: names for a file that has no header row; None: the first row holds them.
        short: leave out rows with too few fields, if they are at most this share of all.

    Raises:
        DataError: as `read_text`, or a row has another number of fields than the header, or there is no row.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).rstrip("\r\n").split("\n")]
    first = 1 if columns is not None else 2
    if columns is None:
        columns = tuple(lines.pop(0).split("\t"))
    fields = [line.split("\t") for line in lines]
    kept = [row for row, cells in enumerate(fields) if len(cells) >= len(columns)]
    if len(fields) - len(kept) > short * len(fields):
        kept = list(range(len(fields)))  # too many to be let pass: the check below names the first
    return checked(Table(path, columns, [fields[row] for row in kept], [row + first for row in kept]))


def checked(table: Table) -> Table:
    """The table, if it has rows, and each has one cell per column; else DataError."""
    if not table.rows:
        raise DataError(f"{table.path} has no rows, only a header", "a file of rows was expected")
    for row, cells in enumerate(table.rows):
        if len(cells) != len(table.columns):
            table.refuse(
                row,
                f"{len(cells)} fields where {len(table.columns)} were expected ({', '.join(table.columns)})",
                "the row is cut short, or holds a stray separator or line break",
            )
    return table
