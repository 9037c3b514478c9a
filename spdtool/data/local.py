"""A task made of your own rows: a csv, tsv, jsonl or parquet file, or a folder with one for train and one for dev.

    spdtool compress --data reviews.csv --text review --label stars
    spdtool compress --data my-folder        # train.jsonl and dev.jsonl; columns named sentence1, sentence2 and label

A file alone gives up `dev_share` of its rows as the dev set, drawn by the recipe's seed and the texts. Labels that are
text or whole numbers are classes, in sorted order; other numbers make it a regression (`regression` decides).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import Table, checked, read_text, read_tsv
from spdtool.data.labels import Labels, label_of, of_column
from spdtool.data.labels import number as number_of
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

DEV_LEAST = 0.07  # of the texts of each class
DEV_NAMES = ("dev", "validation", "valid", "val")
INSTEAD = ("eval",)  # of a dev set, where there is none; beside one it is somebody's test set
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


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold the one or two texts and the label."""

    text: tuple[str, ...]
    label: str


def local_dataset(recipe: Recipe) -> Dataset:
    """The task that `recipe.data`, `recipe.text` and `recipe.label` describe.

    Raises:
        DataError: no data was given; a file cannot be read, is ragged, or lacks values; the columns cannot be told.
    """
    if recipe.data is None:
        raise DataError("the task local needs rows", "give --data FILE or --data FOLDER")
    from spdtool.data import sharded as shards

    files = shards.found(Path(recipe.data))
    if files is not None:
        return shards.sharded_dataset(recipe, files)
    tables = read(Path(recipe.data))
    columns = choose_columns(tables["train"], recipe.text, recipe.label)
    seen = Labels()
    seen.add(tables["train"], of_column(tables["train"], columns.label))
    classes = seen.classes(str(tables["train"].path), recipe.regression)

    def load(data: str | None, seed: int) -> dict[str, Rows]:
        ours = tables if data in (None, recipe.data) else read(Path(data or ""))
        splits = {name: to_rows(table, columns, classes) for name, table in ours.items()}
        return splits if "dev" in splits else split(splits["train"], seed, recipe.dev_share)

    return Dataset(
        name="local",
        kind="classification" if classes else "regression",
        text=columns.text,
        labels=classes,
        metrics=metrics_for(classes),
        load=load,
        about=f"{' and '.join(columns.text)} of {recipe.data}, by {columns.label}{_left_alone(recipe, tables)}",
    )


def _left_alone(recipe: Recipe, tables: dict[str, Table]) -> str:
    """Where the dev set comes from, if the data bring none, and which files might have been meant for it."""
    if "dev" in tables:
        return ""
    others = [path.name for path in readable(Path(recipe.data or "")) if path != tables["train"].path]
    share = "a tenth" if recipe.dev_share == 0.1 else f"{recipe.dev_share:.0%}"
    return f"; {share} of its rows is the dev set" + (f" (left alone: {', '.join(others[:5])})" if others else "")


def metrics_for(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Accuracy and F1 for two classes (the second is the positive one), the macro F1 for more, else correlations."""
    if not classes:
        return ("pearson", "spearman")
    return ("accuracy", "f1" if len(classes) == 2 else "f1_macro")


def read(path: Path) -> dict[str, Table]:
    """The table `train` of a file; of a folder also `dev`, if it has one.

    Raises:
        DataError: there is no such file, none of the training rows, two places for a split, or it cannot be read.
    """
    if path.is_dir():
        files = splits_of(path)
        if not files["train"]:
            raise DataError(
                f"{path} has no training rows: looked for {_names(('train',))}; found {_listing(path)}",
                "name the file train, or give the file itself",
            )
        return {name: read_file(found[0]) for name, found in files.items() if found}
    if not path.exists():
        raise DataError(f"{path} does not exist", "--data takes a file or a folder")
    return {"train": read_file(path)}


def read_file(path: Path) -> Table:
    """The table of one file, read as its name ends.

    Raises:
        DataError: the ending is unknown, or the file is not what it says.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}", f"known endings: {', '.join(READERS)}")
    table = reader(path)
    twice = sorted({name for name in table.columns if name and table.columns.count(name) > 1})
    if twice:
        raise DataError(f"{path} has two columns called {', '.join(map(repr, twice))}", "rename one of them")
    return table


