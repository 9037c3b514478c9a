"""Read files of separated fields: csv with standard quoting, tsv without.

Rows of a tsv file end at `\\n` only and fields at `\\t` only: `str.splitlines` and the csv module's quoting both break
real files. It counts as quoted only where its quotation marks cannot be part of the texts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from spdtool.data.formats.table import MOST_DIGITS, Table, check_table, read_text
from spdtool.data.formats.written_lists import read_written_lists
from spdtool.errors import DataError

LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit of 131,072 is below the length of a book
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)  # with which spreadsheets begin a csv file


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


def read_user_tsv(path: Path) -> Table:
    """Read a tsv file of a user: as `read_tsv`, or with quoting where its quotation marks must be that."""
    text = read_text(path)
    if '"' not in text or not is_quoted_tsv(path):
        return read_written_lists(read_tsv(path))
    rows, lines = list[list[object]](), list[int]()
    for line, cells in iterate_csv_rows(io.StringIO(text, newline=""), path, "\t"):
        rows.append([*cells])
        lines.append(line)
    table = Table(path, tuple(map(str, rows[0])), rows[1:], lines[1:], note="its fields are quoted")
    return read_written_lists(check_table(table))


def is_quoted_tsv(path: str | Path) -> bool:
    """Tell whether the quotation marks of a tsv file are a writer's, and not part of its texts.

    They are if every row is what a csv writer makes of its fields: quoted where they must be, or all, or all but
    numbers. A text that merely stands in quotation marks is written otherwise.
    """
    consumed: list[str] = []

    def remember(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            consumed.append(line)
            yield line

    csv.field_size_limit(LONGEST_FIELD)
    has_quotes = False
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            for cells in csv.reader(remember(stream), delimiter="\t", strict=True):
                line = "".join(consumed).rstrip("\r\n")
                consumed.clear()
                if '"' not in line:
                    continue
                has_quotes = True
                if line not in _written_rows(cells):
                    return False
    except (csv.Error, UnicodeDecodeError):
        return False
    return has_quotes


def _written_rows(cells: list[str]) -> list[str]:
    """Return the line that a csv writer makes of the cells, by each of its ways of quoting."""
    lines = []
    typed = [int(cell) if cell.isdecimal() and len(cell) <= MOST_DIGITS else cell for cell in cells]
    ways: tuple[tuple[Sequence[object], Literal[0, 1, 2]], ...]
    ways = ((cells, csv.QUOTE_MINIMAL), (cells, csv.QUOTE_ALL), (typed, csv.QUOTE_NONNUMERIC))
    for row, quoting in ways:
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter="\t", quoting=quoting, lineterminator="\n").writerow(row)
        lines.append(stream.getvalue()[:-1])
    return lines


def read_csv(path: Path) -> Table:
    """Read a file with standard quoting and a header; blank lines are passed over.

    Its fields are separated by commas, or by what the header has instead: see `iterate_csv_rows`.
    """
    text = read_text(path)
    rows, lines = list[list[object]](), list[int]()
    # newline="" leaves line ends to the csv module: a quoted cell may hold one.
    for line, cells in iterate_csv_rows(io.StringIO(text, newline=""), path):
        rows.append([*cells])
        lines.append(line)
    separator, _ = guess_separator(text.split("\n", 1)[0])
    note = f"its fields are separated by {SEPARATORS[separator]}" if separator in SEPARATORS else ""
    if not rows:
        raise DataError(f"{path} is empty", "a file of rows was expected")
    return read_written_lists(check_table(Table(path, tuple(map(str, rows[0])), rows[1:], lines[1:], note=note)))


def guess_separator(first_line: str) -> tuple[str, bool]:
    """Return the separator of a csv file by its first line, and whether that line only names it, as `sep=;` does.

    Anything but a comma is chosen only for a header that has no comma and that the other separator cuts.
    """
    named = SEPARATOR_LINE.fullmatch(first_line.removeprefix("\ufeff"))
    if named is not None:
        return named[1], True
    if "," not in first_line:
        for separator in SEPARATORS:
            if separator in first_line:
                return separator, False
    return ",", False


def iterate_csv_rows(
    stream: Iterable[str], path: Path, separator: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a csv stream with standard quoting, each with the line in which it begins.

    Args:
        stream: its lines.
        path: for messages.
        separator: of the fields; None: a comma, or what the first line has instead.

    Raises:
        DataError: the quoting is broken; names the line in which the row begins.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines, names_separator = iter(stream), False
    if separator is None:
        first = next(lines, "")
        separator, names_separator = guess_separator(first)
        lines = chain([first], lines)
    reader, first_line = csv.reader(lines, strict=True, delimiter=separator), 1
    try:
        for row in reader:
            if row and not names_separator:
                yield first_line, row
            names_separator, first_line = False, reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that begins in line {first_line}: {error}",
            "is a quotation mark left open, or not doubled? for rows without quoting, name the file .tsv and use tabs",
        ) from None
