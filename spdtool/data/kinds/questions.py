"""Rows of extractive question answering: a question, a context, and the spans of the context that answer it.

A row's first text is the question, its second the context; its label is a list of `(start, end)` by characters of the
context, empty where there is no answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from spdtool.data.columns import read_texts
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.formats.table import Table
from spdtool.data.splits import draw_dev_rows, draw_test_rows
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

COLUMNS = ("question", "context", "answers")
METRICS = ("exact_match", "f1")

UNKNOWN = -1  # begin of an answer that has to be looked for

Span = tuple[int, int]
"""Begin and end of an answer in its context, in characters."""


def holds_questions(table: Table, text: Sequence[str], label: str | None) -> bool:
    """Tell whether the rows are questions about contexts, unless the user names other columns."""
    named = {*text, *((label,) if label is not None else ())}
    if not set(COLUMNS) <= set(table.columns) or not named <= set(COLUMNS):
        return False
    cells = table.column("answers")
    return not cells or any(isinstance(cell, dict | list) for cell in cells)


def question_dataset(
    recipe: Recipe, tables: dict[str, Table], read_tables: Callable[[Path], dict[str, Table]]
) -> Dataset:
    """Describe a data set of questions.

    Args:
        tables: of `recipe.data`.
        read_tables: reads those of another place.

    Raises:
        DataError: names the question whose answer is not in its context, or whose texts are missing.
    """
    for split, table in tables.items():
        if split != "test" and not has_answers(table):
            raise DataError(
                f"no question of {table.path} has an answer: there is nothing to learn from or to score by",
                "look at the column 'answers', or leave the file out",
            )
    moved = Counter[str]()

    def load(data: str | None, seed: int) -> dict[str, Rows]:
        current = tables if data in (None, recipe.data) else read_tables(Path(data or ""))
        splits = {name: table_to_questions(table, moved) for name, table in current.items()}
        if recipe.test_share:
            splits |= draw_by_context(splits["train"], lambda rows: draw_test_rows(rows, seed, recipe.test_share))
        if "dev" in splits:
            return splits
        return splits | draw_by_context(splits["train"], lambda rows: draw_dev_rows(rows, seed, recipe.dev_share))

    loaded = load(None, recipe.seed)  # here, so that a bad row is named and what was changed can be said
    about = f"answers to 'question' in 'context' of {recipe.data}"
    for change, count in moved.items():
        about += f"; {count:,} {change}"
    return Dataset(
        name="local",
        kind="spans",
        text=("question", "context"),
        labels=("start", "end"),
        metrics=METRICS,
        load=lambda data, seed: loaded if data in (None, recipe.data) and seed == recipe.seed else load(data, seed),
        about=about,
    )


def table_to_questions(table: Table, moved: Counter[str]) -> Rows:
    """Return the rows of a table; `moved` counts what the plan says of them, such as answers that were found elsewhere.

    Raises:
        DataError: a text is missing, or an answer is not in its context.
    """
    for name in COLUMNS:
        if name not in table.columns:
            raise DataError(f"{table.path} has no column {name!r}; it has {', '.join(map(repr, table.columns))}")
    questions, contexts = read_texts(table, "question"), read_texts(table, "context")
    repeated = _count_repeated_ids(table)
    if repeated:
        moved[f"questions of {table.path.name} have an id that an earlier one has: each counts by itself"] += repeated
    labels = []
    for row, cell in enumerate(table.column("answers")):
        spans: list[Span] = []
        for text, start in _list_answers(table, row, cell):
            if text not in contexts[row] and text.strip() in contexts[row]:
                moved["answers had spaces around them that their context has not"] += 1
                text, start = text.strip(), UNKNOWN
            span = (start, start + len(text))
            if start < 0 or contexts[row][slice(*span)] != text:
                if contexts[row].count(text) != 1:
                    table.refuse(
                        row,
                        f"the answer {text[:60]!r} does not stand at character {start} of its context, which has "
                        f"{len(contexts[row])} characters and the answer {contexts[row].count(text)} times",
                        "answer_start counts characters (not bytes) from 0; mend such rows or leave them out",
                    )
                span = (contexts[row].index(text), contexts[row].index(text) + len(text))
                moved["answers did not stand at their answer_start, and were found elsewhere in the context"] += 1
            if span not in spans:
                spans.append(span)
        labels.append(spans)
    return Rows(questions, contexts, labels)


def has_answers(table: Table) -> bool:
    """Tell whether a question has an answer; files with secret answers have none."""
    if "answers" not in table.columns:
        return False
    for cell in table.column("answers"):
        texts = cell.get("text") if isinstance(cell, dict) else cell
        if texts:
            return True
    return False


def _count_repeated_ids(table: Table) -> int:
    ids = [str(cell) for cell in table.column("id") if cell is not None] if "id" in table.columns else []
    return len(ids) - len(set(ids))


def _list_answers(table: Table, row: int, cell: object) -> list[tuple[str, int]]:
    """Return text and begin of each answer: of a dict of two lists, as `datasets` has them, or of a list of dicts.

    Of a list of texts alone the begins are unknown.
    """
    pairs: list[tuple[object, object]] = []
    if isinstance(cell, dict):
        texts, starts = cell.get("text"), cell.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            pairs = list(zip(texts, starts, strict=True))
        elif texts is not None or starts is not None:
            table.refuse(row, f"the answers are {str(cell)[:60]!r}", 'write {"text": [...], "answer_start": [...]}')
    elif isinstance(cell, list):
        for answer in cell:
            if isinstance(answer, dict):
                pairs.append((answer.get("text"), answer.get("answer_start")))
            else:
                pairs.append((answer, UNKNOWN))
    elif cell is not None:
        table.refuse(row, f"the answers are {str(cell)[:60]!r}", 'write {"text": [...], "answer_start": [...]}')
    answers = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            table.refuse(
                row, f"an answer has the text {text!r} and the answer_start {start!r}", "a text and a whole number"
            )
        answers.append((text, start))
    return answers


def draw_by_context(rows: Rows, draw: Callable[[Rows], dict[str, Rows]]) -> dict[str, Rows]:
    """Split rows by their contexts: a context that was trained on would flatter the score."""
    assert rows.second is not None
    drawn = draw(Rows(rows.second, None, [(row,) for row in range(len(rows))]))
    return {name: rows.select([row for (row,) in split.labels]) for name, split in drawn.items()}
