"""`spdtool predict`: a stream of lines, each a text or a pair, to predictions in the same order.

Three forms, told apart by the first line that is not empty: JSON lines with the columns that the model was trained on,
or with `text` and perhaps `pair`; two columns separated by a tab; one text a line. Files with a header are those of
`inputs.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from spdtool.errors import DataError
from spdtool.serving import protocol
from spdtool.serving.classifier import Classifier

AHEAD = 8  # batches that are read before the first is computed: rows of like length come together
FORMS = ("text", "tsv", "jsonl")
MARK = "\ufeff"  # of byte order, which some editors put in front


@dataclass(frozen=True)
class Line:
    """One line: its number from 1, its text and perhaps its second one, or what is wrong with it."""

    number: int
    text: str = ""
    pair: str | None = None
    error: str | None = None


def read(lines: Iterable[str], form: str | None = None, columns: tuple[str, ...] = ()) -> Iterator[Line]:
    """The lines, as `form` says (None: as the first line that is not empty looks).

    Args:
        columns: under which a JSON line has its one or two texts; without them, or where a line has none of them, under
            `text` and `pair`.
    """
    for number, raw in enumerate(lines, start=1):
        line = (raw.removeprefix(MARK) if number == 1 else raw).rstrip("\r\n")
        if not line.strip():
            yield Line(number, error="is empty")
            continue
        form = form or look(line)
        try:
            text, pair = _parts(line, form, columns)
            yield Line(number, text, pair)
        except DataError as error:
            yield Line(number, error=error.message)


def look(line: str) -> str:
    """The form that a line has by its looks."""
    if line.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in line else "text"


def predict(classify: Classifier, lines: Iterable[Line], batch_size: int = 32) -> Iterator[dict[str, Any]]:
    """Of each line, in order: its number, and its label, probability and logits or what is wrong (`error`)."""
    source = iter(lines)
    while chunk := list(islice(source, AHEAD * batch_size)):
        logits = _logits(classify, chunk, batch_size)
        good = [place for place, found in enumerate(logits) if not isinstance(found, str)]
        told = iter(protocol.predictions(classify, np.array([logits[place] for place in good])) if good else ())
        for line, found in zip(chunk, logits, strict=True):
            yield {"line": line.number} | ({"error": found} if isinstance(found, str) else next(told))


def _logits(classify: Classifier, chunk: list[Line], batch_size: int) -> list[Any]:
    """Of each line its logits, or why there are none."""
    found: list[Any] = [_wrong(classify, line) for line in chunk]
    sound = [place for place, wrong in enumerate(found) if wrong is None]
    for paired in (False, True):
        places = [place for place in sound if (chunk[place].pair is not None) == paired]
        for place, logits in _kind(classify, [(place, chunk[place]) for place in places], batch_size):
            found[place] = logits
    return found


def _wrong(classify: Classifier, line: Line) -> str | None:
    """Why a line cannot be one that the model takes; None: it can."""
    if line.error is not None:
        return line.error
    if not all(part.strip() for part in (line.text, line.pair) if part is not None):
        return "is empty" if line.pair is None else "has an empty text"
    try:
        classify.refuse_kind(paired=line.pair is not None)
    except DataError as error:
        return f"does not fit: {error.message}"
    return None


def _kind(classify: Classifier, lines: list[tuple[int, Line]], batch_size: int) -> Iterator[tuple[int, Any]]:
    """Of lines that all have a pair, or none; where one of them spoils the call, each is computed alone."""
    if not lines:
        return
    texts, pairs = [line.text for _, line in lines], [line.pair for _, line in lines if line.pair is not None]
    try:
        computed = classify.logits(texts, pairs or None, batch_size=batch_size)
        yield from zip((place for place, _ in lines), computed, strict=True)
    except DataError as error:
        if len(lines) == 1:
            yield lines[0][0], error.message
            return
        for line in lines:
            yield from _kind(classify, [line], batch_size)


def _parts(line: str, form: str, columns: tuple[str, ...]) -> tuple[str, str | None]:
    """The text of a line and its pair.

    Raises:
        DataError: the line is not of this form.
    """
    if form == "text":
        return line, None
    if form == "tsv":
        cells = line.split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            filled = sum(bool(cell.strip()) for cell in cells)
            raise DataError(f"has {filled} filled columns of {len(cells)}: two, separated by one tab, were expected")
        return cells[0], cells[1]
    return _object(line, columns)


def _object(line: str, columns: tuple[str, ...]) -> tuple[str, str | None]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError("is no JSON object")
    named = bool(columns) and set(columns) <= value.keys() and columns != ("text",)
    keys = columns if named else ("text", "pair")
    text, pair = value.get(keys[0]), value.get(keys[1]) if len(keys) > 1 else None
    missing_pair = named and len(keys) > 1 and pair is None
    if not isinstance(text, str) or missing_pair or not (pair is None or isinstance(pair, str)):
        expected = ", ".join(f'"{name}": "..."' for name in (columns or keys))
        raise DataError(f'has no "{keys[0]}", or one that is no text: {{{expected}}} was expected')
    return text, pair
