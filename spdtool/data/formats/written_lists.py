"""Lists and objects that a csv or tsv file holds as text, as pandas writes them: `['joy', 'fear']`, `[0 1]`."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace

from spdtool.data.formats.table import Table

ENDS = {"[": "]", "{": "}"}
ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\]{}]+)"""
SPACED = re.compile(rf"\[\s*(?:{ITEM}(?:\s+{ITEM})*)?\s*\]")  # numpy prints no commas


def read_written_lists(table: Table) -> Table:
    """Return the table with the lists of those columns that hold nothing else, beside empty cells."""
    changed: dict[int, list[object]] = {}
    for index in range(len(table.columns)):
        values = _parse_cells(row[index] for row in table.rows)
        if values is not None:
            changed[index] = values
    if not changed:
        return table
    rows = []
    for number, row in enumerate(table.rows):
        rows.append([changed[index][number] if index in changed else cell for index, cell in enumerate(row)])
    names = ", ".join(repr(table.columns[index]) for index in changed)
    return replace(table, rows=rows, note=table.join_notes(f"the lists in {names} are written as text"))


def _parse_cells(cells: Iterable[object]) -> list[object] | None:
    """Return the cells as lists or objects, empty ones as they are; None where a cell is none."""
    values: list[object] = []
    has_list = False
    for cell in cells:
        if not isinstance(cell, str):
            return None
        value = parse_written(cell) if cell.strip() else cell
        if value is None:
            return None
        has_list = has_list or value is not cell
        values.append(value)
    return values if has_list else None


def parse_written(text: str) -> list[object] | dict[str, object] | None:
    """Return the list or object that a text spells in JSON, in Python or as numpy prints it; None for another text."""
    text = text.strip()
    if not text or ENDS.get(text[0]) != text[-1]:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = _parse_literal(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    return value if isinstance(value, list | dict) else None


def _parse_literal(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a backslash in a text
        if SPACED.fullmatch(text):  # before Python, which would join 'joy' 'fear' to one text
            return [ast.literal_eval(item) for item in re.findall(ITEM, text)]
        return ast.literal_eval(text)
