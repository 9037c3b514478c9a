"""Queries with lists of passages, brought into rows of one query, one passage and its relevance.

    {"query": "...", "pos": ["..."], "neg": ["..."]}             also positive, positive_passages, negative_1, ...
    {"query": "...", "docs": ["...", "..."], "labels": [1, 0]}   lists of equal length
    {"query": "...", "passages": {"passage_text": [...], "is_selected": [1, 0]}}      MS MARCO of the hub
    query, relevant passage, other passage                       triples.*.tsv of MS MARCO, without a header

The first and the last form train a sentence encoder too, so they are a ranking only where that is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdtool.data.columns import read_text_cell, require_column
from spdtool.data.formats.table import Table
from spdtool.data.kinds.qrels import COLUMNS, draw_negatives
from spdtool.data.labels import normalize_label, parse_number
from spdtool.recipe.fields import Recipe

QUERY_NAMES = ("query", "question", "anchor")
RELEVANT_NAMES = ("pos", "positive", "positives", "positive_passages")
OTHER_NAMES = ("neg", "negative", "negatives", "negative_passages", "hard_negatives")
NUMBERED_OTHER = re.compile(r"(?:neg|negative)_?\d+", re.ASCII)
LIST_NAMES = ("docs", "documents", "passages", "candidates")
LABEL_NAMES = ("labels", "label", "relevance", "scores")
HUB_NAMES = ("passage_text", "is_selected")
TRIPLES = "triples"
IRRELEVANT = "0"


@dataclass(frozen=True)
class PassageColumns:
    """Names of the columns: of the query, of its relevant and other passages, or of passages with their relevance."""

    query: str
    relevant: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    passages: str | None = None
    labels: str | None = None


def unfold_passages(tables: Mapping[str, Table], recipe: Recipe) -> dict[str, Table] | None:
    """Return tables of one query, one passage and its relevance a row; None for tables of another form.

    Raises:
        DataError: see `list_passages`.
    """
    columns = find_passage_lists(read_triples(tables["train"]), recipe)
    if columns is None:
        return None
    unfolded = {}
    for split, table in tables.items():
        table = read_triples(table)
        columns_of_split = find_passage_lists(table, recipe) or columns
        unfolded[split] = list_passages(table, columns_of_split, recipe.negatives, recipe.seed)
    return unfolded


def find_passage_lists(table: Table, recipe: Recipe) -> PassageColumns | None:
    """Return the columns of queries with several passages; None for a table of another form."""
    if recipe.ranking is False:
        return None
    query = next((name for name in QUERY_NAMES if name in table.columns), None)
    if query is None:
        return None
    for passages in (name for name in LIST_NAMES if name in table.columns):
        cells = table.column(passages)
        if any(isinstance(cell, dict) and set(HUB_NAMES) <= set(cell) for cell in cells):
            return PassageColumns(query, passages=passages)
        labels = next((name for name in LABEL_NAMES if _has_list(table, name)), None)
        if labels is not None and _has_list(table, passages):
            return PassageColumns(query, passages=passages, labels=labels)
    relevant = tuple(name for name in table.columns if name in RELEVANT_NAMES)
    # Such rows train sentence encoders too: a given teacher that is none, or the recipe, says that they are ranked.
    if not relevant or not (recipe.ranking or recipe.given_teacher is not None):
        return None
    others = tuple(name for name in table.columns if name in OTHER_NAMES or NUMBERED_OTHER.fullmatch(name))
    return PassageColumns(query, relevant, others)


def read_triples(table: Table) -> Table:
    """Return the table with names of columns where it is a file of triples without a header; else as it is."""
    if not table.path.name.startswith(TRIPLES) or len(table.columns) != 3 or set(table.columns) & set(QUERY_NAMES):
        return table
    rows: list[list[object]] = [[*table.columns], *table.rows]
    if all(str(cell).isdecimal() for row in rows[:20] for cell in row):
        table.refuse(0, "numbers of queries and passages, not their texts", "give the file that holds the texts")
    columns = (QUERY_NAMES[0], RELEVANT_NAMES[0], OTHER_NAMES[0])
    return Table(table.path, columns, rows, list(range(1, 1 + len(rows))), note="it has no header: triples")


def list_passages(table: Table, columns: PassageColumns, negatives: int, seed: int) -> Table:
    """Return a row for each query and passage; other passages are drawn for a query that has relevant ones only.

    Rows of one query are brought together. A passage that is relevant in one of them is relevant.

    Args:
        negatives: how many to draw.
        seed: of the draws, with the query.

    Raises:
        DataError: a query or a passage is no text, or the lists of a row do not belong together.
    """
    for name in (columns.query, *columns.relevant, *columns.others, columns.passages, columns.labels):
        if name is not None:
            require_column(table, name)
    by_query: dict[str, dict[str, tuple[str, int]]] = {}  # passage to its relevance and line
    contradictions = 0
    for row in range(len(table.rows)):
        query = read_text_cell(table, row, columns.query, table.cell(row, columns.query))
        passages = by_query.setdefault(query, {})
        for text, relevance in _read_row(table, row, columns):
            earlier = passages.setdefault(text, (relevance, table.lines[row]))[0]
            if relevance != earlier:
                contradictions += 1
                passages[text] = (max(relevance, earlier, key=_gain), table.lines[row])
    known = list(dict.fromkeys(text for passages in by_query.values() for text in passages))
    rows: list[list[object]] = []
    lines: list[int] = []
    drawn = 0
    for query, passages in by_query.items():
        if passages and all(relevance != IRRELEVANT for relevance, _ in passages.values()):
            drawn += 1
            line = next(iter(passages.values()))[1]
            for text in draw_negatives(known, set(passages), negatives, f"{seed} {query}"):
                passages[text] = (IRRELEVANT, line)
        for text, (relevance, line) in passages.items():
            rows.append([query, text, relevance])
            lines.append(line)
    notes = [_describe_columns(columns)]
    if drawn:
        notes.append(f"for {drawn:,} queries others were drawn")
    if contradictions:
        notes.append(f"{contradictions:,} passages are relevant in one row, and not in another: they count as relevant")
    return Table(table.path, COLUMNS[1:], rows, lines, table.unit, note=table.join_notes(*notes))


def _gain(relevance: str) -> float:
    return parse_number(relevance) or 0.0


def _describe_columns(columns: PassageColumns) -> str:
    if columns.passages is not None:
        return f"each row lists its passages under {columns.passages!r}"
    note = f"passages of {', '.join(map(repr, columns.relevant))} are relevant"
    return note + (f", those of {', '.join(map(repr, columns.others))} are not" if columns.others else "")


def _read_row(table: Table, row: int, columns: PassageColumns) -> list[tuple[str, str]]:
    """Return the passages of a row, each with its relevance as a file would spell it."""
    if columns.passages is not None:
        return _read_labeled_lists(table, row, columns.passages, columns.labels)
    passages = []
    for names, relevance in ((columns.relevant, "1"), (columns.others, IRRELEVANT)):
        for name in names:
            passages += [(text, relevance) for text in read_passages(table, row, name)]
    return passages


def _read_labeled_lists(table: Table, row: int, name: str, labels: str | None) -> list[tuple[str, str]]:
    cell = table.cell(row, name)
    if labels is None and isinstance(cell, dict):
        passages, relevance = (cell.get(key) for key in HUB_NAMES)
    else:
        passages, relevance = cell, table.cell(row, labels or name)
    if not isinstance(passages, list) or not isinstance(relevance, list) or len(passages) != len(relevance):
        table.refuse(row, f"{name!r} is no list with a relevance for each passage", "two lists of one length")
    texts = [_passage_text(table, row, name, passage) for passage in passages]
    return [(text, normalize_label(table, row, label)) for text, label in zip(texts, relevance, strict=True)]


def read_passages(table: Table, row: int, name: str) -> list[str]:
    """Return the texts of a cell that holds one passage, a list of them, or nothing.

    Raises:
        DataError: one of them is no text.
    """
    cell = table.cell(row, name)
    passages: Sequence[object] = cell if isinstance(cell, list) else [] if cell is None or cell == "" else [cell]
    return [_passage_text(table, row, name, passage) for passage in passages]


def _passage_text(table: Table, row: int, name: str, passage: object) -> str:
    """Return the text of a passage, which may be an object with `text` and perhaps `title`."""
    if isinstance(passage, dict):
        passage = f"{passage.get('title') or ''} {passage.get('text') or ''}".strip()
    return read_text_cell(table, row, name, passage)


def _has_list(table: Table, name: str) -> bool:
    return name in table.columns and any(isinstance(cell, list) for cell in table.column(name))
