"""The splits of a user's data: files of a folder, or dev and test sets drawn from the training rows."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spdtool.data.dataset import Rows
from spdtool.data.files import READERS
from spdtool.errors import DataError

TRAIN_NAMES = ("train",)
DEV_NAMES = ("dev", "validation", "valid", "val")
FALLBACK_DEV_NAMES = ("eval",)  # a dev set where there is no other; beside one it is somebody's test set
TEST_NAMES = ("test",)
# What follows a split's name in the name of a shard: a number, that of all shards, and perhaps a hash.
SHARD_SUFFIX = re.compile(r"[-_.](\d+)(?:-of-(\d+))?(?:-[0-9a-f]{8,})?", re.ASCII)
CLONE_FOLDER = "data"  # of a data set's repository on the hub
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json")  # of the rows beside
SAVED_STATE = "state.json"  # in a folder of `datasets.save_to_disk`
LEAST_DEV_SHARE = 0.07  # of the texts of each class: chance gives a small class nothing else


def find_split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of `train`, `dev` and `test` in a folder, sorted by name; empty where there are none.

    A folder of `datasets.save_to_disk` and a clone of a repository of the hub are such folders too.

    Raises:
        DataError: as `find_files` raises; or the training rows lie deeper, in one of several folders.
    """
    if (folder / SAVED_STATE).is_file() and any(folder.glob("data-*.arrow")):  # one split, saved alone
        return {"train": readable_files(folder), "dev": [], "test": []}
    train = find_files(folder, TRAIN_NAMES)
    clone = folder / CLONE_FOLDER
    if not train and clone.is_dir():
        return find_split_files(clone)
    if not train and folder.is_dir():
        configurations = [path for path in sorted(folder.iterdir()) if path.is_dir() and find_files(path, TRAIN_NAMES)]
        if configurations:
            listed = ", ".join(path.name for path in configurations[:4])
            problem = f"{folder} has no training rows of its own; its folders {listed} have"
            raise DataError(problem, f"give one of them: --data {configurations[0]}")
    dev = find_files(folder, DEV_NAMES) or find_files(folder, FALLBACK_DEV_NAMES)
    return {"train": train, "dev": dev, "test": find_files(folder, TEST_NAMES)}


