"""Rows whose words each have a tag, such as named entities: columns that hold lists of words and of tags.

A row's text is its words, joined by spaces; its label is a list of `(start, end, tag)`, by characters of that text.
Tags of spans are brought into one scheme: `tags.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from spdtool.data.columns import read_text_cell, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import LINES, READERS
from spdtool.data.formats.conll import read_conll, read_conll_words
from spdtool.data.formats.table import Table, is_encodable
from spdtool.data.kinds.annotations import PLACES_OF_WORDS, TEXT_WORD, WordColumns
from spdtool.data.kinds.tags import OUTSIDE, TagReader, find_odd_tag, is_span_tag, tag_order
from spdtool.data.overview import list_names
from spdtool.data.splits import draw_dev_rows, draw_test_rows
from spdtool.data.unlabeled import read_unlabeled_table
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "ner", "labels", "pos_tags", "chunk_tags", "upos", "xpos")
SPAN_COLUMNS = ("ner_tags", "ner", "chunk_tags")
SENTENCE_COLUMNS = ("text", "sentence")
NUMBER = re.compile(r"\d+", re.ASCII)
SPAN_METRICS = ("span_f1",)
TAG_METRICS = ("accuracy", "f1_macro")

WordLabel = tuple[int, int, int]
"""Start and end of a word in the row's text, and the number of its tag."""


def find_word_columns(table: Table, text: Sequence[str], label: str | None) -> WordColumns | None:
    """Return the columns of words and tags; None for a table of another kind of rows.

    Args:
        table: the training rows.
        text, label: the columns that the user names, if any.

    Raises:
        DataError: the columns of words are clear, and those of the tags are not.
    """
    lists = [name for name in table.columns if _holds_lists(table.column(name))]
    words = [name for name in WORD_COLUMNS if name in lists]
    if words and len(text) == 1:
        require_column(table, text[0])
    words = [name for name in text if name in table.columns] or words
    if len(words) != 1 or words[0] not in lists:
        return None
    if label is not None:
        require_column(table, label)
        if label not in lists:
            raise DataError(f"{table.path}: {words[0]!r} holds lists of words, and {label!r} holds no lists of tags")
        return WordColumns(words[0], label)
    tags = [name for name in TAG_COLUMNS if name in lists and name != words[0]]
    if len(tags) != 1:
        listed = list_names([repr(name) for name in table.columns if name != words[0]])
        problem = "more than one column that may be" if tags else "no column that is clearly"
        raise DataError(f"{table.path} has {problem} the tags of its words: {listed}", "give --label COLUMN")
    return WordColumns(words[0], tags[0])


def word_dataset(
    recipe: Recipe,
    tables: dict[str, Table],
    columns: WordColumns,
    read_tables: Callable[[Path], dict[str, Table]],
) -> Dataset:
    """Describe a data set of tagged words.

    Args:
        tables: of `recipe.data`.
        read_tables: reads those of another place.

    Raises:
        DataError: names the row whose words or tags cannot be used.
    """
    _refuse_numbered_words(tables["train"], columns)
    tags = _read_tags(tables["train"], columns.tags)
    names = {name for row in tags for name in row}
    if len(names) < 2:
        raise DataError(f"every word in {tables['train'].path} has the tag {next(iter(names), None)!r}")
    _refuse_unnamed_spans(tables["train"], columns, names)
    if "dev" in tables and not has_tags(tables["dev"], columns):
        raise DataError(
            f"every word in {tables['dev'].path} has the tag 'O': there is no span to score",
            "give a dev file with tags, or none: it is then drawn from the training rows",
        )
    reader = TagReader(is_span=_are_spans(tables["train"], tags))
    empty = Counter[str]()
    read_names: set[str] = set()
    for row in tags:
        read_names.update(reader.read(row))
    if reader.is_span:
        for name in list(read_names):  # an I- that no training row has may come in dev, and a model may predict it
            if name != OUTSIDE:
                read_names |= {f"B-{name[2:]}", f"I-{name[2:]}"}
    labels = tuple(sorted(read_names, key=tag_order))
    reader.changes.clear()

    def load(data: str | None, seed: int) -> dict[str, Rows]:
        current = tables if data in (None, recipe.data) else read_tables(Path(data or ""))
        splits = {}
        for name, table in current.items():
            splits[name] = _table_to_rows(table, columns, labels, reader, empty)
        if "dev" not in splits:
            _refuse_one_sentence(current["train"], columns)
        if recipe.test_share:
            splits |= draw_test_rows(splits["train"], seed, recipe.test_share)
        return splits if "dev" in splits else splits | draw_dev_rows(splits["train"], seed, recipe.dev_share)

    loaded = load(None, recipe.seed)  # here, so that a bad row is named and what was changed can be said
    text = columns.source or columns.words
    about = f"words of {text!r} in {recipe.data}"
    about += reader.describe() if columns.source is not None else f", tagged by {columns.tags!r}{reader.describe()}"
    if not reader.is_span:
        about += "; no tag begins with B- or I-: each is a class of its word"
    for what, count in empty.items():
        about += f"; {count:,} {what} left out"

    return Dataset(
        name="local",
        kind="tokens",
        text=(text,),
        labels=labels,
        metrics=SPAN_METRICS if reader.is_span else TAG_METRICS,
        load=lambda data, seed: loaded if data in (None, recipe.data) and seed == recipe.seed else load(data, seed),
        about=about,
    )


