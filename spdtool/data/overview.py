"""How the rows were read, in a few lines for the plan: their labels, and what about them deserves attention."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from spdtool.tasks import Rows, Task

SHOWN = 8  # classes in a line
MISSING = {"", "?", "na", "n/a", "nan", "none", "null", "nil", "-"}  # what tables have for want of a value

Splits = Mapping[str, Rows]


def label_line(task: Task, splits: Splits) -> str:
    """How many rows of which class train and dev have, or the range of the numbers."""
    if task.regression:
        values = np.asarray(splits["train"].labels)
        return f"regression, {values.min():g} to {values.max():g}"
    counts = class_counts(task, splits)
    parts = [_shown(f"{name} {count:,}" for name, count in counts[split].items()) for split in ("train", "dev")]
    return f"{len(task.labels)} classes: {parts[0]}; dev: {parts[1]}"


def class_counts(task: Task, splits: Splits) -> dict[str, dict[str, int]]:
    """Rows of each class in each split; nothing for a regression."""
    counted = {
        name: np.bincount(np.asarray(rows.labels, np.int64), minlength=len(task.labels)).tolist()
        for name, rows in splits.items()
        if not task.regression
    }
    return {name: dict(zip(task.labels, counts, strict=True)) for name, counts in counted.items()}


def notes(task: Task, splits: Splits) -> Iterator[str]:
    """What may be a mistake in the data, a line each."""
    both = _in_both(splits["train"], splits["dev"])
    if both:
        yield f"{both:,} of {len(splits['dev']):,} dev rows have a text that is in train too: their score is flattered"
    for split, counts in class_counts(task, splits).items():
        absent = [name for name, count in counts.items() if not count]
        if absent and split in ("train", "dev"):
            yield f"no row of {split} has the label {_shown(map(repr, absent))}"
    alike = defaultdict(list)
    for name in task.labels:
        alike[name.strip().casefold()].append(name)
    for group in alike.values():
        if len(group) > 1:
            yield f"the labels {_shown(map(repr, group))} differ by case or surrounding spaces only, and are kept apart"
    missing = [name for name in task.labels if name.strip().casefold() in MISSING]
    if missing:
        yield f"the label {_shown(map(repr, missing))} is taken for a class: does it stand for a missing value?"


def _in_both(train: Rows, dev: Rows) -> int:
    """Rows of dev whose text is in train; 0 where the texts of train are in shards, all of which would be read."""
    if not isinstance(train.first, list):
        return 0
    wanted = Counter(_texts(dev))
    return sum(wanted[text] for text in {text for text in _texts(train) if text in wanted})


def _texts(rows: Rows) -> Iterable[Any]:
    return rows.first if rows.second is None else zip(rows.first, rows.second, strict=True)


def _shown(words: Iterable[str]) -> str:
    every = list(words)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else "")
