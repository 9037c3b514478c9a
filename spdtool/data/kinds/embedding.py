"""Texts without labels for a sentence encoder, and the rated pairs by which it is scored.

    texts.txt                      a text a line; or csv, tsv, jsonl, parquet with a column of texts (--text)
    folder/train.*  folder/dev.*   training texts, and rated pairs or texts that are not trained on
    pairs=STS                      rated pairs: a file, or a folder of files at any depth

A file of pairs has a rating and two texts. With a header they are called score, sentence1, sentence2; without one, as
SemEval has them, they stand in this order and are separated by tabs. Pairs without a rating are left out.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spdtool.data.columns import read_texts, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.files import LINES, READERS, read_file
from spdtool.data.formats.separated import read_tsv
from spdtool.data.formats.table import Table, is_encodable, read_text
from spdtool.data.kinds.passage_lists import (
    NUMBERED_OTHER,
    OTHER_NAMES,
    RELEVANT_NAMES,
    read_passages,
    read_triples,
)
from spdtool.data.labels import parse_number
from spdtool.data.splits import TEST_NAMES, describe_unused, find_split_files
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

MODULES = "modules.json"
TEXT_NAMES = ("text", "sentence", "sentence1", "sentence2", "anchor", "positive", "query", "passage", "premise",
              "hypothesis", "question", "question1", "question2")  # fmt: skip
RATING_NAMES = ("score", "similarity", "rating", "label")
PAIR_NAMES = ("sentence1", "sentence2")
NO_PAIR = -1
METRICS = ("spearman", "neighbours")


@dataclass
class RatedPairs:
    """Rated pairs, as columns of equal length; `unrated` counts those that were left out."""

    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    ratings: list[float] = field(default_factory=list)
    unrated: int = 0


def find_file(source: str | Path, name: str) -> Path | None:
    """Return a file of a folder, or of a repository of the hub; None where it has none."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    return None if Path(source).exists() else _download(str(source), name)


