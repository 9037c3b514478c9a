"""Read CoNLL files: a word and its tags a line, a blank line after each sentence."""

from __future__ import annotations

from pathlib import Path

from spdtool.data.formats.table import Table, read_text
from spdtool.errors import DataError

TOKENS, TAGS = "tokens", "tags"
DOCUMENT_START = "-DOCSTART-"  # CoNLL 2003 parts documents by a line with this word


def read_conll(path: Path) -> Table:
    """Read a file as a table of sentences: `tokens` from the first column, `tags` from the last.

    Columns between them are called column2, column3 and so on. Fields are separated by tabs where a line has one,
    otherwise by spaces.

    Raises:
        DataError: a line has one field only, or another number of fields than the line before.
    """
    rows: list[list[object]] = []
    lines: list[int] = []
    sentence: list[list[str]] = []
    width, first_line = 0, 1
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        line = line.rstrip("\r")
        is_document_start = line.startswith(DOCUMENT_START)
        if not line.strip() or is_document_start:
            if sentence:
                rows.append([list(column) for column in zip(*sentence, strict=True)])
                lines.append(first_line)
            sentence = []
            continue
        fields = line.split("\t") if "\t" in line else line.split(" ")
        fields = [field for field in fields if field.strip()]
        if len(fields) < 2:
            raise DataError(
                f"{path}, line {number}: {line[:60]!r} is no word with its tag",
                "a word and its tag a line, separated by a tab or a space; a blank line after each sentence",
            )
        if width and len(fields) != width:
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields where the lines before have {width}: {line[:60]!r}",
                "the line is cut short, or a word holds a separator",
            )
        width = len(fields)
        if not sentence:
            first_line = number
        sentence.append(fields)
    if not rows:
        raise DataError(f"{path} has no sentences", "a word and its tag a line")
    middle = [f"column{number}" for number in range(2, width)]
    return Table(path, (TOKENS, *middle, TAGS), rows, lines)
