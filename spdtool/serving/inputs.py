"""What `spdtool predict --input` names, as lines: a file with named columns, or plain lines.

    .csv  .tsv  .jsonl  .parquet     read as `--data` reads them; the texts are in the columns that the model was
                                     trained on, which the bundle knows, or in those that --text names
    .txt                             a text a line, or a pair separated by a tab where the model takes one
    anything else, - (stdin)         lines as they look: see `lines.py`

A row at a time is read: what is in memory does not grow with the file. What cannot be told is refused, with what was
found.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from spdtool.data import local
from spdtool.errors import DataError, RecipeError
from spdtool.serving import predict as lines
from spdtool.serving.classifier import Classifier
from spdtool.serving.predict import Line

STANDARD_INPUT = "-"
PIECE = 1000  # rows of a Parquet file that are read at a time
Rows = Iterator[tuple[int, Sequence[Any]]]
"""The number of each row, that of the line in which it begins, and its cells."""


@contextmanager
def opened(
    source: str, classify: Classifier, form: str | None = None, columns: tuple[str, ...] = ()
) -> Iterator[Iterable[Line]]:
    """The lines of a file, or of standard input.

    Args:
        form: of plain lines, which have no header; None: as the file's name ends, or as they look.
        columns: of a file with named ones, those of the one or two texts; empty: those that the model was trained on.

    Raises:
        DataError: there is no such file, it is not what its name says, or its columns cannot be told.
        RecipeError: columns are named, and the lines have no names.
    """
    ending = Path(source).suffix.lower() if source != STANDARD_INPUT else ""
    if columns and classify.text is not None and len(columns) != len(classify.text):
        raise DataError(f"--text names {len(columns)} columns; the model takes {_quoted(classify.text)}")
    try:
        if ending == ".parquet" and form is None:
            yield _parquet(Path(source), classify, columns)
        elif source == STANDARD_INPUT:
            yield _plain(sys.stdin, "standard input", classify, form, columns)
        else:
            with open(source, encoding="utf-8-sig", newline="" if ending == ".csv" else "\n") as stream:
                yield _of_file(stream, source, ending, classify, form, columns)
    except FileNotFoundError:
        raise DataError(f"there is no file {source}", "a file of rows or of lines, or - for standard input") from None
    except IsADirectoryError:
        raise DataError(f"{source} is a folder", "give one file of it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is no text in UTF-8: {error}") from None


def _of_file(
    stream: TextIO, source: str, ending: str, classify: Classifier, form: str | None, columns: tuple[str, ...]
) -> Iterator[Line]:
    if ending in TABLES and form is None:
        rows = TABLES[ending](stream, Path(source))
        _, header = next(rows, (1, None))
        if header is None:
            raise DataError(f"{source} is empty", "a header and rows were expected")
        return _named(source, header, rows, classify, columns)
    if ending == ".jsonl":
        form = form or "jsonl"
    elif ending == ".txt" and form is None:
        form = "tsv" if classify.text is not None and len(classify.text) == 2 else "text"
    return _plain(stream, source, classify, form, columns)


def _plain(
    stream: Iterable[str], source: str, classify: Classifier, form: str | None, columns: tuple[str, ...]
) -> Iterator[Line]:
    """Lines without a header; refused as a whole where none of them could fit the model."""
    ahead: list[str] = []
    for line in stream:
        ahead.append(line)
        if line.strip():
            break
    first = ahead[-1].removeprefix(lines.MARK) if ahead else ""
    looks = lines.look(first)
    form = form or ("tsv" if looks == "text" and classify.text is not None and len(classify.text) == 2 else looks)
    if columns and form != "jsonl":
        raise RecipeError(f"--text names columns, and {source} is read as lines without names", "leave --text out")
    if form == "tsv" and classify.text is not None and len(classify.text) == 1:
        raise DataError(
            f"{source} has two columns; the model takes one text ({classify.text[0]})",
            "--format text takes a tab as part of the text; a .tsv or .csv file with a header may have further columns",
        )
    return lines.read(chain(ahead, stream), form, columns or classify.text or ())


def _csv(stream: TextIO, path: Path) -> Rows:
    return local.csv_rows(stream, path)


def _tsv(stream: TextIO, path: Path) -> Rows:  # noqa: ARG001
    blank = 0  # lines at the end of the file are no rows
    for number, line in enumerate(stream, start=1):
        text = line.rstrip("\n").removesuffix("\r")
        if text:
            yield from ((number - before, [""]) for before in range(blank, 0, -1))
            yield number, text.split("\t")
        blank = 0 if text else blank + 1


TABLES = {".csv": _csv, ".tsv": _tsv}


def _parquet(path: Path, classify: Classifier, columns: tuple[str, ...]) -> Iterator[Line]:
    if not path.is_file():
        raise FileNotFoundError(path)
    pieces = local.parquet_pieces(path, PIECE)
    first = next(pieces)
    rows = (pair for piece in chain([first], pieces) for pair in zip(piece.lines, piece.rows, strict=True))
    return _named(str(path), first.columns, rows, classify, columns)


def _named(
    source: str, header: Sequence[str], rows: Rows, classify: Classifier, columns: tuple[str, ...]
) -> Iterator[Line]:
    """The lines of a file whose first row names its columns."""
    chosen = _choose(source, header, classify.text, columns)
    places = [header.index(name) for name in chosen]
    return (_line(number, cells, header, places) for number, cells in rows)


def _line(number: int, cells: Sequence[Any], header: Sequence[str], places: list[int]) -> Line:
    if len(cells) != len(header):
        return Line(number, error=f"has {len(cells)} fields where {len(header)} were expected ({', '.join(header)})")
    texts = [cells[place] for place in places]
    for place, text in zip(places, texts, strict=True):
        if text is None or (isinstance(text, str) and not text.strip()):
            return Line(number, error=f"has no text in the column {header[place]!r}")
        if not isinstance(text, str):
            return Line(number, error=f"has a {type(text).__name__} in the column {header[place]!r}, not text")
    return Line(number, *texts)


def _choose(
    source: str, header: Sequence[str], known: tuple[str, ...] | None, asked: tuple[str, ...]
) -> tuple[str, ...]:
    """The columns that hold the texts.

    Raises:
        DataError: the file has no such columns, or the model does not know which it was trained on.
    """
    wanted = asked or known or ()
    twice = sorted({name for name in wanted if header.count(name) > 1})
    if twice:
        raise DataError(f"{source} has two columns called {twice[0]!r}", "rename one of them")
    if wanted and set(wanted) <= set(header):
        return wanted
    missing = [name for name in wanted if name not in header]
    lacks = f", and not {_quoted(missing)}" if missing else ""
    near = difflib.get_close_matches(missing[0], header, n=3, cutoff=0.5) if missing else []
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise DataError(
        f"{source} has the columns {_quoted(header)}{lacks}",
        f"{guess}--text FIRST or FIRST,SECOND names the columns of the texts; "
        "a file of lines without a header is read with --format tsv or --format text",
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
