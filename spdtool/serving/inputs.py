"""Open what `spdtool predict --input` names: a file with named columns, or plain lines.

    .csv  .tsv  .jsonl  .parquet     read as `--data` reads them; the texts are in the columns that the model was
    .json  .conll                    trained on, which the bundle names, or in those that --text names
    .txt                             one text a line, or a pair separated by a tab if the model takes pairs
    anything else, - (stdin)         lines whose format is recognised: see `predict.py`

Rows are read one at a time, so memory does not grow with the file; .json and .conll alone are read whole. What cannot
be decided is refused, with the reason.
"""

from __future__ import annotations

import difflib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO, TypeAlias

from spdtool.data.files import read_file
from spdtool.data.formats.arrow import iterate_tables
from spdtool.data.formats.separated import is_quoted_tsv, iterate_csv_rows
from spdtool.data.formats.table import compose
from spdtool.errors import DataError, RecipeError
from spdtool.export.classifier import Classifier
from spdtool.serving.predict import BYTE_ORDER_MARK, InputLine, join_words, parse_lines, recognise_format

STANDARD_INPUT = "-"
WHOLE_FILES = (".json", ".conll", ".bio", ".iob")  # one row is not one line of these
PARQUET_ROWS = 1000  # rows of a Parquet file that are read at a time
NumberedCells: TypeAlias = Iterator[tuple[int, Sequence[object]]]
"""For every row the number of its first line, and its cells."""


@contextmanager
def open_input(
    source: str, classify: Classifier, line_format: str | None = None, columns: tuple[str, ...] = ()
) -> Iterator[Iterable[InputLine]]:
    """Open a file, or standard input for `-`, as lines.

    Args:
        line_format: of lines without a header; None: by the file's ending, or as the lines look.
        columns: names of the one or two text columns of a file with a header; empty: those of the training data.

    Raises:
        DataError: there is no such file, it is not what its ending says, or its text columns are unclear.
        RecipeError: columns are named, and the lines have no names.
    """
    ending = "" if source == STANDARD_INPUT else Path(source).suffix.lower()
    if columns and classify.text is not None and len(columns) != len(classify.text):
        raise DataError(f"--text names {len(columns)} columns; the model takes {quote_names(classify.text)}")
    try:
        if ending in (".parquet", ".arrow") and line_format is None:
            yield parquet_lines(Path(source), classify, columns)
        elif ending in WHOLE_FILES and line_format is None and not _holds_objects(Path(source)):
            table = read_file(Path(source))
            rows = zip(table.lines, table.rows, strict=True)
            yield lines_of_table(source, table.columns, rows, classify, columns)
        elif source == STANDARD_INPUT:
            # whatever the locale says: texts are UTF-8 everywhere
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8", errors="strict", newline="\n")
            yield read_plain_lines(sys.stdin, "standard input", classify, line_format, columns)
        else:
            newline = "" if ending == ".csv" else "\n"  # the csv reader finds line ends itself
            with open(source, encoding="utf-8-sig", newline=newline) as stream:
                yield read_stream(stream, source, ending, classify, line_format, columns)
    except FileNotFoundError:
        raise DataError(f"there is no file {source}", "a file of rows or of lines, or - for standard input") from None
    except IsADirectoryError:
        raise DataError(f"{source} is a folder", "give one file of it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is no text in UTF-8: {error}") from None


def read_stream(
    stream: TextIO,
    source: str,
    ending: str,
    classify: Classifier,
    line_format: str | None,
    columns: tuple[str, ...],
) -> Iterator[InputLine]:
    """Read an open file as its ending says, unless `line_format` says otherwise."""
    if ending in (".csv", ".tsv") and line_format is None:
        rows: NumberedCells
        if ending == ".csv":
            rows = iterate_csv_rows(stream, Path(source))
        elif is_quoted_tsv(source):
            rows = iterate_csv_rows(stream, Path(source), "\t")
        else:
            rows = tsv_rows(stream)
        _, header = next(rows, (1, None))
        if header is None:
            raise DataError(f"{source} is empty", "a header and rows were expected")
        return lines_of_table(source, header, rows, classify, columns)
    if line_format is None and ending == ".jsonl":
        line_format = "jsonl"
    elif line_format is None and ending == ".txt":
        line_format = "tsv" if takes_pairs(classify) else "text"
    return read_plain_lines(stream, source, classify, line_format, columns)


