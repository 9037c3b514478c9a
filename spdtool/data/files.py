"""Read files of rows strictly: every defect is a DataError that names the file, the line and what is wrong there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from spdtool.data.formats.arrow import iterate_tables, read_arrow, read_parquet
from spdtool.data.formats.conll import read_conll
from spdtool.data.formats.jsonl import read_jsonl
from spdtool.data.formats.separated import iterate_csv_rows, read_csv, read_user_tsv
from spdtool.data.formats.squad import read_json
from spdtool.data.formats.table import TO_CSV, UNZIP, Table, compose, refuse_foreign
from spdtool.data.formats.written_lists import read_written_lists
from spdtool.data.kinds.tags import OUTSIDE, is_span_tag
from spdtool.errors import DataError

LINES = ".txt"
HEADER_ROWS = 20  # read with a header, to see what its columns hold
ENDING_HINTS = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".tar", ".7z"), UNZIP),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), TO_CSV),
    **dict.fromkeys((".feather", ".ipc"), "if it is an arrow file, rename it: .arrow"),
    **dict.fromkeys((".ndjson", ".jsonlines"), "with an object a line, rename it: .jsonl"),
    **dict.fromkeys((".pkl", ".pickle", ".h5", ".orc", ".db", ".sqlite"), "write its rows to a csv file first"),
}
"""What to do with a file that has another ending."""


def read_file(path: Path, readers: Mapping[str, Callable[[Path], Table]] | None = None) -> Table:
    """Read a file in the format that its ending names.

    Args:
        readers: ending to the function that reads it; None: `READERS`.

    Raises:
        DataError: the ending is unknown, or the file is not what it says.
    """
    read = (READERS if readers is None else readers).get(path.suffix.lower())
    if read is None:
        raise _unknown_ending(path)
    refuse_foreign(path)
    table = read(path)
    repeated = sorted({name for name in table.columns if name and table.columns.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has two columns called {', '.join(map(repr, repeated))}", "rename one of them")
    return table


def _unknown_ending(path: Path) -> DataError:
    ending = path.suffix.lower()
    hint = f"known endings: {', '.join(READERS)}"
    if ending in ENDING_HINTS:
        hint = f"{ENDING_HINTS[ending]}; {hint}"
    if ending == LINES:
        hint += f"; {hint_of_lines(path)}"
    if not ending:
        return DataError(f"the name {path} has no ending, which says how it is read", hint)
    return DataError(f"{path} ends in {path.suffix!r}", hint)


def hint_of_lines(path: Path) -> str:
    """Say how a file of lines can be read, by its first ones."""
    with open(path, encoding="utf-8-sig", errors="replace") as stream:
        fields = [line.split() for line in islice(stream, HEADER_ROWS) if line.strip()]
    if fields and all(len(each) > 1 and (each[-1] == OUTSIDE or is_span_tag(each[-1])) for each in fields):
        return f"it looks like a CoNLL file, a word and its tag a line: call it {path.stem}.conll"
    return (
        "rows with labels are read from files with columns; a text a line, without labels, is for sentence "
        "embeddings: add --teacher, a sentence encoder's folder"
    )


def read_header(path: Path) -> Table:
    """Read the columns of a file and its first rows, in little time; a JSON file may have further columns.

    Raises:
        DataError: the ending is unknown, or the file has no header.
    """
    ending = path.suffix.lower()
    if ending not in READERS:
        raise _unknown_ending(path)
    refuse_foreign(path)
    rows: list[list[object]] = []
    if READERS[ending] in (read_conll, read_json):
        return READERS[ending](path)  # the head of such a file does not show its columns
    if ending in (".parquet", ".arrow"):
        for table in iterate_tables(path, HEADER_ROWS):
            return table
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if ending == ".csv" else "\n") as stream:
        if ending == ".jsonl":
            return _first_objects(path, stream)
        if ending == ".csv":
            rows = [[*cells] for _, cells in islice(iterate_csv_rows(stream, path), HEADER_ROWS)]
        else:
            rows = [[*line.rstrip("\r\n").split("\t")] for line in islice(stream, HEADER_ROWS)]
    if not rows:
        raise DataError(f"{path} is empty", "a file of rows was expected")
    columns = tuple(compose(str(name)) for name in rows[0])
    full_rows = [row for row in rows[1:] if len(row) == len(columns)]
    return read_written_lists(Table(path, columns, full_rows, list(range(2, 2 + len(full_rows)))))


def _first_objects(path: Path, stream: Iterable[str]) -> Table:
    columns: dict[str, None] = {}
    records = []
    for line in islice(stream, HEADER_ROWS):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break  # where the whole file is read, it is refused by its line
        if isinstance(record, dict):
            columns |= dict.fromkeys(map(compose, record))
            records.append({compose(name): value for name, value in record.items()})
    rows = [list(map(record.get, columns)) for record in records]
    return Table(path, tuple(columns), rows, list(range(1, 1 + len(rows))))


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".tsv": read_user_tsv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".json": read_json,
    ".conll": read_conll,
    ".bio": read_conll,
    ".iob": read_conll,
}
"""Ending of a file's name to the function that reads it."""