@functools.cache
def _download(source: str, name: str) -> Path | None:
    """Return a file of a repository of the hub; asked once in a process, because a silent hub answers slowly."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except Exception:  # absent, offline, no such name: whoever reads the model says which
        return None


def is_sentence_encoder(source: str | Path) -> bool:
    """Tell whether a folder or a name of the hub is a sentence encoder of sentence-transformers.

    Its cross-encoders have the same file, without a pooling.
    """
    file = find_file(source, MODULES)
    return file is not None and "Pooling" in file.read_text("utf-8", "replace")


def embedding_dataset(recipe: Recipe) -> Dataset:
    """Describe the texts in `recipe.data`, and the rated pairs in `recipe.pairs` or the file `dev`.

    Raises:
        DataError: a file cannot be read, or there are too few texts.
    """
    assert recipe.data is not None
    if recipe.unlabeled is not None:
        raise DataError(
            "--unlabeled adds texts to rows with labels, and no text of a sentence encoder has one",
            f"give them together: --data {recipe.unlabeled}",
        )
    if recipe.test_share:
        raise DataError(
            "--test-share draws rows with labels, and no text of a sentence encoder has one",
            "rated pairs are read from --set pairs=FILE",
        )
    for flag, value in (
        ("--label", recipe.label),
        ("regression", recipe.regression),
        ("multilabel", recipe.multilabel),
    ):
        if value is not None:
            raise DataError(f"{flag} is about labels, and no text of a sentence encoder has one", "leave it out")
    path = Path(recipe.data)
    files = find_text_files(path)
    texts = unique_texts(text for file in files["train"] for text in read_text_file(file, recipe.text))
    pairs = RatedPairs()
    dev_texts: list[str] = []
    if recipe.pairs is not None:
        read_pairs(Path(recipe.pairs), pairs)
    for file in files["dev"]:
        if is_pair_file(file):
            read_pair_file(file, pairs)
        else:
            dev_texts += read_text_file(file, recipe.text)
    about = f"{len(texts):,} texts of {recipe.data}, without labels"
    if pairs.ratings or pairs.unrated:
        _refuse_equal_ratings(pairs, recipe.pairs or str(path))
        lowest, highest = min(pairs.ratings), max(pairs.ratings)
        about += f"; scored on {len(pairs.ratings):,} pairs, rated {lowest:g} to {highest:g}"
    if pairs.unrated:
        about += f" ({pairs.unrated:,} pairs without a rating are left out)"
    about += describe_unused(path, [*files["train"], *files["dev"]])

    def load(_data: str | None, seed: int) -> dict[str, Rows]:
        if files["dev"] and dev_texts:
            train, neighbours = texts, unique_texts(dev_texts)[: recipe.neighbour_texts]
        else:
            train, neighbours = draw_texts(texts, recipe.neighbour_texts, recipe.dev_share, seed)
        return {"train": make_rows(train), "dev": make_rows(neighbours, pairs)}

    return Dataset(
        name="local",
        kind="embedding",
        text=("text",),
        labels=(),
        metrics=METRICS if pairs.ratings else METRICS[1:],
        load=load,
        about=about,
    )


def make_rows(texts: Sequence[str], pairs: RatedPairs | None = None) -> Rows:
    """Return rows of one text each: those of the pairs first, two for each. Labels are [pair number, rating]."""
    first, labels = list[str](), list[tuple[float, float]]()
    if pairs is not None:
        for number, (one, other, rating) in enumerate(zip(pairs.first, pairs.second, pairs.ratings, strict=True)):
            first += [one, other]
            labels += [(number, rating)] * 2
    labels += [(NO_PAIR, 0.0)] * len(texts)
    return Rows([*first, *texts], None, np.array(labels, np.float32).reshape(-1, 2))


def draw_texts(texts: Sequence[str], most: int, share: float, seed: int) -> tuple[list[str], list[str]]:
    """Draw at most `most` texts, and at most `share` of all, by `seed` and the text alone; return the others first.

    Raises:
        DataError: fewer than two texts.
    """
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts are too few", "thousands of texts teach a sentence encoder")
    salt = seed.to_bytes(8, "little")
    draws = [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, salt=salt).digest() for text in texts]
    count = max(1, min(most, round(share * len(texts))))
    limit = sorted(draws)[count - 1]
    train = [text for text, draw in zip(texts, draws, strict=True) if draw > limit]
    drawn = [text for text, draw in zip(texts, draws, strict=True) if draw <= limit]
    return train, drawn


def unique_texts(texts: Iterator[str] | Sequence[str]) -> list[str]:
    """Return the texts that are not empty, each once, in their order."""
    return list(dict.fromkeys(text for text in texts if text.strip()))


def find_text_files(path: Path) -> dict[str, list[Path]]:
    """Return the files of training texts and of the dev set; a folder without names for them is all training texts.

    Raises:
        DataError: there is no such file, or none that can be read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist", "--data takes a file or a folder")
    if path.is_file():
        return {"train": [path], "dev": []}
    readable = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (LINES, *READERS)]
    train = [file for file in readable if file.stem == "train"] or find_split_files(path)["train"]
    dev = [file for file in readable if file.stem in ("dev", "validation")]
    if not train:
        train = [file for file in readable if file not in dev and file.stem not in TEST_NAMES]
    if not train:
        raise DataError(f"{path} has no texts", f"known endings: {', '.join((LINES, *READERS))}")
    return {"train": train, "dev": dev}