def find_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of a split, sorted: those in a folder of its name, or its file or shards, such as `name-0`.

    Args:
        folder: the user's folder.
        names: that the split may have.

    Raises:
        DataError: there are two such groups of files, one file in two formats, or not all of its shards.
    """
    groups = []
    for name in names:
        inside, beside = readable_files(folder / name), []
        for path in readable_files(folder):
            # `train-00000-of-00002.parquet` is what the hub's data sets are called; `train-old.csv` is another file.
            suffix = path.stem.removeprefix(name)
            if path.stem.startswith(name) and (not suffix or SHARD_SUFFIX.fullmatch(suffix)):
                beside.append(path)
        for group in (inside, beside):
            if group:
                groups.append(group)
    if not groups:
        return []
    ambiguous = [group[0] for group in groups]
    if len(groups) == 1:
        stems = Counter(path.stem for path in groups[0])
        ambiguous = [path for path in groups[0] if stems[path.stem] > 1]
    if ambiguous:
        listed = " and ".join(str(path.relative_to(folder)) for path in ambiguous[:4])
        raise DataError(f"{folder} has {listed}", "leave one of them")
    _refuse_missing_shards(groups[0])
    return groups[0]


def _refuse_missing_shards(files: list[Path]) -> None:
    """Raise DataError where the names of files say that there are more of them."""
    for path in files:
        match = re.search(r"-(\d+)-of-(\d+)", path.stem, re.ASCII)
        if match is not None and int(match[2]) != len(files):
            raise DataError(
                f"{path.name} is one of {int(match[2])} files by its name, and {path.parent} has {len(files)} of them",
                "fetch all of them, or rename these",
            )


def readable_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that have a known ending, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    files = []
    for path in sorted(folder.iterdir()):
        is_cache = path.suffix == ".arrow" and path.stem.startswith("cache-")  # of `datasets`, beside its rows
        is_description = path.name in DESCRIPTIONS or is_cache
        if path.suffix.lower() in READERS and path.is_file() and not is_description:
            files.append(path)
    return files


def describe_unused(folder: Path, used: Sequence[Path]) -> str:
    """List the files of a folder that are not read, in parentheses; nothing where there are none."""
    # test.csv, or a set under a name that is not recognised
    unused = [path.name for path in readable_files(folder) if path not in used]
    return f" (left alone: {', '.join(unused[:5])})" if unused else ""


def draw_dev_rows(rows: Rows, seed: int, dev_share: float) -> dict[str, Rows]:
    """Draw about `dev_share` of the rows as `dev` by `seed` and the text alone; `train` gets the others.

    Rows keep their order. A row that is added or removed moves no other one, and equal texts stay together. Only where
    chance leaves a class too few texts on a side (most likely a small class) some are added: a class of two texts is
    on both sides.

    Raises:
        DataError: too few rows to draw a dev set from.
    """
    draws = _draw_by_text(rows, seed)
    dev_draws = {draw for draw in draws if draw < dev_share}
    draws_by_class: dict[int | None, set[float]] = {}
    for draw, class_index in zip(draws, _classes_of(rows), strict=True):
        draws_by_class.setdefault(class_index, set()).add(draw)
    for class_draws in draws_by_class.values():
        dev_draws.update(sorted(class_draws)[: max(1, round(LEAST_DEV_SHARE * len(class_draws)))])
    # All maxima first: two classes may share a text, and taking it for one must not save the other.
    maxima = [max(class_draws) for class_draws in draws_by_class.values() if class_draws <= dev_draws]
    dev_draws.difference_update(maxima)
    train_rows, dev_rows = [], []
    for row, draw in enumerate(draws):
        if draw in dev_draws:
            dev_rows.append(row)
        else:
            train_rows.append(row)
    if not dev_rows:
        count = len(set(draws))
        texts = f" ({'all have the same text' if count == 1 else f'with {count} different texts'})"
        raise DataError(
            f"{len(rows)} rows{texts if count < len(rows) else ''} are too few to draw a dev set from",
            "give a folder with train and dev",
        )
    return {"train": rows.select(train_rows), "dev": rows.select(dev_rows)}


def draw_test_rows(rows: Rows, seed: int, test_share: float) -> dict[str, Rows]:
    """Take `test_share` of the texts of each class as `test`, by `seed` and the text alone; `train` gets the others.

    Rows keep their order, and equal texts stay together. Numbers to predict are one class. A row of several labels
    counts for the rarest of them.

    Raises:
        DataError: too few rows to take a test set from.
    """
    draws = _draw_by_text(rows, seed, purpose=b"test")
    draws_by_class: dict[int | None, set[float]] = {}
    for draw, class_index in zip(draws, _classes_of(rows), strict=True):
        draws_by_class.setdefault(class_index, set()).add(draw)
    test_draws: set[float] = set()
    for class_draws in draws_by_class.values():
        test_draws.update(sorted(class_draws)[: round(test_share * len(class_draws))])
    test_rows = [row for row, draw in enumerate(draws) if draw in test_draws]
    train_rows = [row for row, draw in enumerate(draws) if draw not in test_draws]
    if not test_rows or not train_rows:
        raise DataError(
            f"{len(rows)} rows are too few to take {test_share:.0%} of them as a test set",
            "give more rows, or another --test-share",
        )
    return {"train": rows.select(train_rows), "test": rows.select(test_rows)}


def _classes_of(rows: Rows) -> list[int | None]:
    """Return the class of each row; None for numbers to predict, and of several labels the rarest."""
    if len(rows) and isinstance(rows.labels[0], list | tuple):  # words or spans: a row has no class
        return [None] * len(rows)
    labels = np.asarray(rows.labels)
    if labels.ndim == 1:
        return [int(label) if np.issubdtype(labels.dtype, np.integer) else None for label in labels]
    rarest_first = np.argsort(labels.sum(axis=0), kind="stable")
    classes: list[int | None] = []
    for row in labels[:, rarest_first]:
        classes.append(int(rarest_first[row.argmax()]) if row.any() else None)
    return classes


def _draw_by_text(rows: Rows, seed: int, purpose: bytes = b"") -> list[float]:
    """Draw a number in [0, 1) for each row by a hash of its text: equal texts draw equal numbers.

    Args:
        purpose: of the draw, at most 16 bytes; draws for two purposes have nothing to do with each other.
    """
    salt = seed.to_bytes(8, "little")
    columns = [rows.first]
    if rows.second is not None:
        columns.append(rows.second)
    draws = []
    for texts in zip(*columns, strict=True):
        digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8, salt=salt, person=purpose).digest()
        draws.append(int.from_bytes(digest) / 2**64)
    return draws
