"""Turn token ids, given as lists, arrays or the model's inputs by name, into rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spdtool.data.windows import TextWindow
from spdtool.errors import DataError

TEXT_KINDS = "OUT"  # of numpy: objects, text of one length, text of any


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one row; each array is int64 [tokens].

    Attributes:
        window: what it is of its text; None for rows of mere token ids.
    """

    ids: np.ndarray
    types: np.ndarray
    mask: np.ndarray
    window: TextWindow | None = None


def are_texts(values: object) -> bool:
    """Whether `values` is a text or a non-empty sequence of texts."""
    if isinstance(values, str):
        return True
    if not isinstance(values, Sequence | np.ndarray) or getattr(values, "shape", None) == ():
        return False
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def list_column(values: Any) -> Any:
    """Return a column of texts as a list: a Series of pandas, an array or an iterator; anything else as it is."""
    if isinstance(values, Iterator):
        return list(values)
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim == 1 and array.dtype.kind in TEXT_KINDS:
            return array.tolist()
    return values


def check_pairs(texts: Sequence[str], pairs: Sequence[str]) -> None:
    """Raise DataError unless there is one second text for each first one."""
    count = "something else than texts"
    if are_texts(pairs):
        if len(pairs) == len(texts):
            return
        count = str(len(pairs))
    raise DataError(
        f"{len(texts)} texts and, as their pairs, {count}: as many texts were expected",
        "one second text for each first one",
    )


def token_row(ids: Any, types: Any = None, mask: Any = None) -> TokenRow:
    """Make a row without its padding on the right.

    Masked tokens elsewhere stay: without them the others would move to other positions.
    """
    tokens = np.asarray(ids, np.int64)
    token_types = np.zeros_like(tokens) if types is None else np.asarray(types, np.int64)
    real = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
    if not len(tokens) == len(token_types) == len(real):
        raise DataError("input_ids, attention_mask and token_type_ids differ in length")
    end = int(np.flatnonzero(real).max(initial=-1)) + 1
    return TokenRow(tokens[:end], token_types[:end], real[:end])


def token_rows_of_columns(inputs: Mapping[str, Any]) -> list[TokenRow]:
    """Make rows of the model's inputs by name. Raises DataError."""
    unknown = inputs.keys() - {"input_ids", "attention_mask", "token_type_ids", "labels"}
    if unknown or "input_ids" not in inputs:
        raise DataError(
            f"the inputs hold {', '.join(map(str, inputs)) or 'nothing'}",
            "input_ids, and attention_mask and token_type_ids where they are not all ones and zeros",
        )
    ids = rows_of_integers(inputs["input_ids"], "input_ids")
    columns: list[Sequence[Any]] = [ids]
    for name in ("token_type_ids", "attention_mask"):
        if inputs.get(name) is None:
            columns.append([None] * len(ids))
        else:
            columns.append(rows_of_integers(inputs[name], name))
    if any(len(column) != len(ids) for column in columns):
        raise DataError("input_ids, attention_mask and token_type_ids have different numbers of rows")
    return [token_row(*cells) for cells in zip(*columns, strict=True)]


def rows_of_integers(values: Any, name: str) -> list[np.ndarray]:
    """Split `values` into rows of whole numbers; a single row becomes a list of one. Raises DataError."""
    expected = f"{name}: texts (second texts in pairs=) or rows of whole numbers were expected"
    if hasattr(values, "__array__"):  # of numpy or torch
        values = np.asarray(values)
    is_sequence = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes)
    if not is_sequence or getattr(values, "shape", None) == ():
        raise DataError(f"{expected}, found {type(values).__name__}")
    outer = list(values)
    if outer and all(isinstance(value, int | np.integer) for value in outer):
        outer = [outer]
    if any(isinstance(value, str) for value in outer):  # not all are, or it would be taken for texts
        number = next(number for number, value in enumerate(outer) if not isinstance(value, str))
        raise DataError(f"row {number} is {outer[number]!r}, and others are texts", "leave rows without a text out")
    rows = []
    for number, value in enumerate(outer):
        try:
            row = np.asarray(value)
        except ValueError:  # lists of different depth
            row = np.empty((0, 0))
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iub"):
            text = repr(value)
            if len(text) > 60:
                text = f"{text[:57]}..."
            raise DataError(f"{expected}; row {number} is {text}")
        rows.append(row)
    return rows
