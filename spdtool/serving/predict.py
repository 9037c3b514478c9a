"""`spdtool predict`: label a stream of lines, each a text or a pair, in their order.

A line has one of three formats, recognised by the first line that is not empty: a JSON object with
the columns that the model was trained on, or with `text` and perhaps `pair`; two columns separated
by a tab; one text. Files with a header are read by `inputs.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from spdtool.errors import DataError
from spdtool.export.classifier import Classifier
from spdtool.tasks.decision import Object

READ_AHEAD = 8  # batches that are read before the first is computed, so that rows of similar length meet in one
FORMATS = ("text", "tsv", "jsonl")
BYTE_ORDER_MARK = "\ufeff"  # some editors put it at the start of a file


@dataclass(frozen=True)
class InputLine:
    """One line: its number from 1, and its text with an optional second one, or what is wrong with it."""

    number: int
    text: str = ""
    pair: str | None = None
    error: str | None = None


LineResult: TypeAlias = Any
"""Outputs of a line (one entry of what `Classifier.group` returns), or as a str the reason why it has none."""


def parse_lines(
    lines: Iterable[str],
    line_format: str | None = None,
    columns: tuple[str, ...] = (),
    *,
    reads_words: bool = False,
) -> Iterator[InputLine]:
    """Parse raw lines.

    Args:
        line_format: one of FORMATS; None: recognised by the first line that is not empty.
        columns: keys of the one or two texts in a JSON line; without them, or in a line that has none of them, the
            keys are `text` and `pair`.
        reads_words: whether a text may be a list of words.
    """
    for number, raw_line in enumerate(lines, start=1):
        line = raw_line.rstrip("\r\n")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            yield InputLine(number, error="is empty")
            continue
        line_format = line_format or recognise_format(line)
        try:
            text, pair = parse_line(line, line_format, columns, reads_words=reads_words)
        except DataError as error:
            yield InputLine(number, error=error.message)
        else:
            yield InputLine(number, text, pair)


def recognise_format(line: str) -> str:
    """Guess the format of a line."""
    if line.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in line else "text"


def predict_lines(classify: Classifier, lines: Iterable[InputLine], batch_size: int = 32) -> Iterator[Object]:
    """Label every line, in order.

    Yields:
        `line` (its number) with `label`, `probability` and `logits`, or with `error`.
    """
    source = iter(lines)
    while chunk := list(islice(source, READ_AHEAD * batch_size)):
        results = compute_lines(classify, chunk, batch_size)
        computed = [result for result in results if not isinstance(result, str)]
        predictions = iter(classify.decision.predictions(classify.decision.join(computed)) if computed else ())
        for line, result in zip(chunk, results, strict=True):
            if isinstance(result, str):
                yield {"line": line.number, "error": result}
            else:
                yield {"line": line.number} | next(predictions)


def compute_lines(classify: Classifier, lines: Sequence[InputLine], batch_size: int) -> list[LineResult]:
    """Compute the outputs of every line: single texts in one call, pairs in another."""
    results: dict[int, LineResult] = {}
    indices: dict[bool, list[int]] = {False: [], True: []}  # by whether the line is a pair
    for index, line in enumerate(lines):
        problem = line_problem(classify, line)
        if problem is None:
            indices[line.pair is not None].append(index)
        else:
            results[index] = problem
    for group in indices.values():
        if not group:
            continue
        group_lines = [lines[index] for index in group]
        results |= zip(group, compute_similar_lines(classify, group_lines, batch_size), strict=True)
    return [results[index] for index in range(len(lines))]


def line_problem(classify: Classifier, line: InputLine) -> str | None:
    """The reason why the model cannot take this line, or None."""
    if line.error is not None:
        return line.error
    if line.pair is None and not line.text.strip():
        return "is empty"
    if line.pair is not None and not (line.text.strip() and line.pair.strip()):
        return "has an empty text"
    try:
        classify.check_text_count(paired=line.pair is not None)
    except DataError as error:
        return f"does not fit: {error.message}"
    return None


def compute_similar_lines(classify: Classifier, lines: list[InputLine], batch_size: int) -> list[LineResult]:
    """Compute lines that are all single texts, or all pairs; if one spoils the call, compute each on its own."""
    texts = [line.text for line in lines]
    pairs = [line.pair for line in lines if line.pair is not None]
    try:
        return list(classify.outputs(texts, pairs or None, batch_size=batch_size))
    except DataError as error:  # names one line, and all of them are without logits
        if len(lines) == 1:
            return [error.message]
    results: list[LineResult] = []
    for line in lines:
        results += compute_similar_lines(classify, [line], batch_size)
    return results


def parse_line(
    line: str, line_format: str, columns: tuple[str, ...], *, reads_words: bool = False
) -> tuple[str, str | None]:
    """Split a line into its text and its pair. Raises DataError if it is not of this format."""
    if line_format == "text":
        return line, None
    if line_format == "jsonl":
        return parse_json_line(line, columns, reads_words=reads_words)
    cells = line.split("\t")
    filled = sum(bool(cell.strip()) for cell in cells)
    if len(cells) != 2 or filled != 2:
        raise DataError(f"has {filled} filled columns of {len(cells)}: two, separated by one tab, were expected")
    return cells[0], cells[1]


def parse_json_line(line: str, columns: tuple[str, ...], *, reads_words: bool = False) -> tuple[str, str | None]:
    """Take the text and the pair out of a JSON object. Raises DataError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError("is no JSON object")
    # A task whose only column is called `text` may still come with a pair, as lines without columns do.
    has_columns = bool(columns) and set(columns) <= row.keys() and columns != ("text",)
    keys = columns if has_columns else ("text", "pair")
    text = join_words(row.get(keys[0])) if reads_words else row.get(keys[0])
    pair = row.get(keys[1]) if len(keys) > 1 else None
    pair_is_missing = has_columns and len(keys) > 1 and pair is None
    if not isinstance(text, str) or pair_is_missing or not (pair is None or isinstance(pair, str)):
        expected = ", ".join(f'"{name}": "..."' for name in (columns or keys))
        raise DataError(f'has no "{keys[0]}", or one that is no text: {{{expected}}} was expected')
    return text, pair


def join_words(cell: object) -> object:
    """Join a list of words as training rows are; return anything else as it is."""
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return " ".join(word for word in cell if word.strip())
    return cell
