"""`spdtool predict`: a stream of lines, each a text or a pair, to predictions in the same order.

Three forms, told apart by the first line that is not empty: JSON lines with `text` and perhaps `pair`; two columns
separated by a tab; one text a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from spdtool.classifier import Classifier
from spdtool.errors import DataError
from spdtool.serving import protocol

AHEAD = 8  # batches that are read before the first is computed: rows of like length come together
FORMS = ("text", "tsv", "jsonl")


@dataclass(frozen=True)
class Line:
    """One line: its number from 1, its text and perhaps its second one, or what is wrong with it."""

    number: int
    text: str = ""
    pair: str | None = None
    error: str | None = None


def read(lines: Iterable[str], form: str | None = None) -> Iterator[Line]:
    """The lines, as `form` says (None: as the first line that is not empty looks)."""
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip("\r\n")
        if not line.strip():
            yield Line(number, error="is empty")
            continue
        form = form or _form(line)
        try:
            text, pair = _parts(line, form)
            yield Line(number, text, pair)
        except DataError as error:
            yield Line(number, error=error.message)


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
    found: list[Any] = [line.error for line in chunk]
    for paired in (False, True):
        places = [place for place, line in enumerate(chunk) if not line.error and (line.pair is not None) == paired]
        for place, logits in _kind(classify, [(place, chunk[place]) for place in places], batch_size):
            found[place] = logits
    return found


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


def _form(line: str) -> str:
    if line.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in line else "text"


def _parts(line: str, form: str) -> tuple[str, str | None]:
    """The text of a line and its pair.

    Raises:
        DataError: the line is not of this form.
    """
    if form == "text":
        return line, None
    if form == "tsv":
        columns = line.split("\t")
        if len(columns) != 2 or not all(column.strip() for column in columns):
            filled = sum(bool(column.strip()) for column in columns)
            raise DataError(f"has {filled} filled columns of {len(columns)}: two, separated by one tab, were expected")
        return columns[0], columns[1]
    return _object(line)


def _object(line: str) -> tuple[str, str | None]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from None
    text, pair = (value.get("text"), value.get("pair")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str) or not (pair is None or isinstance(pair, str)):
        raise DataError('has no "text", or one that is no text: {"text": "...", "pair": "..."} was expected')
    return text, pair
