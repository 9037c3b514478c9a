"""Other forms of tagged words, brought into lists of words and of tags.

    {"text": "She lives in Rome", "label": [[13, 17, "LOC"]]}                            spans by characters: doccano
    {"text": "...", "spans": [{"start": 13, "end": 17, "label": "LOC"}]}                 the same as objects: prodigy
    Sentence #,Word,POS,Tag                                                              a word a row, as on Kaggle

A text with spans is cut into words at spaces, signs and the ends of spans; it stays as it is beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise

from spdtool.data.columns import read_text_cell, require_column
from spdtool.data.formats.conll import TAGS, TOKENS
from spdtool.data.formats.table import Table
from spdtool.data.kinds.tags import OUTSIDE
from spdtool.recipe.fields import Recipe

TEXT_NAMES = ("text", "sentence", "content", "data")
SPAN_NAMES = ("entities", "spans", "label", "labels", "annotations")
START_NAMES = ("start", "start_offset", "begin")
END_NAMES = ("end", "end_offset")
TYPE_NAMES = ("label", "labels", "type", "entity", "tag", "entity_group")
LOOKED_AT = 20  # spans that tell whether a column holds such
SENTENCE = re.compile(r"(sentence|sent)[ _]?(#|id|idx|number)", re.IGNORECASE)
ROW_WORDS = ("word", "token")
ROW_TAGS = ("tag", "ner_tag", "ner", "label", "tags")
# Columns that no file has: the lists of a text with spans.
WORDS_OF_TEXT, TAGS_OF_TEXT, PLACES_OF_WORDS = "words of the text", "tags of the text", "places of the words"
# Letters and digits in a row; any other sign, and each Chinese character, is a word by itself, as BERT has it.
TEXT_WORD = re.compile("[^\\W\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+|\\S")


@dataclass(frozen=True)
class CharacterSpan:
    """A span of a text by its characters, and its type."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class WordColumns:
    """Names of the columns that hold the words and the tags.

    Attributes:
        words, tags: of lists.
        source: of the text that the words were cut out of, whose places are in `PLACES_OF_WORDS`; None: there is none.
    """

    words: str
    tags: str
    source: str | None = None


def list_words(tables: Mapping[str, Table], recipe: Recipe) -> tuple[dict[str, Table], WordColumns] | None:
    """Return tables with lists of words and of tags for those of other forms; None where the training rows are none.

    Args:
        recipe: whose `text` and `label` name the columns, if they do.

    Raises:
        DataError: a span is outside of its text, or overlaps another; a row names no sentence.
    """
    train = tables["train"]
    columns = find_span_columns(train, recipe)
    if columns is not None:
        listed = {split: _read_texts_with_spans(table, *columns) for split, table in tables.items()}
        return listed, WordColumns(WORDS_OF_TEXT, TAGS_OF_TEXT, columns[0])
    names = _find_row_columns(train, recipe)
    if names is not None:
        return {split: _join_rows(table, *names) for split, table in tables.items()}, WordColumns(TOKENS, TAGS)
    return None


def find_span_columns(table: Table, recipe: Recipe) -> tuple[str, str] | None:
    """Return the columns of texts and of their spans; None for a table of another form."""
    text = next((name for name in recipe.text or TEXT_NAMES if name in table.columns), None)
    if text is None or recipe.multilabel:
        return None
    for name in SPAN_NAMES if recipe.label is None else (recipe.label,):
        if name in table.columns:
            lists = (cell for cell in table.column(name) if isinstance(cell, list))
            items = list(islice(chain.from_iterable(lists), LOOKED_AT))
            if items and all(_parse_span(item) is not None for item in items):
                return text, name
    return None


def is_annotated(table: Table, recipe: Recipe) -> bool:
    """Tell whether a table is of one of these forms, by its first rows."""
    return find_span_columns(table, recipe) is not None or _find_row_columns(table, recipe) is not None


def _parse_span(item: object) -> CharacterSpan | None:
    """Return the span that a list `[start, end, type]` or an object spells; None for anything else."""
    values: list[object] = []
    if isinstance(item, list | tuple):
        values = [*item]
    elif isinstance(item, dict):
        for names in (START_NAMES, END_NAMES, TYPE_NAMES):
            values.append(next((item[name] for name in names if name in item), None))
    if len(values) != 3:
        return None
    start, end, kind = values
    if isinstance(kind, list) and len(kind) == 1:  # of Label Studio
        kind = kind[0]
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not kind.strip():
        return None
    return CharacterSpan(start, end, kind.strip())


