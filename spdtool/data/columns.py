"""Which columns of a user's file are the texts and the label, and what their cells must hold."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from spdtool.data.dataset import Rows
from spdtool.data.formats.table import Table, compose, is_encodable
from spdtool.data.kinds.unsupported import kind_of_columns
from spdtool.data.labels import SWITCHES, normalize_label, parse_number, plain_switch, read_labels
from spdtool.errors import DataError

LABEL_NAMES = ("label", "labels", "target")
TEXT_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)
LISTED_CLASSES = 20
WORDS_OF_TEXT = 5  # a column's name has fewer
LEAST_SWITCHES = 3  # columns of zeros and ones that look like one for each label


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the one or two texts and the label.

    Attributes:
        label: the column, or its columns joined by commas.
        switches: columns of zeros and ones, one for each label, where a row may have several; else empty.
    """

    text: tuple[str, ...]
    label: str
    switches: tuple[str, ...] = ()


def choose_columns(table: Table, text: Sequence[str], label: str | None, multilabel: bool | None = None) -> Columns:
    """Return the requested columns; others are guessed from their names if only one reading is possible.

    Args:
        table: the training rows.
        text: names of the text columns; empty: guess.
        label: name of the label column, or several columns of zeros and ones, joined by commas; None: guess.
        multilabel: whether a row may have several labels; then columns of zeros and ones are labels.

    Raises:
        DataError: a column does not exist, is named twice, or cannot be guessed.
    """
    text, label = [compose(name) for name in text], compose(label) if label is not None else None
    switches = _choose_switches(table, label, multilabel)
    refuse_unsupported_kind(table, [*text, *(switches or [label])] if switches or (text and label is not None) else ())
    text = _rejoin_at_comma(table, text)
    if len(text) > 2:
        raise DataError(f"--text names {len(text)} columns: {', '.join(text)}", "one sentence, or a pair of them")
    for name in text:
        require_column(table, name)
    if label is not None and not switches:
        require_column(table, label)
    if len(set(text)) < len(text):
        raise DataError(f"--text names the column {text[0]!r} twice", "a pair needs two columns")
    if switches:
        others = [name for name in table.columns if name not in switches]
        return Columns(tuple(text) or _guess_text(table, others), ",".join(switches), switches)
    if label is None:
        label = _guess_label(table, text)
    if label in text:
        raise DataError(f"the column {label!r} is named as text and as label", "the model would read the answer")
    others = [name for name in table.columns if name != label]
    return Columns(tuple(text) or _guess_text(table, others), label)


def _choose_switches(table: Table, label: str | None, multilabel: bool | None) -> tuple[str, ...]:
    """Return the columns of zeros and ones that are the labels: those that are named, or all if the recipe says so."""
    if label is not None:
        named = tuple(compose(name.strip()) for name in label.split(","))
        is_column = label in table.columns or len(named) == 1
        return () if is_column or not set(named) <= set(table.columns) else named
    if not multilabel or set(LABEL_NAMES) & set(table.columns):
        return ()
    switches = tuple(name for name in table.columns if _holds_switches(table.column(name)))
    for name in table.columns:
        odd = _find_odd_switch(table.column(name)) if name not in switches else None
        if odd is not None:
            cell = table.column(name)[odd]
            table.refuse(
                odd,
                f"the column {name!r} holds {cell!r}, and zeros and ones in most rows",
                "0 or 1, for a row without or with the label; columns that are no labels are left out by "
                f"--label {','.join(switches) or 'COLUMN,COLUMN'}",
            )
    return switches


def refuse_unsupported_kind(table: Table, chosen: Sequence[str] = ()) -> None:
    """Raise DataError, with the name of the kind of task, for rows that spdtool cannot learn from.

    Args:
        table: all rows, or some.
        chosen: columns of texts and label that the user names; the others do not count then.
    """
    kind = kind_of_columns(chosen or table.columns)
    if kind is None and not chosen and not set(LABEL_NAMES) & set(table.columns):
        switches = [name for name in table.columns if _holds_switches(table.column(name))]
        if len(switches) >= LEAST_SWITCHES:
            raise DataError(
                f"{table.path} has no label column, and zeros and ones in {_quote(switches)}",
                f"if each of them is a label: --set multilabel=true, or name some: --label {','.join(switches[:2])}",
            )
    if kind is not None:
        columns = _quote(table.columns)
        raise DataError(f"{table.path} has the rows of {kind.name}, which is not supported: {columns}", kind.hint)


def _holds_switches(cells: Sequence[object]) -> bool:
    """Tell whether the cells are zeros and ones, as the columns of a table with a column for each label."""
    return bool(cells) and all(plain_switch(cell) in SWITCHES for cell in cells)


def _find_odd_switch(cells: Sequence[object]) -> int | None:
    """Return the first row that holds neither 0 nor 1 in a column that has both in most rows; None where none does."""
    odd = [row for row, cell in enumerate(cells) if plain_switch(cell) not in SWITCHES]
    kinds = {SWITCHES.get(plain_switch(cell)) for cell in cells}
    return odd[0] if odd and {True, False} <= kinds and 2 * len(odd) < len(cells) else None