def _table_to_rows(
    table: Table, columns: WordColumns, labels: Sequence[str], reader: TagReader, empty: Counter[str]
) -> Rows:
    for name in (columns.words, columns.tags):
        require_column(table, name)
    index = {name: number for number, name in enumerate(labels)}
    texts: list[str] = []
    tagged: list[list[WordLabel]] = []
    for row, (cell, tags) in enumerate(zip(table.column(columns.words), _read_tags(table, columns.tags), strict=True)):
        words = _read_words(table, row, columns.words, cell)
        if len(words) != len(tags):
            table.refuse(row, f"{len(words)} words and {len(tags)} tags", "every word needs its tag")
        if not any(word.strip() for word in words):
            empty["sentences without a word were"] += 1
            continue
        numbers = []
        for word, tag in zip(words, reader.read(tags), strict=True):
            if tag not in index:
                table.refuse(row, f"the tag {tag!r} is in no training row", f"known: {list_names(labels)}")
            if not word.strip():
                empty["empty words were"] += 1
                continue
            numbers.append(index[tag])
        text, spans = _join_words([word for word in words if word.strip()])
        if columns.source is not None:
            text, spans = table.cell(row, columns.source), table.cell(row, PLACES_OF_WORDS)  # type: ignore[assignment]
        texts.append(text)
        tagged.append([(*span, number) for span, number in zip(spans, numbers, strict=True)])
    if not texts:
        raise DataError(f"{table.path} has no sentence with a word")
    return Rows(texts, None, tagged)


def read_unlabeled_words(file: Path, columns: Sequence[str], dataset: Dataset) -> Rows:
    """Read sentences without tags: lists of words, or texts that are split into words here.

    Tags of a file that has some are not read. Each word has the number of the first tag, which no loss reads.

    Args:
        columns: see `read_unlabeled_table`; without any, also one that is usually called so.
        dataset: of the training rows.

    Raises:
        DataError: the file cannot be read, or a row has no word.
    """
    readers = {ending: read_conll_words if read is read_conll else read for ending, read in READERS.items()}
    table, (name,) = read_unlabeled_table(
        file, columns, dataset, further=(*WORD_COLUMNS, *SENTENCE_COLUMNS), readers=readers
    )
    if name in TAG_COLUMNS and not columns and name not in dataset.text:
        raise DataError(f"{file} has no column of words, only {name!r}", "a column 'tokens' or 'text' was expected")
    texts, labels = list[str](), list[list[WordLabel]]()
    for row, cell in enumerate(table.column(name)):
        if isinstance(cell, list):
            text, spans = _join_words([word for word in _read_words(table, row, name, cell) if word.strip()])
        else:
            text = read_text_cell(table, row, name, cell)
            spans = [match.span() for match in TEXT_WORD.finditer(text)]
        if not spans:
            table.refuse(row, f"no word in the column {name!r}", "leave such rows out")
        texts.append(text)
        labels.append([(start, end, 0) for start, end in spans])
    if file.suffix.lower() == LINES and all(map(_ends_in_tag, texts)):
        raise DataError(
            f"every line of {file} ends in a tag: it is a CoNLL file, and a sentence a line was expected",
            f"call it {file.stem}.conll",
        )
    return Rows(texts, None, labels)


def _ends_in_tag(line: str) -> bool:
    fields = line.split()
    return len(fields) > 1 and (fields[-1] == OUTSIDE or is_span_tag(fields[-1]))


def _join_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join words by spaces; return the text, and begin and end of each word in it."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def _read_words(table: Table, row: int, column: str, cell: object) -> list[str]:
    if not isinstance(cell, list) or not all(isinstance(word, str) for word in cell):
        table.refuse(
            row, f"the column {column!r} holds {str(cell)[:60]!r}, no list of words", "one list of texts a row"
        )
    for word in cell:
        if not is_encodable(word):
            table.refuse(row, f"the word {word!r} holds half a surrogate pair, which is not text")
    return cell