def read_csv(path: Path) -> Table:
    """A comma-separated file with standard quoting and a header; blank lines are passed over."""
    lines, rows = zip(*csv_rows(io.StringIO(read_text(path), newline=""), path), strict=True)
    return checked(Table(path, tuple(rows[0]), list(rows[1:]), list(lines[1:])))


def csv_rows(stream: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a comma-separated stream with standard quoting, each with the line in which it begins.

    Raises:
        DataError: the quoting is broken; names the line in which the row begins.
    """
    reader, start = csv.reader(stream, strict=True), 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that begins in line {start}: {error}",
            "is a quotation mark left open, or not doubled? for rows without quoting, name the file .tsv and use tabs",
        ) from None


def read_jsonl(path: Path) -> Table:
    """A file with one JSON object a line; a key that a line lacks is a missing value."""
    records, lines = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}", "one JSON object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a {type(record).__name__}, not an object", "one object a line")
        records.append(record)
        lines.append(number)
    columns = tuple(dict.fromkeys(key for record in records for key in record))
    return checked(Table(path, columns, [[record.get(key) for key in columns] for record in records], lines))


def read_parquet(path: Path) -> Table:
    """A parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, partitioning=None)  # a folder called key=value is no column
        columns = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None
    rows = [list(cells) for cells in zip(*columns, strict=True)]
    return checked(Table(path, tuple(table.column_names), rows, list(range(1, len(rows) + 1)), unit="row"))


def parquet_pieces(path: Path, size: int) -> Iterator[Table]:
    """A parquet file, `size` rows at a time; raises as `read_parquet` does."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            start = 1
            for piece in file.iter_batches(size):
                rows = [list(cells) for cells in zip(*(column.to_pylist() for column in piece.columns), strict=True)]
                lines = list(range(start, start + len(rows)))
                yield checked(Table(path, tuple(piece.schema.names), rows, lines, unit="row"))
                start += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""Ending of a file's name to the function that reads it."""


def choose_columns(table: Table, text: Sequence[str], label: str | None) -> Columns:
    """The columns asked for; those not asked for are guessed from their names where only one reading is possible.

    Raises:
        DataError: a column does not exist, is asked for twice, or cannot be guessed.
    """
    text = _with_comma(table, text) or text
    if len(text) > 2:
        raise DataError(f"--text names {len(text)} columns: {', '.join(text)}", "one sentence, or a pair of them")
    for name in (*text, *([label] if label is not None else [])):
        must_exist(table, name)
    if len(set(text)) < len(text):
        raise DataError(f"--text names the column {text[0]!r} twice", "a pair needs two columns")
    label = label if label is not None else _guess_label(table, text)
    if label in text:
        raise DataError(f"the column {label!r} is named as text and as label", "the model would read the answer")
    return Columns(tuple(text) or _guess_text(table, label), label)


def to_rows(table: Table, columns: Columns, classes: tuple[str, ...]) -> Rows:
    """The rows of a table, with labels as indices into `classes`, or as numbers if there are none.

    Raises:
        DataError: a column is missing, a text is missing or is no text, a label is none of the classes or no number.
    """
    for name in (*columns.text, columns.label):
        must_exist(table, name)
    text = [texts(table, name) for name in columns.text]
    index = {name: number for number, name in enumerate(classes)}
    labels: list[Any] = []
    for row, value in enumerate(table.column(columns.label)):
        label = label_of(table, row, value)
        known = index.get(label) if classes else number_of(label)
        if known is None and classes:
            table.refuse(row, f"the label {label!r} is in no training row", f"known: {', '.join(classes[:20])}")
        if known is None:
            table.refuse(row, f"the label {label!r} is not a number", "all others are; this is a regression")
        labels.append(known)
    return Rows(text[0], text[1] if len(text) == 2 else None, labels)


def split(rows: Rows, seed: int, dev_share: float) -> dict[str, Rows]:
    """`train` and `dev`: about `dev_share` of the rows for dev, drawn by `seed` and the text; rows keep their order.

    So a row that comes or goes moves no other one, and equal texts stay together. Only where chance leaves a class too
    few texts on a side (most likely a small class) some are added: one that has two texts is on both sides.

    Raises:
        DataError: too few rows to draw a dev set from.
    """
    places = _places(rows, seed)
    dev = {place for place in places if place < dev_share}
    classes: dict[Any, set[float]] = {}
    for place, label in zip(places, rows.labels, strict=True):
        classes.setdefault(label if isinstance(label, int) else None, set()).add(place)
    for own in classes.values():
        dev.update(sorted(own)[: max(1, round(DEV_LEAST * len(own)))])
    dev -= {max(own) for own in classes.values() if own <= dev}
    sides = {"train": [], "dev": []}  # type: dict[str, list[int]]
    for row, place in enumerate(places):
        sides["dev" if place in dev else "train"].append(row)
    if not sides["dev"]:
        raise DataError(f"{len(rows)} rows are too few to draw a dev set from", "give a folder with train and dev")
    return {name: rows.select(chosen) for name, chosen in sides.items()}