def require_column(table: Table, name: str) -> None:
    """Raise DataError, with similar names, if the table has no such column."""
    if name in table.columns:
        return
    similar = difflib.get_close_matches(name, table.columns, n=3, cutoff=0.5)
    hint = None
    if similar:
        hint = f"did you mean {' or '.join(map(repr, similar))}?"
    if len(table.columns) == 1:
        hint = "it has one column: are its fields separated as the file's ending says?"
    raise DataError(f"{table.path} has no column {name!r}; it has {_quote(table.columns)}", hint)


def read_texts(table: Table, name: str) -> list[str]:
    """Return the texts of a column.

    Raises:
        DataError: a cell is empty, or is no text.
    """
    return [read_text_cell(table, row, name, cell) for row, cell in enumerate(table.column(name))]


def read_text_cell(table: Table, row: int, name: str, cell: object) -> str:
    """Return the text of a cell of the column `name`; raises as `read_texts` does."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        table.refuse(row, f"no text in the column {name!r}", "leave such rows out")
    if isinstance(cell, list):
        hint = "for a tag of each word, name the column that holds lists of tags: --label COLUMN"
        table.refuse(row, f"the column {name!r} holds lists", hint)
    if not isinstance(cell, str):
        table.refuse(row, f"the column {name!r} holds a {type(cell).__name__}, not text", "is it the text column?")
    if not is_encodable(cell):
        table.refuse(row, f"the column {name!r} holds half a surrogate pair, which is not text")
    return cell


def table_to_rows(table: Table, columns: Columns, classes: tuple[str, ...]) -> Rows:
    """Return the rows of a table, with labels as indices into `classes`, or as numbers if there are none.

    Raises:
        DataError: a column is missing, a text is missing or is no text, a label is none of the classes or no number.
    """
    for name in (*columns.text, columns.label):
        require_column(table, name)
    first, second = read_texts(table, columns.text[0]), None
    if len(columns.text) == 2:
        second = read_texts(table, columns.text[1])
    if classes:
        return Rows(first, second, _read_classes(table, columns.label, classes))
    return Rows(first, second, _read_numbers(table, columns.label))


def _read_classes(table: Table, column: str, classes: tuple[str, ...]) -> list[int]:
    index = {name: number for number, name in enumerate(classes)}
    labels = []
    for row, label in enumerate(read_labels(table, column)):
        if label not in index:
            listed = ", ".join(classes[:LISTED_CLASSES])
            table.refuse(row, f"the label {label!r} is in no training row", f"known: {listed}")
        labels.append(index[label])
    return labels


def _read_numbers(table: Table, column: str) -> list[float]:
    labels = []
    for row, cell in enumerate(table.column(column)):
        label = normalize_label(table, row, cell)
        number = parse_number(label)
        if number is None:
            table.refuse(row, f"the label {label!r} is not a number", "all others are; this is a regression")
        labels.append(number)
    return labels


def _rejoin_at_comma(table: Table, text: Sequence[str]) -> Sequence[str]:
    """Return one column whose name holds a comma, if `--text` was cut there; else `text`."""
    if len(text) < 2 or set(text) <= set(table.columns):
        return text
    for name in table.columns:
        if [word.strip() for word in name.split(",")] == list(text):
            return (name,)
    return text


def _guess_label(table: Table, text: Sequence[str]) -> str:
    candidates = [name for name in LABEL_NAMES if name in table.columns and name not in text]
    if len(candidates) != 1:
        count = "more than one" if candidates else "no"
        hint = "give --label COLUMN"
        if _looks_like_rows(table):
            hint = "its first line looks like a row: write a line of names above it, for example text,label"
        raise DataError(
            f"{table.path} has {count} column that is clearly the label; it has {_quote(table.columns)}", hint
        )
    return candidates[0]


def _looks_like_rows(table: Table) -> bool:
    """Tell whether the first line of a file is a row: some name of a column stands among its cells, too, or is long."""
    is_long = any(len(name.split()) >= WORDS_OF_TEXT for name in table.columns)
    return is_long or any(name and name in table.column(name) for name in table.columns)


def _guess_text(table: Table, others: Sequence[str]) -> tuple[str, ...]:
    """Return the text columns among `others`, the columns that are no label."""
    if len(others) == 1:
        return (others[0],)
    candidates = [names for names in TEXT_NAMES if set(names) <= set(others)]
    widest = []
    for names in candidates:
        # A pair that holds the name of a single text as well is the better reading: question and sentence.
        if not any(set(names) < set(wider) for wider in candidates):
            widest.append(names)
    if len(widest) != 1:
        raise DataError(
            f"{table.path} leaves open which column is the text; it has {_quote(table.columns)}",
            "give --text COLUMN, or --text FIRST,SECOND for pairs",
        )
    return widest[0]


def _quote(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
