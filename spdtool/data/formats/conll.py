"""Read CoNLL files: a word and its tags a line, a blank line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from spdtool.data.formats.table import Table, read_text
from spdtool.errors import DataError

TOKENS, TAGS = "tokens", "tags"
DOCUMENT_START = "-DOCSTART-"  # CoNLL 2003 parts documents by a line with this word
COMMENT = "# "  # of CoNLL-U and MultiCoNER
ASSIGNMENT = re.compile(r"# \S+ = ")


def read_conll(path: Path) -> Table:
    """Read a file as a table of sentences: `tokens` from the first column, `tags` from the last.

    Columns between them are called column2, column3 and so on. Fields are separated by tabs where a line has one,
    otherwise by spaces. Comments before a sentence are passed over: see `_is_comment`.

    Raises:
        DataError: a line has one field only, or another number of fields than the line before.
    """
    return _read_sentences(path, least_fields=2)


def read_conll_words(path: Path) -> Table:
    """Read a file as `read_conll` does; without tags, where a line is a word alone, `tokens` is the only column.

    Raises:
        DataError: a line has another number of fields than the line before.
    """
    return _read_sentences(path, least_fields=1)


def _read_sentences(path: Path, least_fields: int) -> Table:
    rows: list[list[object]] = []
    lines: list[int] = []
    sentence: list[list[str]] = []
    first_line, content = 1, read_text(path).split("\n")
    width, first_word = 0, _find_word_line(content)
    for number, line in enumerate([*content, ""], start=1):
        line = line.rstrip("\r")
        is_document_start = line.startswith(DOCUMENT_START)
        if not line.strip() or is_document_start:
            if sentence:
                rows.append([list(column) for column in zip(*sentence, strict=True)])
                lines.append(first_line)
            sentence = []
            continue
        if not sentence and _is_comment(line, first_word):
            continue
        fields = _split_line(line)
        if len(fields) < least_fields:
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
    return Table(path, (TOKENS, *middle, TAGS)[:width], rows, lines)


def _split_line(line: str) -> list[str]:
    """Return the fields of a line that hold something."""
    fields = line.split("\t") if "\t" in line else line.split(" ")
    return [field for field in fields if field.strip()]


def _find_word_line(lines: Sequence[str]) -> str:
    """Return the first line that can only be a word with its tags; nothing where there is none."""
    for line in lines:
        if line.strip() and not line.startswith((DOCUMENT_START, COMMENT)):
            return line.rstrip("\r")
    return ""


def _is_comment(line: str, first_word: str) -> bool:
    """Tell whether a line that begins with a # and a space is a comment, such as `# text = ...`.

    A word may be a # too: such a line has the separator and the number of fields of the other words.
    """
    if not line.startswith(COMMENT):
        return False
    has_form = ("\t" in line) == ("\t" in first_word) and len(_split_line(line)) == len(_split_line(first_word))
    return not has_form or ASSIGNMENT.match(line) is not None
