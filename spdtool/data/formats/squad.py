"""Read JSON files: SQuAD's layout of questions about paragraphs, a list of objects, or an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from spdtool.data.formats.jsonl import holds_lines, read_jsonl
from spdtool.data.formats.table import Table, check_table, read_text
from spdtool.errors import DataError

SPAN_COLUMNS = ("id", "title", "context", "question", "answers")
LAYOUT = 'SQuAD\'s layout is {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'

PANDAS = "with pandas: frame.to_json(FILE, orient='records'); or "


def read_json(path: Path) -> Table:
    """Read a JSON file as a table; of SQuAD's layout, a row for each question.

    Raises:
        DataError: it is no JSON, or of no such layout.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if holds_lines(text):  # as `datasets` and many scripts name such files
            return replace(read_jsonl(path), note="it holds a JSON object a line")
        raise DataError(f"{path} is no JSON: {error}", "a list of objects, or one object a line") from None
    if isinstance(content, list):
        return _read_objects(path, content)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f"{path} is neither a list of objects nor of SQuAD's layout", PANDAS + LAYOUT)
    if content["data"] and all(isinstance(each, list) for each in content["data"]):
        raise DataError(f"{path} holds lists of cells, not objects", PANDAS + LAYOUT)
    if content["data"] and all(isinstance(each, dict) and "paragraphs" not in each for each in content["data"]):
        return _read_objects(path, content["data"])
    rows = list(_iterate_questions(path, content["data"]))
    if not rows:
        raise DataError(f"{path} has no questions", LAYOUT)
    return Table(path, SPAN_COLUMNS, rows, list(range(1, 1 + len(rows))), unit="question")


def _read_objects(path: Path, records: list[object]) -> Table:
    columns: dict[str, None] = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {number}: a {type(record).__name__}, not an object", "a list of objects")
        columns |= dict.fromkeys(record)
    rows = [[record.get(name) for name in columns] for record in records if isinstance(record, dict)]
    return check_table(Table(path, tuple(columns), rows, list(range(1, 1 + len(rows))), unit="row"))


def _iterate_questions(path: Path, articles: list[object]) -> Iterator[list[object]]:
    for article in articles:
        for paragraph in _list_of(path, article, "paragraphs"):
            context = paragraph.get("context")
            for question in _list_of(path, paragraph, "qas"):
                answers = question.get("answers")
                is_impossible = question.get("is_impossible", False)
                if not isinstance(is_impossible, bool | None):
                    raise DataError(
                        f"{path}: is_impossible is {is_impossible!r} of the question {str(question.get('id'))!r}",
                        "write true or false, without quotation marks",
                    )
                if is_impossible:  # version 2 lists plausible answers beside
                    answers = []
                title = article.get("title") if isinstance(article, dict) else None
                yield [question.get("id"), title, context, question.get("question"), answers]


def _list_of(path: Path, value: object, name: str) -> list[Mapping[str, object]]:
    """Return the objects under a key. Raises DataError."""
    objects = value.get(name) if isinstance(value, dict) else None
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise DataError(f"{path}: {name!r} is missing, or no list of objects, in {str(value)[:60]!r}", LAYOUT)
    return objects
