"""Rows with several labels: lists, names or numbers with commas, or a column of zeros and ones for each label.

Whether rows are such is never guessed: they hold lists, or `labels.txt` explains what stands between commas, or the
recipe says so (`multilabel`, or several columns as the label).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spdtool.data.columns import Columns, read_texts, require_column
from spdtool.data.dataset import Rows
from spdtool.data.formats.table import MOST_DIGITS, Table, read_text
from spdtool.data.labels import SWITCHES, normalize_label, plain_switch, sort_classes
from spdtool.errors import DataError

NAMES_FILE = "labels.txt"  # a name a line, whose number from 0 the rows may have in its place
# Between the labels of a cell; that which most cells have is chosen.
SEPARATORS = {",": "commas", "|": "vertical bars", ";": "semicolons", " ": "spaces"}
MOST_LABELS = 1000  # each row has a number for each of them


@dataclass(frozen=True)
class LabelSets:
    """How the rows of a data set name their labels.

    Attributes:
        columns: where the labels are.
        names: of all labels, in order.
        named_by_number: whether a number in the rows is the place of a label among the names.
        reason: a phrase that says how it was recognised, for the plan.
        are_vectors: whether the list of a row has a 0 or 1 for each label.
        separator: between labels that are one text.
    """

    columns: Columns
    names: tuple[str, ...]
    named_by_number: bool
    reason: str
    are_vectors: bool = False
    separator: str = ","

    def table_to_rows(self, table: Table) -> Rows:
        """Return the rows of a table, with labels uint8 [rows, labels], 1 where the row has the label.

        Raises:
            DataError: a column is missing, a text or all labels of a row are missing, or a label is unknown.
        """
        columns = self.columns
        for name in (*columns.text, *(columns.switches or (columns.label,))):
            require_column(table, name)
        first, second = read_texts(table, columns.text[0]), None
        if len(columns.text) == 2:
            second = read_texts(table, columns.text[1])
        if columns.switches:
            return Rows(first, second, _read_switches(table, columns.switches))
        if self.are_vectors:
            return Rows(first, second, _read_vectors(table, columns.label, len(self.names)))
        index = {name: number for number, name in enumerate(self.names)}
        labels = np.zeros((len(table.rows), len(self.names)), np.uint8)
        numbered = self.names if self.named_by_number else None
        for row, names in enumerate(read_label_sets(table, columns.label, numbered, self.separator)):
            for name in names:
                if name not in index:
                    table.refuse(
                        row, f"the label {name!r} is in no training row", f"known: {', '.join(self.names[:20])}"
                    )
                labels[row, index[name]] = 1
        return Rows(first, second, labels)


def find_label_sets(table: Table, columns: Columns, folder: Path, multilabel: bool | None) -> LabelSets | None:
    """Return how the training rows name several labels; None where each row has one.

    Args:
        folder: where `labels.txt` may lie.
        multilabel: the recipe's field.

    Raises:
        DataError: rows have lists, and the recipe says that they have one label each; there are too few or too many
            labels; or a row names one that `labels.txt` has not.
    """
    if columns.switches:
        reason = f"the {len(columns.switches)} columns {', '.join(columns.switches[:8])} say which labels a row has"
        return LabelSets(columns, _check_names(table, columns.switches), named_by_number=False, reason=reason)
    cells = table.column(columns.label)
    lists = next((row for row, cell in enumerate(cells) if isinstance(cell, list | tuple)), None)
    if lists is not None:
        _refuse_tags_of_words(table, columns.label)
    if multilabel is False:
        if lists is not None:
            table.refuse(lists, "the label is a list, and the recipe says multilabel=false", "leave that out")
        return None
    names, source = read_names(folder), NAMES_FILE
    if names is None and columns.label in table.class_names:
        names, source = table.class_names[columns.label], "the schema"
    if lists is not None and _are_vectors(cells):
        reason = f"{columns.label!r} holds a 0 or 1 for each label"
        reason += "; their numbers from 0 are their names" if names is None else f", named by {source}"
        numbers = tuple(map(str, range(len(cells[lists]))))  # type: ignore[arg-type]
        checked = _check_names(table, numbers if names is None else names)
        return LabelSets(columns, checked, named_by_number=False, reason=reason, are_vectors=True)
    separator = _choose_separator(cells, names)
    if lists is not None:
        reason = f"{columns.label!r} holds lists"
    elif multilabel:
        reason = f"as the recipe says, parted by {SEPARATORS[separator]}"
    elif names is not None and source == NAMES_FILE and _has_several(cells, names, separator):
        reason = f"rows of {columns.label!r} have several numbers or names of {NAMES_FILE}"
    else:
        return None
    way_out = "" if lists is not None or multilabel else "; if a field is one label: --set multilabel=false"
    if names is None:
        every = {name for row_names in read_label_sets(table, columns.label, None, separator) for name in row_names}
        checked = _check_names(table, sort_classes(every))
        return LabelSets(columns, checked, named_by_number=False, reason=reason + way_out, separator=separator)
    reason += f", named by {source}"
    checked = _check_names(table, names)
    return LabelSets(columns, checked, named_by_number=True, reason=reason + way_out, separator=separator)


def read_names(folder: Path) -> tuple[str, ...] | None:
    """Return the lines of `labels.txt` in a folder; None where there is none.

    Raises:
        DataError: it cannot be read, or names a label twice.
    """
    file = folder / NAMES_FILE
    if not file.is_file():
        return None
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{file}, line {number}: no name", "a name a line, in the order of the numbers")
        if names.index(name) != number - 1:
            raise DataError(f"{file}, line {number}: {name!r} is there already", "each label has one name")
    return tuple(names)


def _choose_separator(cells: Sequence[object], names: Sequence[str] | None) -> str:
    """Return what parts the labels of a cell; spaces only where no cell has another sign, and every part is a label.

    Args:
        names: that the rows may have; None: a part is a label if different cells have it.
    """
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    counts = {separator: sum(separator in text for text in texts) for separator in SEPARATORS}
    spaces = counts.pop(" ")
    if any(counts.values()) or not spaces:
        return max(counts, key=lambda separator: counts[separator])
    words = Counter(word for text in set(texts) for word in set(text.split()))
    for word, count in words.items():
        if count < 2 if names is None else not _is_label(word, names):
            return ","
    return " "


def find_joined_classes(classes: Sequence[str]) -> str | None:
    """Return a class that looks like several labels in one text: each of its parts stands in another class too."""
    for separator in SEPARATORS:
        parts = {name: [part.strip() for part in name.split(separator)] for name in classes}
        counts = Counter(part for name in classes for part in set(parts[name]))
        for name in classes:
            # A space is part of many names.
            if separator != " " and len(parts[name]) > 1 and all(part and counts[part] > 1 for part in parts[name]):
                return name
    return None


def name_numbers(table: Table, names: Sequence[str] | None) -> Table:
    """Return the table with names for the columns that hold nothing but their numbers, or lists of numbers.

    Args:
        names: of `labels.txt`; None: there is no such file.
    """
    if names is None:
        return table
    named = dict(table.class_names)
    for column in table.columns:
        cells = table.column(column)
        items = [item for cell in cells for item in (cell if isinstance(cell, list) else [cell])]
        # `str`: a file without types holds text
        if column not in named and items and all(_is_number_of_name(str(item), names) for item in items):
            named[column] = tuple(names)
    return replace(table, class_names=named)


def read_label_sets(table: Table, column: str, names: Sequence[str] | None, separator: str = ",") -> list[list[str]]:
    """Return the names of the labels of each row, which may be none where the row has an empty list.

    Args:
        names: that the rows may have, or their numbers from 0; None: a row may have any.
        separator: between labels that are one text.

    Raises:
        DataError: a cell is empty, or holds what is no label.
    """
    known = None if names is None else set(names)
    sets = []
    for row, cell in enumerate(table.column(column)):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            table.refuse(
                row, f"no label: {cell!r}", "leave such rows out; a row that has none of the labels is [] in jsonl"
            )
        if isinstance(cell, dict):
            table.refuse(row, f"the label is an object: {str(cell)[:60]}", "a list of names or numbers was expected")
        items: Sequence[object] = cell if isinstance(cell, list | tuple) else _split_cell(str(cell), separator)
        labels = []
        for item in items:
            if isinstance(item, float) and not item.is_integer():
                table.refuse(
                    row, f"the list of labels holds {item!r}", "names or numbers of labels; or a 0 or 1 for each label"
                )
            label = normalize_label(table, row, item.strip() if isinstance(item, str) else item)
            if known is not None and names is not None and label not in known:
                label = _name_of_number(table, row, label, names)
            labels.append(label)
        sets.append(labels)
    return sets


def _are_vectors(cells: Sequence[object]) -> bool:
    """Tell whether lists have a 0 or 1 for each label, as the trainer of Hugging Face wants them, and no names.

    They are of one length, and hold something twice, which no set of labels does.
    """
    lists = [cell for cell in cells if isinstance(cell, list | tuple)]
    if len(lists) < len(cells) or len({len(cell) for cell in lists}) != 1:
        return False
    if not all(plain_switch(item) in SWITCHES for cell in lists for item in cell):
        return False
    return any(len({plain_switch(item) for item in cell}) < len(cell) for cell in lists)


def _read_vectors(table: Table, column: str, count: int) -> np.ndarray:
    labels = np.zeros((len(table.rows), count), np.uint8)
    for row, cell in enumerate(table.column(column)):
        if not isinstance(cell, list | tuple) or len(cell) != count:
            table.refuse(row, f"the column {column!r} holds {str(cell)[:60]}", f"a list of {count} zeros and ones")
        for index, item in enumerate(cell):
            switch = SWITCHES.get(plain_switch(item))
            if switch is None:
                table.refuse(row, f"the list in {column!r} holds {item!r}", f"a list of {count} zeros and ones")
            labels[row, index] = switch
    return labels


def _refuse_tags_of_words(table: Table, column: str) -> None:
    """Raise DataError where lists of labels are the tags of words: B-PER, I-PER, O."""
    names = {item for cell in table.column(column) if isinstance(cell, list) for item in cell if isinstance(item, str)}
    if "O" in names and any(name.startswith("B-") for name in names):
        raise DataError(
            f"{table.path}: the lists in {column!r} are tags of words, and no column holds lists of words",
            "give the words of each row as a list too: a column tokens or words",
        )


def _name_of_number(table: Table, row: int, label: str, names: Sequence[str]) -> str:
    if not _is_number_of_name(label, names):
        table.refuse(
            row, f"the label {label!r} is neither one of the {len(names)} names nor a number below {len(names)}"
        )
    return names[int(label)]


def _has_several(cells: Sequence[object], names: Sequence[str], separator: str) -> bool:
    """Tell whether a cell has several names or numbers of names, and is no name itself."""
    for cell in cells:
        words = _split_cell(str(cell), separator)
        if len(words) > 1 and cell not in names and all(_is_label(word, names) for word in words):
            return True
    return False


def _split_cell(cell: str, separator: str) -> list[str]:
    return cell.split() if separator == " " else [word.strip() for word in cell.split(separator)]


def _is_label(word: str, names: Sequence[str]) -> bool:
    return word in names or _is_number_of_name(word, names)


def _is_number_of_name(word: str, names: Sequence[str]) -> bool:
    return word.isdecimal() and len(word) <= MOST_DIGITS and int(word) < len(names)


def _read_switches(table: Table, columns: Sequence[str]) -> np.ndarray:
    labels = np.zeros((len(table.rows), len(columns)), np.uint8)
    for index, name in enumerate(columns):
        for row, cell in enumerate(table.column(name)):
            switch = SWITCHES.get(plain_switch(cell))
            if switch is None:
                table.refuse(row, f"the column {name!r} holds {cell!r}", "0 or 1, for a row without or with the label")
            labels[row, index] = switch
    return labels


def _check_names(table: Table, names: Sequence[str]) -> tuple[str, ...]:
    if len(names) < 2:
        raise DataError(f"{table.path} has {len(names)} label", "two different labels are the least")
    if len(names) > MOST_LABELS:
        raise DataError(
            f"{table.path} has {len(names):,} labels", f"several labels a row: {MOST_LABELS:,} are the most"
        )
    return tuple(names)