def _read_texts_with_spans(table: Table, text_name: str, span_name: str) -> Table:
    require_column(table, text_name)
    rows: list[list[object]] = []
    for row in range(len(table.rows)):
        text = read_text_cell(table, row, text_name, table.cell(row, text_name))
        spans = _read_spans(table, row, span_name, text)
        words, tags, places = list[str](), list[str](), list[tuple[int, int]]()
        for start, end, tag in tag_text(text, spans):
            words.append(text[start:end])
            tags.append(tag)
            places.append((start, end))
        rows.append([words, tags, text, places])
    note = table.join_notes(f"its texts have spans by characters under {span_name!r}")
    return Table(
        table.path, (WORDS_OF_TEXT, TAGS_OF_TEXT, text_name, PLACES_OF_WORDS), rows, table.lines, table.unit, note=note
    )


def _read_spans(table: Table, row: int, name: str, text: str) -> list[CharacterSpan]:
    """Return the spans of a row in order, without spaces around them; raises DataError for one that cannot be."""
    cell = table.cell(row, name) if name in table.columns else None
    spans = []
    for item in cell if isinstance(cell, list) else [] if cell is None else [cell]:
        span = _parse_span(item)
        if span is None:
            table.refuse(row, f"the span {str(item)[:60]!r} in {name!r}", "[start, end, type], or an object with these")
        if not 0 <= span.start < span.end <= len(text) or not text[span.start : span.end].strip():
            place = f"{span.start}-{span.end} ({span.kind!r})"
            table.refuse(
                row,
                f"the span {place} is not in its text, which has {len(text)} characters",
                "spans count characters (not bytes) from 0, and end before the character `end`",
            )
        words = text[span.start : span.end]
        start = span.start + len(words) - len(words.lstrip())
        spans.append(replace(span, start=start, end=start + len(words.strip())))
    spans.sort(key=lambda span: (span.start, span.end))
    for first, second in pairwise(spans):
        if second.start < first.end:
            table.refuse(
                row,
                f"the spans {first.start}-{first.end} ({first.kind!r}) and {second.start}-{second.end} "
                f"({second.kind!r}) overlap",
                "a word has one tag: keep one of the two",
            )
    return spans


def tag_text(text: str, spans: list[CharacterSpan]) -> Iterator[tuple[int, int, str]]:
    """Yield begin, end and tag of each word of a text; a word that a span cuts is two words."""
    position = 0
    for span in [*spans, CharacterSpan(len(text), len(text), "")]:
        for match in TEXT_WORD.finditer(text, position, span.start):
            yield *match.span(), OUTSIDE
        prefix = "B"
        for match in TEXT_WORD.finditer(text, span.start, span.end):
            yield *match.span(), f"{prefix}-{span.kind}"
            prefix = "I"
        position = span.end


def _find_row_columns(table: Table, recipe: Recipe) -> tuple[str, str, str] | None:
    """Return the columns of the sentence's number, the word and its tag, of a file with a word a row."""
    by_name = {name.strip().lower(): name for name in table.columns}
    sentence = next((name for name in table.columns if SENTENCE.fullmatch(name.strip())), None)
    words = [name for name in recipe.text if name in table.columns]
    words += [by_name[name] for name in ROW_WORDS if name in by_name]
    tags = [recipe.label] if recipe.label in table.columns else [by_name[name] for name in ROW_TAGS if name in by_name]
    if sentence is None or not words or not tags or isinstance(table.cell(0, words[0]), list):
        return None
    return sentence, words[0], tags[0]


def _join_rows(table: Table, sentence: str, word: str, tag: str) -> Table:
    """Join the rows of each sentence, whose number stands in each row or in its first one alone."""
    for column in (sentence, word, tag):
        require_column(table, column)
    rows: list[list[object]] = []
    lines: list[int] = []
    current: object = None
    for row in range(len(table.rows)):
        number, text, name = (table.cell(row, column) for column in (sentence, word, tag))
        is_named = number is not None and str(number).strip() != ""
        if not rows and not is_named:
            table.refuse(row, f"no sentence in the column {sentence!r}", "the first row of each sentence names it")
        if is_named and number != current:
            rows.append([[], []])
            lines.append(table.lines[row])
            current = number
        # pandas reads the word "None" as a missing value, and writes nothing
        rows[-1][0].append("" if text is None else str(text))  # type: ignore[attr-defined]
        rows[-1][1].append(name)  # type: ignore[attr-defined]
    note = table.join_notes(f"a word a row, joined by {sentence!r}")
    return Table(table.path, (TOKENS, TAGS), rows, lines, table.unit, table.class_names, note)
