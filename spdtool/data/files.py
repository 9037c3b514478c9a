"""Read files of rows strictly: every defect is a DataError that names the file, the line and what is wrong there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from spdtool.data.formats.arrow import iterate_tables, read_arrow, read_parquet
from spdtool.data.formats.conll import read_conll
from spdtool.data.formats.separated import iterate_csv_rows, read_csv, read_user_tsv
from spdtool.data.formats.squad import read_json
from spdtool.data.formats.table import TO_CSV, UNZIP, Table, check_table, compose, read_text, refuse_foreign
from spdtool.errors import DataError

HEADER_ROWS = 20  # read with a header, to see what its columns hold
ENDING_HINTS = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".tar", ".7z"), UNZIP),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), TO_CSV),
    **dict.fromkeys((".feather", ".ipc"), "if it is an arrow file, rename it: .arrow"),
    **dict.fromkeys((".ndjson", ".jsonlines"), "with an object a line, rename it: .jsonl"),
    **dict.fromkeys((".pkl", ".pickle", ".h5", ".orc", ".db", ".sqlite"), "write its rows to a csv file first"),
}
"""What to do with a file that has another ending."""
LIST_OF_OBJECTS = "one JSON object a line; for a list of objects, name the file .json"


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
    if ending == ".txt":
        hint += (
            "; a text a line, without labels, is for sentence embeddings: add --teacher, a sentence encoder's folder"
        )
    if not ending:
        return DataError(f"the name {path} has no ending, which says how it is read", hint)
    return DataError(f"{path} ends in {path.suffix!r}", hint)


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
    return Table(path, columns, full_rows, list(range(2, 2 + len(full_rows))))


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
            hint = LIST_OF_OBJECTS if line.lstrip().startswith("[") else "one JSON object a line"
            raise DataError(f"{path}, line {line_number}: not JSON: {error}", hint) from None
        if not isinstance(record, dict):
            hint = LIST_OF_OBJECTS if isinstance(record, list) else "one object a line"
            raise DataError(f"{path}, line {line_number}: a {type(record).__name__}, not an object", hint)
        columns |= dict.fromkeys(record)
        records.append(record)
        lines.append(line_number)
    # Only now are all columns known: a key may appear in the last line first.
    rows = [list(map(record.get, columns)) for record in records]
    return check_table(Table(path, tuple(columns), rows, lines))


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