def _read_tags(table: Table, column: str) -> list[list[str]]:
    """Return the tags of every row as names; numbers are named by the schema, where it has names."""
    names, rows = table.class_names.get(column), []
    for row, cell in enumerate(table.column(column)):
        if not isinstance(cell, list):
            table.refuse(row, f"the column {column!r} holds {str(cell)[:60]!r}, no list of tags", "one list a row")
        tags = []
        for tag in cell:
            if isinstance(tag, bool) or not isinstance(tag, str | int) or not str(tag).strip():
                table.refuse(row, f"the tag {tag!r} is no text and no number", "every word needs its tag")
            if isinstance(tag, int):
                if names is not None and not 0 <= tag < len(names):
                    table.refuse(row, f"the tag is {tag}, and the file's schema names {len(names)} tags")
                if tag < 0:
                    table.refuse(
                        row, f"the tag is {tag}", "-100 marks pieces of words; a row has whole words, each with its tag"
                    )
                tag = names[tag] if names is not None else tag
            if not is_encodable(str(tag)):
                table.refuse(row, f"the tag {tag!r} holds half a surrogate pair, which is not text")
            tags.append(str(tag).strip())
        rows.append(tags)
    return rows


def has_tags(table: Table, columns: WordColumns) -> bool:
    """Tell whether a row of a table has a tag other than O and -1, which is what files with secret tags have."""
    if columns.tags not in table.columns:
        return False
    names = table.class_names.get(columns.tags, ())
    empty: tuple[object, ...] = (
        OUTSIDE,
        "-1",
        -1,
        "",
        None,
        *(number for number, name in enumerate(names) if name == OUTSIDE),
    )
    for cell in table.column(columns.tags):
        if not isinstance(cell, list) or any(tag not in empty for tag in cell):
            return True
    return False


def _are_spans(table: Table, tags: Sequence[Sequence[str]]) -> bool:
    """Tell whether all tags are O or have the prefix of a scheme for spans.

    Raises:
        DataError: only some have, or they are spelt in another way: words would be scored instead of spans.
    """
    names = {name for row in tags for name in row} - {OUTSIDE}
    odd = find_odd_tag(names)
    if odd is not None:
        tag, problem = odd
        row = next(number for number, row in enumerate(tags) if tag in row)
        hint = "write B-PER for the first word of a span, I-PER for the others, and O outside of spans"
        table.refuse(row, problem, hint)
    return all(map(is_span_tag, names))


def _refuse_unnamed_spans(table: Table, columns: WordColumns, names: Collection[str]) -> None:
    """Raise DataError where the tags of spans are numbers: nothing says which begin a span."""
    if columns.tags in SPAN_COLUMNS and all(NUMBER.fullmatch(name) for name in names):
        raise DataError(
            f"{table.path}: the column {columns.tags!r} holds numbers, and nothing names them",
            "write the tags themselves, such as B-PER and O; or lay a labels.txt beside the file, with a tag a line in "
            "the order of the numbers; parquet files of `datasets` and the README.md of a clone name them too",
        )


def _refuse_numbered_words(table: Table, columns: WordColumns) -> None:
    """Raise DataError where the words are the numbers 1, 2, 3, ... that CoNLL-U has in its first column."""
    is_numbered = False
    for cell in table.column(columns.words):
        if isinstance(cell, list) and cell:
            if cell[0] not in ("1", "1-2"):
                return
            is_numbered = is_numbered or cell[1:2] in (["2"], ["1"])
    if is_numbered:
        others = [name for name in table.columns if name != columns.words]
        example = f"--text {others[0]} --label {others[min(2, len(others) - 1)]}"
        raise DataError(
            f"{table.path}: the column {columns.words!r} numbers the words of each sentence, as CoNLL-U does",
            f"name the columns of words and tags, for example {example}",
        )


def _refuse_one_sentence(table: Table, columns: WordColumns) -> None:
    """Raise DataError where all words are one sentence, as in a file without blank lines."""
    if len(table.rows) == 1:
        cell = table.cell(0, columns.words)
        count = f" of {len(cell):,} words" if isinstance(cell, list) else ""
        raise DataError(f"{table.path} is one sentence{count}", "a blank line after each sentence; or one row for each")


def _holds_lists(cells: Sequence[object]) -> bool:
    return any(isinstance(cell, list) for cell in cells)
