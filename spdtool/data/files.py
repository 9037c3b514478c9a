"""Read files of rows strictly: every defect is a DataError that names the file, the line and what is wrong there.

Rows end at `\\n` only and fields at `\\t` only: `str.splitlines` and the csv module's quoting both break real files.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spdtool.errors import DataError

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: the file.
        columns: the names, as the file has them.
        rows: one list of cells per row, each as long as `columns`.
        lines: the number of each row in the file, from 1, for messages.
        unit: what `lines` counts: `line`, or `row` where the format has no lines.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[object]]
    lines: list[int]
    unit: str = "line"

    def column(self, name: str) -> list[object]:
        """Return the cells of the column `name`, which must exist."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def refuse(self, row: int, problem: str, hint: str | None = None) -> NoReturn:
        """Raise DataError about row number `row` (from 0)."""
        raise DataError(f"{self.location(row)}: {problem}", hint)

    def location(self, row: int) -> str:
        """Name the file and the line of row number `row` (from 0), for messages."""
        return f"{self.path}, {self.unit} {self.lines[row]}"


def read_file(path: Path) -> Table:
    """Read a file in the format that its ending names.

    Raises:
        DataError: the ending is unknown, or the file is not what it says.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}", f"known endings: {', '.join(READERS)}")
    table = read(path)
    repeated = sorted({name for name in table.columns if name and table.columns.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has two columns called {', '.join(map(repr, repeated))}", "rename one of them")
    return table


def read_text(path: Path) -> str:
    """Read a UTF-8 file, without its byte-order mark.

    Raises:
        DataError: it cannot be opened, is empty, or is not UTF-8 (with the line and the byte).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{path} is empty", "a file of rows was expected")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path} is UTF-16, not UTF-8", f"convert the file first: iconv -f utf-16 -t utf-8 {path.name} > NEW"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its offsets count from behind a byte-order mark, in a copy of the bytes that the error holds.
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8",
            f"convert the file first, for example: iconv -f latin1 -t utf-8 {path.name}",
        ) from None


def read_tsv(path: Path, columns: tuple[str, ...] | None = None, *, tolerated_short_rows: float = 0.0) -> Table:
    """Read a file of tab-separated rows without quoting.

    Args:
        path: the file.
        columns: names for a file that has no header row; None: the first row holds them.
        tolerated_short_rows: leave out rows with too few fields, if they are at most this share of all.

    Raises:
        DataError: as `read_text`, or a row has another number of fields than the header, or there is no row.
    """
    rows: list[list[object]] = []
    for text_line in read_text(path).rstrip("\r\n").split("\n"):
        # One `\r` only: a file may have a text that ends in another one.
        rows.append([*text_line.removesuffix("\r").split("\t")])
    first_line = 1
    if columns is None:
        columns = tuple(map(str, rows.pop(0)))
        first_line = 2
    full_rows = [row for row, cells in enumerate(rows) if len(cells) >= len(columns)]
    if len(rows) - len(full_rows) > tolerated_short_rows * len(rows):
        full_rows = list(range(len(rows)))  # too many to leave out: the check below names the first
    lines = [row + first_line for row in full_rows]
    return check_table(Table(path, columns, [rows[row] for row in full_rows], lines))


def read_csv(path: Path) -> Table:
    """Read a comma-separated file with standard quoting and a header; blank lines are passed over."""
    rows, lines = list[list[object]](), list[int]()
    # newline="" leaves line ends to the csv module: a quoted cell may hold one.
    for line, cells in iterate_csv_rows(io.StringIO(read_text(path), newline=""), path):
        rows.append([*cells])
        lines.append(line)
    return check_table(Table(path, tuple(map(str, rows[0])), rows[1:], lines[1:]))


def iterate_csv_rows(stream: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a comma-separated stream with standard quoting, each with the line in which it begins.

    Raises:
        DataError: the quoting is broken; names the line in which the row begins.
    """
    reader, first_line = csv.reader(stream, strict=True), 1
    try:
        for row in reader:
            if row:
                yield first_line, row
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that begins in line {first_line}: {error}",
            "is a quotation mark left open, or not doubled? for rows without quoting, name the file .tsv and use tabs",
        ) from None


def read_jsonl(path: Path) -> Table:
    """Read a file with one JSON object a line; a key that a line lacks is a missing value."""
    records, lines = [], []
    columns: dict[str, None] = {}  # an ordered set
    for line_number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line_number}: not JSON: {error}", "one JSON object a line") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{path}, line {line_number}: a {kind}, not an object", "one object a line")
        columns |= dict.fromkeys(record)
        records.append(record)
        lines.append(line_number)
    # Only now are all columns known: a key may appear in the last line first.
    rows = [list(map(record.get, columns)) for record in records]
    return check_table(Table(path, tuple(columns), rows, lines))


def read_parquet(path: Path) -> Table:
    """Read a parquet file."""
    import pyarrow  # here: it takes longer to import than most files to read
    from pyarrow import parquet

    try:
        content = parquet.read_table(path, partitioning=None)  # else a folder called key=value becomes a column
        return _parquet_table(path, content, first_row=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from None


def iterate_parquet_tables(path: Path, row_count: int) -> Iterator[Table]:
    """Read a parquet file `row_count` rows at a time; raises as `read_parquet` does."""
    import pyarrow
    from pyarrow import parquet

    first_row = 1
    try:
        with parquet.ParquetFile(path) as file:
            for content in file.iter_batches(row_count):
                yield _parquet_table(path, content, first_row)
                first_row += content.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from None


def _parquet_table(path: Path, content: pyarrow.Table | pyarrow.RecordBatch, first_row: int) -> Table:
    columns = [column.to_pylist() for column in content.columns]
    rows = list(map(list, zip(*columns, strict=True)))
    lines = list(range(first_row, first_row + len(rows)))
    return check_table(Table(path, tuple(content.schema.names), rows, lines, unit="row"))


def _unreadable_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}")


def check_table(table: Table) -> Table:
    """Return the table.

    Raises:
        DataError: it has no rows, or a row has another number of cells than there are columns.
    """
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


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""Ending of a file's name to the function that reads it."""
