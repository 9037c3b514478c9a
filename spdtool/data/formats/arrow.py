"""Read Parquet and Arrow files, with the names of classes that the library `datasets` keeps in their schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdtool.data.formats.table import Table, check_table, compose
from spdtool.errors import DataError

if TYPE_CHECKING:
    import pyarrow

ALL_ROWS = 2**62
# pyarrow raises the last two for names that are no UTF-8, and for dates and numbers that Python does not have.
DEFECTS = (OSError, ValueError, OverflowError)


def read_parquet(path: Path) -> Table:
    """Read a parquet file."""
    import pyarrow  # here: it takes longer to import than most files to read
    from pyarrow import parquet

    try:
        content = parquet.read_table(path, partitioning=None)  # else a folder called key=value becomes a column
        return _parquet_table(path, content, first_row=1)
    except (pyarrow.ArrowException, *DEFECTS) as error:
        raise _unreadable_parquet(path, error) from None


def read_arrow(path: Path) -> Table:
    """Read an Arrow file, such as `datasets.save_to_disk` writes."""
    tables = list(iterate_tables(path, ALL_ROWS))
    rows = [row for table in tables for row in table.rows]
    lines = [line for table in tables for line in table.lines]
    return replace(tables[0], rows=rows, lines=lines)


def iterate_tables(path: Path, row_count: int) -> Iterator[Table]:
    """Read a Parquet or Arrow file at most `row_count` rows at a time; raises as `read_parquet` does."""
    import pyarrow
    from pyarrow import parquet

    first_row = 1
    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                for content in file.iter_batches(row_count):
                    yield _parquet_table(path, content, first_row)
                    first_row += content.num_rows
            return
        for batch in _arrow_batches(path):
            for start in range(0, batch.num_rows, row_count):
                content = batch.slice(start, row_count)
                yield _parquet_table(path, content, first_row)
                first_row += content.num_rows
    except (pyarrow.ArrowException, *DEFECTS) as error:
        raise _unreadable_parquet(path, error) from None
    if first_row == 1:
        raise DataError(f"{path} has no rows, only a header", "a file of rows was expected")


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of an Arrow file: a stream, as `datasets` writes it, or a file with an index."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as content:
        try:
            reader = pyarrow.ipc.open_stream(content)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(content)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
            return
        yield from reader


def _parquet_table(path: Path, content: pyarrow.Table | pyarrow.RecordBatch, first_row: int) -> Table:
    columns = [_read_column(column) for column in content.columns]
    rows = list(map(list, zip(*columns, strict=True)))
    lines = list(range(first_row, first_row + len(rows)))
    names = _schema_class_names(content.schema)
    return check_table(Table(path, tuple(content.schema.names), rows, lines, unit="row", class_names=names))


def _read_column(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[object]:
    """Return the cells: decimal numbers as those of other columns, and bytes as text where they are UTF-8."""
    import pyarrow

    cells: list[Any] = column.to_pylist()
    if pyarrow.types.is_decimal(column.type):  # as databases write them
        return [cell if cell is None else _plain_number(cell) for cell in cells]
    if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):  # as Impala writes text
        try:
            return [cell if cell is None else cell.decode() for cell in cells]
        except UnicodeDecodeError:
            return cells
    return cells


def _plain_number(number: Decimal) -> int | float:
    """Return a decimal number as a whole one, or as a float."""
    return int(number) if number == number.to_integral_value() else float(number)


def _schema_class_names(schema: pyarrow.Schema) -> dict[str, tuple[str, ...]]:
    """Return the names of classes by column, where the library `datasets` has written the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    names = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, list) and len(feature) == 1:  # as older versions write such a list
            feature = feature[0]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            names[compose(column)] = tuple(map(str, feature["names"]))
    return names


def _unreadable_parquet(path: Path, error: Exception) -> DataError:
    kind = path.suffix.lower().removeprefix(".")
    return DataError(f"{path} is not a readable {kind} file: {str(error).splitlines()[0]}")
