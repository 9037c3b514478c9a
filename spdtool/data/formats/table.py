"""A table of rows, as every format gives it, and what is checked of every file."""

from __future__ import annotations

import codecs
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from spdtool.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")
MOST_DIGITS = 4000  # of a whole number: Python refuses to read over 4,300
LFS_POINTER = b"version https://git-lfs"
START = 64  # bytes that tell what a file is
UTF_16_LEAST = 4  # zero bytes at every second place: short texts of UTF-16 without a mark
UNZIP = "decompress it first"
TO_CSV = "save it as csv first: in a spreadsheet program, Save as, CSV UTF-8"
# First bytes of files that are no text, what such a file is, and what to do with it.
BINARY_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive or a workbook of a spreadsheet program", f"{UNZIP}, or {TO_CSV}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old workbook of a spreadsheet program", TO_CSV),
    (b"\x1f\x8b", "compressed by gzip", f"{UNZIP}: gunzip"),
    (b"BZh91AY&SY", "compressed by bzip2", f"{UNZIP}: bunzip2"),
    (b"\xfd7zXZ\x00", "compressed by xz", f"{UNZIP}: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", f"{UNZIP}: unzstd"),
    (b"PAR1\x15", "a parquet file", "rename it: .parquet"),
    (b"ARROW1\x00", "an arrow file", "rename it: .arrow"),
    (b"SQLite format 3\x00", "a database of SQLite", "write its rows to a csv file first"),
    (b"%PDF-", "a PDF", "a file of rows was expected"),
)
ARROW_ENDINGS = (".parquet", ".arrow")


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: the file.
        columns: the names, as the file has them.
        rows: one list of cells per row, each as long as `columns`.
        lines: the number of each row in the file, from 1, for messages.
        unit: what `lines` counts: `line`, or `row` where the format has no lines.
        class_names: for a column of class numbers, the names that the file's schema gives them.
        note: how the file was read, where that is not what its ending says.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[object]]
    lines: list[int]
    unit: str = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def column(self, name: str) -> list[object]:
        """Return the cells of the column `name`, which must exist."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def cell(self, row: int, name: str) -> object:
        """Return the cell of row number `row` (from 0) in the column `name`, which must exist."""
        return self.rows[row][self.columns.index(name)]

    def join_notes(self, *further: str) -> str:
        """Return the table's note and further ones as one line."""
        return "; ".join(filter(None, (self.note, *further)))

    def refuse(self, row: int, problem: str, hint: str | None = None) -> NoReturn:
        """Raise DataError about row number `row` (from 0)."""
        raise DataError(f"{self.location(row)}: {problem}", hint)

    def location(self, row: int) -> str:
        """Name the file and the line of row number `row` (from 0), for messages."""
        return f"{self.path}, {self.unit} {self.lines[row]}"


def check_table(table: Table) -> Table:
    """Return the table, with the names of its columns in one Unicode form.

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
    return replace(table, columns=tuple(map(compose, table.columns)))


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
    _refuse_utf_16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its offsets count from behind a byte-order mark, in a copy of the bytes that the error holds.
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8",
            "convert the file first; if it was written on Windows in western Europe or America: "
            f"{_conversion(path, 'windows-1252')}",
        ) from None


def _conversion(path: Path, encoding: str) -> str:
    """Return the command that converts a file to UTF-8."""
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _refuse_utf_16(path: Path, content: bytes) -> None:
    start, encoding = content[:START], ""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        for name, zeros, others in (("utf-16le", start[1::2], start[::2]), ("utf-16be", start[::2], start[1::2])):
            if zeros.count(0) >= UTF_16_LEAST and not others.count(0):
                encoding = name
    if encoding:
        found = encoding[:6].upper()
        raise DataError(f"{path} is {found}, not UTF-8", f"convert the file first: {_conversion(path, encoding)}")


def refuse_foreign(path: Path) -> None:
    """Raise DataError for what no reader reads: UTF-16, another format, a pointer of git-lfs in place of a file."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(START)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path} is only a pointer of git-lfs", f"in {path.parent}, type: git lfs pull")
    if path.suffix.lower() in ARROW_ENDINGS:  # whose readers say what is wrong
        return
    for mark, kind, hint in BINARY_FORMATS:
        if start.startswith(mark):
            raise DataError(f"{path} is {kind}, not the {path.suffix} that its name says", hint)
    _refuse_utf_16(path, start)


def is_encodable(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: JSON can spell a half of a surrogate pair, which cannot."""
    # `isascii` is a flag of the string: the search runs over few texts.
    return text.isascii() or SURROGATE.search(text) is None


def compose(name: str) -> str:
    """Return a name in the Unicode form with one character for a letter with its accent (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
