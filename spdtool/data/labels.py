"""Decide what the labels of a column are: classes, or numbers to predict. Every label of every file counts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spdtool.data.formats.table import MOST_DIGITS, Table, is_encodable
from spdtool.errors import DataError

MOST_CLASSES = 10_000  # beyond, a column of ids is more likely; and every different label is kept in memory
WHOLE_NUMBER = re.compile(r"(-?)(0|[1-9]\d*)(\.0*)?", re.ASCII)
SWITCHES = {"0": False, "1": True, "false": False, "true": True}
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass
class LabelSummary:
    """Summary of a label column; it does not grow with the rows, and is stored with rows in shards.

    Attributes:
        names: label to its number, in order of appearance; stays as it is once there are too many.
        rows: how many rows there are.
        numbers: rows whose label is a number.
        whole: whether all these numbers are whole.
        odd: the first label that is no number: its location in the files, and the label.
    """

    names: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    numbers: int = 0
    whole: bool = True
    odd: tuple[str, str] | None = None

    def add(self, table: Table, labels: Sequence[str]) -> None:
        """Take further rows into account.

        Raises:
            DataError: the labels are neither numbers nor few enough to be classes.
        """
        self.rows += len(labels)
        for label, count in Counter(labels).items():
            number = parse_number(label)
            if number is not None:
                self.numbers += count
                self.whole = self.whole and number.is_integer()
            elif self.odd is None:
                self.odd = table.location(labels.index(label)), label
            if not self.too_many:
                self.names.setdefault(label, len(self.names))
        if self.too_many and self.odd is not None and not self._mostly_numbers:
            raise DataError(
                f"{table.path} brings the labels to more than {MOST_CLASSES} different ones", "are they classes?"
            )

    @property
    def too_many(self) -> bool:
        """Whether there are more different labels than classes may be."""
        return len(self.names) > MOST_CLASSES

    def classes(self, source: str, regression: bool | None) -> tuple[str, ...]:
        """Return the classes in order; none where the labels are numbers to predict.

        Args:
            source: the file or folder, for messages.
            regression: whether the labels are such numbers; None: if all are numbers and not all whole.

        Raises:
            DataError: all labels are alike; some are no numbers where they should be; there are too many to be classes.
        """
        if len(self.names) < 2:
            raise DataError(
                f"every label in {source} is {next(iter(self.names))!r}", "two different labels are the least"
            )
        # Classes repeat: with more different labels than half the rows, the column is something else.
        crowded = self.too_many or len(self.names) > max(2, self.rows // 2)
        self._refuse_odd_label(regression, crowded=crowded)
        if regression or (regression is None and not self.whole and self.odd is None):
            return ()
        if crowded:
            count = f"more than {MOST_CLASSES}" if self.too_many else len(self.names)
            raise DataError(
                f"{source} has {count} different labels in {self.rows} rows",
                "is it the label column? whole numbers are classes unless --set regression=true",
            )
        return sort_classes(self.names)

    def _refuse_odd_label(self, regression: bool | None, *, crowded: bool) -> None:
        """Raise DataError for a label that is no number among numbers to predict."""
        looks_numeric = regression is None and self._mostly_numbers and (crowded or not self.whole)
        if self.odd is None or not (regression or looks_numeric):
            return
        location, label = self.odd
        way_out = ""
        if not regression and not crowded:
            way_out = "; if the labels are classes: --set regression=false"
        raise DataError(
            f"{location}: the label {label!r} is not a number, and {self.numbers:,} of {self.rows:,} are",
            f"a regression needs a number in every row: mend such rows or leave them out{way_out}",
        )

    @property
    def _mostly_numbers(self) -> bool:
        return 2 * self.numbers > self.rows


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names of classes; by size where all are whole numbers."""
    names = sorted(names)
    for name in names:
        number = parse_number(name)
        if number is None or not number.is_integer():
            return tuple(names)
    return tuple(sorted(names, key=float))  # sorted twice: numbers too long for a float stay in the order of text


def read_labels(table: Table, column: str, *, as_numbers: bool = False) -> list[str]:
    """Return the labels in a column, as names; those that a schema or a README gives to class numbers, if one does.

    Args:
        as_numbers: the labels are numbers to predict, whatever the schema calls them.

    Raises:
        DataError: one is missing, or is no text or number.
    """
    cells, names = table.column(column), table.class_names.get(column)
    if names is None or as_numbers:
        return [normalize_label(table, row, cell) for row, cell in enumerate(cells)]
    labels = []
    for row, cell in enumerate(cells):
        number = _class_number(cell)
        if number is not None and 0 <= number < len(names):
            labels.append(names[number])
        elif number is None and isinstance(cell, str) and cell.strip():  # a text file may hold the names themselves
            labels.append(normalize_label(table, row, cell))
        elif cell is None or number == -1:  # what data sets have for a label that is kept secret
            table.refuse(row, f"no label: {cell!r}", "leave such rows out")
        else:
            source = "the schema of the file, labels.txt or the README"
            table.refuse(row, f"the label is {cell!r}, and {source} names {len(names)} classes")
    return labels


def _class_number(cell: object) -> int | None:
    """Return the class number in a cell, which is text in files without types; None where it is something else."""
    if isinstance(cell, str) and re.fullmatch(r"-?\d+", cell.strip(), re.ASCII) and len(cell) <= MOST_DIGITS:
        return int(cell)
    return cell if isinstance(cell, int) else None


def order_by_schema(classes: tuple[str, ...], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes in the order in which a file's schema names them; as they are where it names none."""
    if names is None:
        return classes
    order = {name: number for number, name in enumerate(names)}
    return tuple(sorted(classes, key=lambda name: order.get(name, len(order))))


def normalize_label(table: Table, row: int, cell: object) -> str:
    """Return the label as a name: 1, 1.0 and "1" are the same one, "01" is another."""
    if cell is None or not str(cell).strip() or (isinstance(cell, float) and not math.isfinite(cell)):
        table.refuse(row, f"no label: {cell!r}", "leave such rows out")
    if isinstance(cell, list | tuple):
        table.refuse(row, "the label is a list, and those of the first training rows are none", "one form for all rows")
    if not isinstance(cell, str | int | float):
        table.refuse(row, f"the label is a {type(cell).__name__}", "a label is text or a number")
    if isinstance(cell, str) and not is_encodable(cell):
        table.refuse(row, f"the label {cell!r} holds half a surrogate pair, which is not text")
    # Formats and libraries write the same class as 1 or 1.0; by text, because an int may be too long for a float.
    match = WHOLE_NUMBER.fullmatch(str(cell))
    if match is None or len(match[2]) > MOST_DIGITS:
        return str(cell)
    sign, digits = match[1], match[2]
    return str(int(sign + digits))


def plain_switch(cell: object) -> str:
    """Return a zero or one as the keys of `SWITCHES` spell it: 1.0 as 1, TRUE as true."""
    return str(cell).strip().lower().removesuffix(".0")


def parse_number(label: str) -> float | None:
    """Return the finite number that `label` plainly is, as 3, -0.5 or 1e-3; None for anything else."""
    if not NUMBER.fullmatch(label.strip()):
        return None
    number = float(label)
    return number if math.isfinite(number) else None
