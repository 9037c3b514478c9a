"""What the labels of a column are: classes, or numbers to predict. All of them are looked at, in however many files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spdtool.data.files import Table
from spdtool.errors import DataError

MOST_CLASSES = 10_000


@dataclass
class Labels:
    """Keeps what was seen of a label column; it does not grow with the rows.

    Attributes:
        names: of the labels, in the order in which they came, and the number of each; no more once there are too many.
        rows, numbers: how many rows there are, and in how many of them the label is a number.
        whole: whether all numbers are whole.
        odd: the place of the first label that is no number, and the label.
    """

    names: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    numbers: int = 0
    whole: bool = True
    odd: tuple[str, str] | None = None

    def add(self, table: Table, labels: Sequence[str]) -> None:
        """Look at the labels of further rows.

        Raises:
            DataError: they are neither numbers nor few enough to be classes.
        """
        self.rows += len(labels)
        for label, count in Counter(labels).items():
            value = number(label)
            if value is not None:
                self.numbers += count
                self.whole = self.whole and value.is_integer()
            elif self.odd is None:
                self.odd = table.place(labels.index(label)), label
            if not self.too_many:
                self.names.setdefault(label, len(self.names))
        if self.too_many and self.odd is not None and not self._mostly_numbers:
            raise DataError(
                f"{table.path} brings the labels to more than {MOST_CLASSES} different ones", "are they classes?"
            )

    @property
    def too_many(self) -> bool:
        """Whether there are more names than are kept."""
        return len(self.names) > MOST_CLASSES

    def classes(self, where: str, regression: bool | None) -> tuple[str, ...]:
        """The classes in order; none where the labels are numbers to predict.

        Args:
            where: the file or folder, for messages.
            regression: whether they are such numbers; None: if all are numbers and not all whole.

        Raises:
            DataError: all are alike; some are no numbers where they should be; there are too many to be classes.
        """
        if len(self.names) < 2:
            raise DataError(
                f"every label in {where} is {next(iter(self.names))!r}", "two different labels are the least"
            )
        crowded = self.too_many or len(self.names) > max(2, self.rows // 2)
        expected = regression is None and self._mostly_numbers and (crowded or not self.whole)
        if self.odd is not None and (regression or expected):
            place, label = self.odd
            way_out = "" if regression or crowded else "; if the labels are classes: --set regression=false"
            raise DataError(
                f"{place}: the label {label!r} is not a number, and {self.numbers:,} of {self.rows:,} are",
                f"a regression needs a number in every row: mend such rows or leave them out{way_out}",
            )
        if regression or (regression is None and not self.whole and self.odd is None):
            return ()
        if crowded:
            count = f"more than {MOST_CLASSES}" if self.too_many else len(self.names)
            raise DataError(
                f"{where} has {count} different labels in {self.rows} rows",
                "is it the label column? whole numbers are classes unless --set regression=true",
            )
        return in_order(self.names)

    @property
    def _mostly_numbers(self) -> bool:
        return 2 * self.numbers > self.rows


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes, sorted; by size where all are whole numbers."""
    numbers = {name: number(name) for name in names}
    whole = all(value is not None and value.is_integer() for value in numbers.values())
    return tuple(sorted(numbers, key=lambda name: (float(name) if whole else 0.0, name)))


def of_column(table: Table, column: str) -> list[str]:
    """The labels in a column, as names.

    Raises:
        DataError: one is missing, or is no text or number.
    """
    return [label_of(table, row, value) for row, value in enumerate(table.column(column))]


def label_of(table: Table, row: int, value: Any) -> str:
    """The label as a name: 1, 1.0 and "1" are the same one, "01" is another."""
    if value is None or not str(value).strip() or (isinstance(value, float) and not math.isfinite(value)):
        table.refuse(row, f"no label: {value!r}", "leave such rows out")
    if not isinstance(value, str | int | float):
        table.refuse(row, f"the label is a {type(value).__name__}", "a label is text or a number")
    whole = re.fullmatch(r"(-?)(0|[1-9]\d*)(\.0*)?", str(value), re.ASCII)
    return str(value) if whole is None else str(int(whole[1] + whole[2]))


def number(label: str) -> float | None:
    """The finite number that `label` spells plainly, as 3, -0.5 or 1e-3; None for anything else."""
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", label.strip(), re.ASCII):
        return None
    number = float(label)
    return number if math.isfinite(number) else None
