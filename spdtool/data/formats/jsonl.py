"""Read files with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from spdtool.data.formats.table import Table, check_table, read_text
from spdtool.errors import DataError

LIST_OF_OBJECTS = "one JSON object a line; for a list of objects, name the file .json"


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


def holds_lines(text: str) -> bool:
    """Tell whether a text has several lines, the first of which is a JSON object by itself."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