def read_plain_lines(
    stream: Iterable[str],
    source: str,
    classify: Classifier,
    line_format: str | None,
    columns: tuple[str, ...],
) -> Iterator[InputLine]:
    """Read lines without a header; refuse all of them at once if their format cannot fit the model."""
    first_lines: list[str] = []  # up to the first that is not empty
    for line in stream:
        first_lines.append(line)
        if line.strip():
            break
    if line_format is None:
        first = "".join(first_lines[-1:]).removeprefix(BYTE_ORDER_MARK)
        line_format = recognise_format(first)
        if line_format == "text" and takes_pairs(classify):
            line_format = "tsv"  # every line without a tab then says what it lacks
    if columns and line_format != "jsonl":
        raise RecipeError(f"--text names columns, and {source} is read as lines without names", "leave --text out")
    if line_format == "tsv" and classify.text is not None and len(classify.text) == 1:
        raise DataError(
            f"{source} has two columns; the model takes one text ({classify.text[0]})",
            "--format text takes a tab as part of the text; a .tsv or .csv file with a header may have further columns",
        )
    reads_words = classify.decision.reads_words
    return parse_lines(chain(first_lines, stream), line_format, columns or classify.text or (), reads_words=reads_words)


def _holds_objects(path: Path) -> bool:
    """Tell whether a .json file has an object a line, as .jsonl files have."""
    if path.suffix.lower() != ".json":
        return False
    with path.open(encoding="utf-8-sig") as stream:
        first = stream.readline()
        has_more = any(line.strip() for line in stream)
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and (has_more or "data" not in content)


def takes_pairs(classify: Classifier) -> bool:
    """Whether the model is known to take pairs."""
    return classify.text is not None and len(classify.text) == 2


def tsv_rows(stream: TextIO) -> NumberedCells:
    """Split the lines of a tsv file; empty lines at its end are no rows, those before are rows of one empty cell."""
    empty_lines = 0
    for number, line in enumerate(stream, start=1):
        text = line.rstrip("\n").removesuffix("\r")
        if not text:
            empty_lines += 1
            continue
        for empty_number in range(number - empty_lines, number):
            yield empty_number, [""]
        empty_lines = 0
        yield number, text.split("\t")


def parquet_lines(path: Path, classify: Classifier, columns: tuple[str, ...]) -> Iterator[InputLine]:
    """Read a Parquet or Arrow file, a batch of rows at a time."""
    if not path.is_file():
        raise FileNotFoundError(path)
    # The first batch of rows has the columns: what is wrong with them must be said before any row is labelled.
    tables = iterate_tables(path, PARQUET_ROWS)
    first = next(tables)

    def rows() -> NumberedCells:
        for table in chain([first], tables):
            yield from zip(table.lines, table.rows, strict=True)

    return lines_of_table(str(path), first.columns, rows(), classify, columns)


def lines_of_table(
    source: str,
    header: Sequence[object],
    rows: NumberedCells,
    classify: Classifier,
    columns: tuple[str, ...],
) -> Iterator[InputLine]:
    """Turn the rows of a table with a header into lines. Raises DataError at once if it lacks a text column."""
    names = [compose(str(name)) for name in header]
    wanted = tuple(map(compose, columns or classify.text or ()))
    chosen = choose_text_columns(source, names, wanted)
    indices = [names.index(name) for name in chosen]
    reads_words = classify.decision.reads_words
    return (line_of_cells(number, cells, names, indices, reads_words=reads_words) for number, cells in rows)


def line_of_cells(
    number: int, cells: Sequence[object], header: Sequence[str], indices: list[int], *, reads_words: bool = False
) -> InputLine:
    """Make a line of the cells at `indices`, or say what is wrong with them."""
    if len(cells) != len(header):
        expected = f"{len(header)} were expected ({', '.join(header)})"
        return InputLine(number, error=f"has {len(cells)} fields where {expected}")
    texts = []
    for index in indices:
        cell = join_words(cells[index]) if reads_words else cells[index]
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            # The row keeps its line in the output, so that both files stay aligned.
            return InputLine(number, error=f"has no text in the column {header[index]!r}")
        if not isinstance(cell, str):
            return InputLine(number, error=f"has a {type(cell).__name__} in the column {header[index]!r}, not text")
        texts.append(cell)
    return InputLine(number, *texts)


def choose_text_columns(source: str, header: Sequence[str], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Check that the file has the columns `wanted`, once each.

    Raises:
        DataError: it has not; or none are wanted, because the model does not say which it was trained on.
    """
    for name in wanted:
        if header.count(name) > 1:
            raise DataError(f"{source} has two columns called {name!r}", "rename one of them")
    missing = [name for name in wanted if name not in header]
    if wanted and not missing:
        return wanted
    problem, guess = f"{source} has the columns {quote_names(header)}", ""
    if missing:
        problem += f", and not {quote_names(missing)}"
        similar = difflib.get_close_matches(missing[0], header, n=3, cutoff=0.5)
        if similar:
            guess = f"did you mean {' or '.join(map(repr, similar))}? "
    raise DataError(
        problem,
        f"{guess}--text FIRST or FIRST,SECOND names the columns of the texts; "
        "a file of lines without a header is read with --format tsv or --format text",
    )


def quote_names(names: Sequence[str]) -> str:
    """List names in quotation marks."""
    return ", ".join(map(repr, names))
