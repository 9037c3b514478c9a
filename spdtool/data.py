"""From rows to batches: tokenise once, then batches of like length, padded to their own longest.

Everything is a pure function of (rows, seed, epoch), so that the position in the data is a pair of numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spdtool import tasks
from spdtool.errors import DataError, ModelError
from spdtool.recipe import Recipe
from spdtool.tasks import Rows, Task

Batch = dict[str, np.ndarray]

POOL_BATCHES = 50  # rows are sorted by length inside pools of this many batches: near-equal lengths, still shuffled
TOKENISE_ROWS = 10_000


@dataclass(frozen=True)
class Encoded:
    """The tokenised rows of a split, end to end in flat arrays.

    Attributes:
        columns: `input_ids`, and `token_type_ids` where the tokenizer has them; each of `offsets[-1]` integers.
        offsets: row i is `columns[...][offsets[i]:offsets[i + 1]]`.
        labels: int64 class indices, or float32 for regression; one per row.
        pad: value that pads each column.
        left: whether padding goes on the left.
    """

    columns: dict[str, np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray
    pad: dict[str, int]
    left: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """Hash of the tokens and labels: other data, other digest."""
        hashed = hashlib.blake2b(digest_size=16)
        for array in (*self.columns.values(), self.offsets, self.labels):
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()

    def take(self, rows: np.ndarray) -> Encoded:
        """These rows alone, in this order."""
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        places = np.concatenate(spans) if spans else np.empty(0, np.int64)
        return replace(
            self,
            columns={name: flat[places] for name, flat in self.columns.items()},
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            labels=self.labels[rows],
        )

    def sample(self, size: int, seed: int) -> Encoded:
        """`size` rows drawn by `seed`, in their own order; all of them where there are no more."""
        if size >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), size, replace=False)))

    def collate(self, rows: Sequence[int] | np.ndarray, length: int | None = None) -> Batch:
        """Rows as padded int64 arrays [rows, tokens], with `attention_mask` and `labels`.

        Args:
            length: pad to this many tokens; None: to the longest of these rows.
        """
        rows = np.asarray(rows)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        width = int(length or lengths.max())
        place = np.arange(width)[None, :] - ((width - lengths)[:, None] if self.left else 0)
        real = (place >= 0) & (place < lengths[:, None])
        source = (self.offsets[rows][:, None] + place)[real]
        batch: Batch = {}
        for name, flat in self.columns.items():
            batch[name] = np.full(real.shape, self.pad[name], dtype=np.int64)
            batch[name][real] = flat[source]
        batch["attention_mask"] = real.astype(np.int64)
        batch["labels"] = self.labels[rows]
        return batch


def prepare(recipe: Recipe, tokenizer: Any, names: Sequence[str]) -> tuple[Task, dict[str, Encoded]]:
    """The recipe's task and its tokenised splits, for a model whose labels are called `names`.

    Raises:
        DataError: the data cannot be used.
        ModelError: model and task do not fit together.
    """
    task = tasks.resolve(recipe)
    splits = align_labels(tasks.rows(task, recipe), task, names)
    return task, encode(tokenizer, splits, recipe.max_length)


def tokenise(tokenizer: Any, rows: Rows, max_length: int) -> Encoded:
    """Tokenise a split; pairs longer than `max_length` lose tokens from their longer half."""
    limit = min(max_length, tokenizer.model_max_length)
    columns: dict[str, list[np.ndarray]] = {}
    lengths = []
    for start in range(0, len(rows), TOKENISE_ROWS):
        stop = start + TOKENISE_ROWS
        second = rows.second[start:stop] if rows.second is not None else None
        encoded = tokenizer(
            rows.first[start:stop], second, truncation=True, max_length=limit, return_attention_mask=False
        )
        lengths.append(np.array([len(ids) for ids in encoded["input_ids"]]))
        for name in ("input_ids", "token_type_ids"):
            if name in encoded:
                columns.setdefault(name, []).append(np.concatenate([np.asarray(r, np.int32) for r in encoded[name]]))
    labels = np.asarray(rows.labels)
    return Encoded(
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        labels=labels.astype(np.int64 if np.issubdtype(labels.dtype, np.integer) else np.float32),
        pad={"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id},
        left=tokenizer.padding_side == "left",
    )


def no_rows(tokenizer: Any) -> Encoded:
    """An empty split, which still tells a tokenizer's inputs and padding.

    Raises:
        ModelError: the tokenizer cannot pad.
    """
    _refuse_without_padding(tokenizer)
    names = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    return Encoded(
        columns={name: np.empty(0, np.int32) for name in names},
        offsets=np.zeros(1, np.int64),
        labels=np.empty(0, np.int64),
        pad={"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id},
        left=tokenizer.padding_side == "left",
    )


def encode(tokenizer: Any, splits: dict[str, Rows], max_length: int) -> dict[str, Encoded]:
    """Tokenise every split.

    Raises:
        ModelError: the tokenizer cannot pad.
    """
    _refuse_without_padding(tokenizer)
    return {name: tokenise(tokenizer, rows, max_length) for name, rows in splits.items()}


def align_labels(splits: dict[str, Rows], task: Task, names: Sequence[str]) -> dict[str, Rows]:
    """The rows with class indices in the order of a model's own label names.

    A model that names its labels otherwise (`LABEL_0`) is taken to follow the task's order.

    Raises:
        ModelError: the model has another number of labels than the task.
    """
    if task.regression:
        if len(names) != 1:
            raise ModelError(f"the model has {len(names)} labels; {task.name!r} is a regression task, which needs one")
        return splits
    if len(names) != len(task.labels):
        raise ModelError(
            f"the model has {len(names)} labels ({', '.join(names)}); "
            f"task {task.name!r} has {len(task.labels)} ({', '.join(task.labels)})",
            "give a teacher that was fine-tuned on this task",
        )
    order = label_order(names, task)
    return {name: replace(rows, labels=[order[int(label)] for label in rows.labels]) for name, rows in splits.items()}


def label_order(names: Sequence[str], task: Task) -> list[int]:
    """For each label of the task, its index among a model's `names`; the task's order where these say nothing."""
    own = {_plain(name): index for index, name in enumerate(names)}
    if own.keys() != {_plain(name) for name in task.labels}:
        return list(range(len(names)))
    return [own[_plain(name)] for name in task.labels]


def training_batches(
    rows: Encoded, batch_size: int, seed: int, epoch: int, *, bucketing: bool = True
) -> list[np.ndarray]:
    """The row numbers of every batch of one epoch: each row once, batches of like length, in random order.

    The number of batches is always `ceil(rows / batch_size)`.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(rows))
    if not bucketing:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches, lengths = [], rows.lengths
    for start in range(0, len(order), POOL_BATCHES * batch_size):
        pool = order[start : start + POOL_BATCHES * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def evaluation_batches(rows: Encoded, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers, longest rows first: the memory that is needed shows at once, and little is padded."""
    order = np.argsort(-rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def check_lengths(splits: dict[str, Encoded], positions: int | None) -> None:
    """Raise DataError if a row is longer than the model has positions for."""
    longest = max(int(split.lengths.max()) for split in splits.values())
    if positions is not None and longest > positions:
        raise DataError(
            f"the longest row has {longest} tokens; the model has {positions} positions", "lower max_length"
        )


def check_vocabulary(splits: dict[str, Encoded], size: int) -> None:
    """Raise ModelError if a token has no row among the model's `size` word embeddings."""
    largest = max(int(split.columns["input_ids"].max()) for split in splits.values())
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}; the model has {size} word embeddings",
            "tokenizer and model must come from the same place",
        )


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")


def _refuse_without_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in its tokenizer_config.json")
