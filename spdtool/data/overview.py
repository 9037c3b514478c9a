"""Short sentences about rows, for the plan: what about them deserves attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from spdtool.data.dataset import UNLABELED, Rows, Splits

LISTED_NAMES = 8  # names that fit into a line of the plan


def leaked_rows(train: Rows, rows: Rows, split: str, source: str = "train") -> list[str]:
    """Say how many rows of a dev or test set have a text that is in train too; nothing where none has.

    Texts in shards are passed over: all of them would have to be read.
    """
    if not isinstance(train.first, list):
        return []
    texts = Counter(_texts_of(rows))
    shared = set()
    for text in _texts_of(train):
        if text in texts:  # so the set stays small, however many training texts there are
            shared.add(text)
    count = sum(texts[text] for text in shared)
    if not count:
        return []
    return [f"{count:,} of {len(rows):,} {split} rows have a text that is in {source} too: their score is flattered"]


def leaked_unlabeled_rows(splits: Splits) -> list[str]:
    """Say how many dev and test rows have a text that is among those without labels; nothing where none has."""
    lines = []
    for split in ("dev", "test"):
        if split in splits and UNLABELED in splits:
            lines += leaked_rows(splits[UNLABELED], splits[split], split, "the unlabelled texts")
    return lines


def contradicting_rows(train: Rows) -> list[str]:
    """Say how many training rows have a text that stands there with another label too; nothing where none has.

    Texts in shards are passed over, as by `leaked_rows`.
    """
    if not isinstance(train.first, list):
        return []
    labels: dict[str | tuple[str, str], object] = {}
    counts: Counter[str | tuple[str, str]] = Counter()
    contradictory = set()
    for text, row_label in zip(_texts_of(train), train.labels, strict=True):
        counts[text] += 1
        label = row_label.tobytes() if isinstance(row_label, np.ndarray) else row_label  # several labels: an array
        if labels.setdefault(text, label) != label:
            contradictory.add(text)
    count = sum(counts[text] for text in contradictory)
    if not count:
        return []
    return [f"{count:,} of {len(train):,} training rows have a text that stands there with another label too"]


def list_names(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    further = f" and {len(names) - LISTED_NAMES:,} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + further


def _texts_of(rows: Rows) -> Iterable[str | tuple[str, str]]:
    return rows.first if rows.second is None else zip(rows.first, rows.second, strict=True)