def read_text_file(path: Path, columns: Sequence[str]) -> list[str]:
    """Return the texts of a file: its lines, or the cells of the named columns.

    Args:
        columns: names of columns; empty: every column whose name says that it holds texts.

    Raises:
        DataError: the columns do not exist, or hold no texts.
    """
    if path.suffix.lower() == LINES:
        return [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
    table = read_triples(read_file(path))
    for name in columns:
        require_column(table, name)
    chosen = list(columns) or [name for name in table.columns if is_text_name(name.lower())]
    if not chosen and len(table.columns) == 1:
        chosen = [table.columns[0]]
    if not chosen:
        raise DataError(
            f"{path} leaves open which columns are texts; it has {', '.join(map(repr, table.columns))}",
            "give --text COLUMN, or --text FIRST,SECOND",
        )
    texts = []
    for name in chosen:
        if any(isinstance(cell, list) for cell in table.column(name)):
            texts += [text for row in range(len(table.rows)) for text in read_passages(table, row, name)]
        else:
            texts += read_texts(table, name)
    return texts


def is_text_name(name: str) -> bool:
    """Tell whether a column of this name holds texts, or lists of passages as retrievers are trained on."""
    return name in (*TEXT_NAMES, *RELEVANT_NAMES, *OTHER_NAMES) or NUMBERED_OTHER.fullmatch(name) is not None


def is_pair_file(path: Path) -> bool:
    """Tell whether a file holds a rating and two texts a row, by its first line."""
    if path.suffix.lower() not in READERS:
        return False
    if path.suffix.lower() == ".tsv" and _has_no_header(path):
        return True
    return _rating_column(read_file(path)) is not None


def read_pairs(path: Path, pairs: RatedPairs) -> None:
    """Add the rated pairs of a file, or of every file in a folder, at any depth.

    Raises:
        DataError: there is none, or one is not what it says.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in READERS and file.is_file()]
    if not files or not path.exists():
        raise DataError(f"{path} has no file of rated pairs", "a rating and two texts a line, separated by tabs")
    for file in files:
        read_pair_file(file, pairs)


def read_pair_file(path: Path, pairs: RatedPairs) -> None:
    """Add the rated pairs of one file; raises as `read_pairs`."""
    if path.suffix.lower() == ".tsv" and _has_no_header(path):
        table = read_tsv(path, ("score", *PAIR_NAMES))
    else:
        table = read_file(path)
    rating = _rating_column(table)
    if rating is None:
        raise DataError(
            f"{path} has no rated pairs: it has the columns {', '.join(map(repr, table.columns))}",
            f"{RATING_NAMES[0]}, {' and '.join(PAIR_NAMES)} were expected",
        )
    first, second = (_read_pair_texts(table, name) for name in PAIR_NAMES)
    for row, cell in enumerate(table.column(rating)):
        text = "" if cell is None else str(cell).strip()
        number = parse_number(text)
        if not text:
            pairs.unrated += 1
            continue
        if number is None:
            table.refuse(row, f"the rating {text!r} is no number", "leave it empty where there is none")
        if not first[row].strip() or not second[row].strip():
            table.refuse(row, "a text of the pair is empty", "leave such rows out")
        pairs.first.append(first[row])
        pairs.second.append(second[row])
        pairs.ratings.append(number)


def _read_pair_texts(table: Table, name: str) -> list[str]:
    """Return the texts of a column, empty where a cell is."""
    texts = []
    for row, cell in enumerate(table.column(name)):
        text = "" if cell is None else cell
        if not isinstance(text, str):
            table.refuse(row, f"the column {name!r} holds a {type(cell).__name__}, not text")
        if not is_encodable(text):
            table.refuse(row, f"the column {name!r} holds half a surrogate pair, which is not text")
        texts.append(text)
    return texts


def _refuse_equal_ratings(pairs: RatedPairs, source: str) -> None:
    """Raise DataError where no rank correlation is defined: no rating, or one for all pairs."""
    ratings = sorted(set(pairs.ratings))
    if len(ratings) < 2:
        listed = f"all rated {ratings[0]:g}" if ratings else "none of them rated"
        raise DataError(
            f"{source} has {len(pairs.ratings) + pairs.unrated:,} pairs, {listed}: there is no order to score by",
            "give pairs with different ratings, or leave them out: neighbours are scored without any",
        )


def _rating_column(table: Table) -> str | None:
    if not set(PAIR_NAMES) <= set(table.columns):
        return None
    return next((name for name in RATING_NAMES if name in table.columns), None)


def _has_no_header(path: Path) -> bool:
    """Tell whether the first line of a tsv file is a row already: a number, or nothing, and two texts."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        cells = stream.readline().rstrip("\r\n").split("\t")
    return len(cells) == 3 and (not cells[0].strip() or parse_number(cells[0]) is not None)