def _places(rows: Rows, seed: int) -> list[float]:
    """A number in [0, 1) for each row, drawn by the seed and its text."""
    salt = seed.to_bytes(8, "little")
    return [
        int.from_bytes(hashlib.blake2b("\0".join(text).encode(), digest_size=8, salt=salt).digest()) / 2**64
        for text in zip(*[column for column in (rows.first, rows.second) if column is not None], strict=True)
    ]


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """The files of `train` and `dev` in a folder; raises as `files_of` does."""
    return {
        "train": files_of(folder, ("train",)),
        "dev": files_of(folder, DEV_NAMES) or files_of(folder, INSTEAD),
    }


def files_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of a split, sorted: those in a folder of its name, or those that are called `name` or `name-...`.

    Args:
        names: that the split may have.

    Raises:
        DataError: there is more than one such place, or one file in two formats.
    """
    places = []
    for name in names:
        beside = [path for path in readable(folder) if path.stem == name or path.stem.startswith(f"{name}-")]
        places += [place for place in (readable(folder / name), beside) if place]
    count = Counter(path.stem for place in places for path in place)
    rivals = [path for place in places for path in place if count[path.stem] > 1]
    if len(places) > 1:
        rivals = [place[0] for place in places]
    if rivals:
        raise DataError(
            f"{folder} has {' and '.join(str(path.relative_to(folder)) for path in rivals[:4])}", "leave one of them"
        )
    return places[0] if places else []


def readable(folder: Path) -> list[Path]:
    """The files in `folder` that have a known ending, sorted; none where it is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in READERS and path.is_file())


def _names(stems: tuple[str, ...]) -> str:
    return ", ".join(stem + ending for stem in stems for ending in READERS)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (" and more" if len(names) > 10 else "") if names else "nothing"


def must_exist(table: Table, name: str) -> None:
    if name in table.columns:
        return
    near = difflib.get_close_matches(name, table.columns, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else None
    if len(table.columns) == 1:
        hint = "it has one column: are its fields separated as the file's ending says?"
    raise DataError(f"{table.path} has no column {name!r}; it has {_quoted(table.columns)}", hint)


def _with_comma(table: Table, text: Sequence[str]) -> tuple[str, ...] | None:
    """The column whose name holds a comma, where that is what `text` was before it was cut there."""
    if len(text) < 2 or set(text) <= set(table.columns):
        return None
    return next(((name,) for name in table.columns if [part.strip() for part in name.split(",")] == list(text)), None)


def _guess_label(table: Table, text: Sequence[str]) -> str:
    found = [name for name in LABEL_NAMES if name in table.columns and name not in text]
    if len(found) != 1:
        raise DataError(
            f"{table.path} has {'more than one' if found else 'no'} column that is clearly the label; "
            f"it has {_quoted(table.columns)}",
            "give --label COLUMN",
        )
    return found[0]


def _guess_text(table: Table, label: str) -> tuple[str, ...]:
    others = [name for name in table.columns if name != label]
    if len(others) == 1:
        return (others[0],)
    found = [names for names in TEXT_NAMES if set(names) <= set(others)]
    widest = [names for names in found if not any(set(names) < set(wider) for wider in found)]
    if len(widest) != 1:
        raise DataError(
            f"{table.path} leaves open which column is the text; it has {_quoted(table.columns)}",
            "give --text COLUMN, or --text FIRST,SECOND for pairs",
        )
    return widest[0]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def texts(table: Table, name: str) -> list[str]:
    cells = table.column(name)
    for row, cell in enumerate(cells):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            table.refuse(row, f"no text in the column {name!r}", "leave such rows out")
        if not isinstance(cell, str):
            table.refuse(row, f"the column {name!r} holds a {type(cell).__name__}, not text", "is it the text column?")
        if not cell.isascii() and re.search("[\ud800-\udfff]", cell):
            table.refuse(row, f"the column {name!r} holds half a surrogate pair, which is not text")
    return cells
