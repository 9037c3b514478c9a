"""From rows to batches: tokenise once, then batches of like length, padded to their own longest.

Everything is a pure function of (rows, seed, epoch), so that the position in the data is a pair of numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tokenizers
import transformers

from spdtool import tasks
from spdtool.data import cache
from spdtool.errors import LISTED, DataError, ModelError
from spdtool.recipe.fields import Recipe
from spdtool.tasks import Rows, Task

Batch = dict[str, np.ndarray]
Note = Callable[[dict[str, Any]], None]

SHUFFLED_ROWS = 1_000_000  # from here on, not all rows are put into one random order
BLOCK_BATCHES, GROUP_BLOCKS = 128, 64  # batches of a block of neighbouring rows, and blocks that are mixed
TOKENISE_ROWS = 10_000
FORMAT = 1  # of the tokens in the cache: another layout, another number
CACHED_ROWS = 1_000  # fewer are tokenised faster than they are looked up


@dataclass(frozen=True)
class Encoded:
    """The tokenised rows of a split, end to end in flat arrays.

    Attributes:
        columns: `input_ids`, and `token_type_ids` where the tokenizer has them; each of `offsets[-1]` integers.
        offsets: row i is `columns[...][offsets[i]:offsets[i + 1]]`.
        labels: int64 class indices, or float32 for regression; one per row.
        pad: value that pads each column.
        left: whether padding goes on the left.
        beside: further arrays with one entry per row, which every batch gets its part of.
        per_token: the same with one entry per token, [tokens, ...], which a batch pads with zeros.
        known_lengths: tokens of each row, where they are stored; None: the offsets tell.
        hashes: of the columns and offsets, where they are known (`cache.hash_of`).
    """

    columns: dict[str, np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray
    pad: dict[str, int]
    left: bool
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    per_token: dict[str, np.ndarray] = field(default_factory=dict)
    known_lengths: np.ndarray | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets) if self.known_lengths is None else self.known_lengths

    @property
    def digest(self) -> str:
        """Hash of the tokens and labels: other data, other digest."""
        arrays = self.columns | {"offsets": self.offsets, "labels": self.labels}
        return cache.key({name: self.hashes.get(name) or cache.hash_of(array) for name, array in arrays.items()})

    def take(self, rows: np.ndarray) -> Encoded:
        """These rows alone, in this order."""
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        places = np.concatenate(spans) if spans else np.empty(0, np.int64)
        return replace(
            self,
            columns={name: flat[places] for name, flat in self.columns.items()},
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            labels=self.labels[rows],
            beside={name: values[rows] for name, values in self.beside.items()},
            per_token={name: values[places] for name, values in self.per_token.items()},
            known_lengths=None if self.known_lengths is None else self.known_lengths[rows],
            hashes={},
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
        place = np.arange(width)[None, :] - (self.left * (width - lengths))[:, None]
        real = (place >= 0) & (place < lengths[:, None])
        source = (self.offsets[rows][:, None] + place)[real]
        batch: Batch = {}
        for name, flat in self.columns.items():
            batch[name] = np.full(real.shape, self.pad[name], dtype=np.int64)
            batch[name][real] = flat[source]
        batch["attention_mask"] = real.astype(np.int64)
        batch["labels"] = self.labels[rows]
        batch |= {name: self._padded(flat, rows, place) for name, flat in self.per_token.items()}
        return batch | {name: values[rows] for name, values in self.beside.items()}

    def _padded(self, flat: np.ndarray, rows: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[rows, tokens, ...] of an array [tokens, ...], row by row: these entries are large.

        Args:
            place: which token of its row stands at each position; what is out of reach is padding.
        """
        padded = np.zeros((*place.shape, *flat.shape[1:]), flat.dtype)
        for target, row, first in zip(padded, rows, -place[:, 0], strict=True):
            part = flat[self.offsets[row] : self.offsets[row + 1]]
            target[first : first + len(part)] = part
        return padded


def prepare(
    recipe: Recipe, tokenizer: Any, names: Sequence[str], note: Note | None = None
) -> tuple[Task, dict[str, Encoded]]:
    """The recipe's task and its tokenised splits, for a model whose labels are called `names`.

    Args:
        note: is told which rows they are (`tasks.facts`), and may refuse them.

    Raises:
        DataError: the data cannot be used.
        ModelError: model and task do not fit together.
    """
    task = tasks.resolve(recipe)
    splits = tasks.rows(task, recipe)
    if note is not None:
        note(tasks.facts(task, splits))
    return task, encode(tokenizer, align_labels(splits, task, names), recipe.max_length)


def tokenise(tokenizer: Any, rows: Rows, max_length: int) -> Encoded:
    """Tokenise a split, or take its tokens from the cache; pairs longer than `max_length` lose from their longer half.

    The tokens are kept under a hash of the tokenizer, the texts and the length (`cache.py`), unless the rows are few or
    the tokenizer is none of the fast ones, whose files say all about them.
    """
    limit = min(max_length, tokenizer.model_max_length)

    def fill(append: cache.Append) -> None:
        append("offsets", np.zeros(1, np.int64))
        end = 0
        for start in range(0, len(rows), TOKENISE_ROWS):
            encoded = _tokens(tokenizer, rows, start, limit)
            lengths = np.array([len(ids) for ids in encoded["input_ids"]])
            append("offsets", end + np.cumsum(lengths))
            append("lengths", lengths.astype(np.int32))
            end += int(lengths.sum())
            for name in ("input_ids", "token_type_ids"):
                if name in encoded:
                    append(name, np.concatenate([np.asarray(ids, np.int32) for ids in encoded[name]]))

    if len(rows) >= CACHED_ROWS and tokenizer.is_fast:
        found = cache.arrays("tokens", cache.key(FORMAT, _spelt(tokenizer), tasks.texts_hash(rows), limit), fill)
    else:
        found = cache.in_memory(fill)
    labels = np.asarray(rows.labels)
    return Encoded(
        columns={name: flat for name, flat in found.items() if name not in ("offsets", "lengths")},
        offsets=found["offsets"],
        labels=labels.astype(np.int64 if np.issubdtype(labels.dtype, np.integer) else np.float32, copy=False),
        pad={"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id},
        left=tokenizer.padding_side == "left",
        known_lengths=found["lengths"],
        hashes=found.hashes,
    )


def _tokens(tokenizer: Any, rows: Rows, start: int, limit: int) -> Any:
    stop = start + TOKENISE_ROWS
    second = rows.second[start:stop] if rows.second is not None else None
    return tokenizer(rows.first[start:stop], second, truncation=True, max_length=limit, return_attention_mask=False)


def _spelt(tokenizer: Any) -> list[Any]:
    """All that decides what a fast tokenizer makes of a text; how it was last called does not."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core.pop("truncation", None)
    core.pop("padding", None)
    versions = [tokenizers.__version__, transformers.__version__]
    return [type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names, versions, core]


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
    """The rows with class indices in the order of a model's own label names; raises as `label_order` does."""
    order = label_order(names, task)
    if order == list(range(len(order))):
        return splits
    places: Any = np.array(order)
    return {name: replace(rows, labels=places[np.asarray(rows.labels, np.int64)]) for name, rows in splits.items()}


def label_order(names: Sequence[str], task: Task) -> list[int]:
    """For each label of the task, its index among a model's `names`: always a permutation.

    Names decide, as they are written; else without case, `-`, `_` and spaces, where that leaves all of them different.
    Where one side has mere numbers (`by_position`), the order decides.

    Raises:
        ModelError: the model has another number of labels than the task, or calls them otherwise.
    """
    _refuse_another_number(names, task)
    if task.regression:
        return [0]
    for written in (str, _plain):
        own = {written(name): index for index, name in enumerate(names)}
        if len(own) == len(names) and own.keys() == {written(label) for label in task.labels}:
            return [own[written(label)] for label in task.labels]
    if not by_position(names, task):
        raise ModelError(
            f"the model calls its labels {_listed(names)}; those of task {task.name!r} are {_listed(task.labels)}",
            "rename them in the data, or under id2label in the model's config.json: "
            "a model that calls them LABEL_0, LABEL_1, ... is taken to follow the task's order",
        )
    return list(range(len(names)))


def by_position(names: Sequence[str], task: Task) -> bool:
    """Whether only their order tells which label is which: the model or the task has numbers from 0 for names."""
    numbers = [str(index) for index in range(len(names))]
    return any(list(side) in (numbers, [f"LABEL_{each}" for each in numbers]) for side in (names, task.labels))


def training_batches(
    rows: Encoded, batch_size: int, seed: int, epoch: int, *, pool: int | None
) -> Sequence[np.ndarray]:
    """The row numbers of every batch of one epoch: each row once, batches of like length, in random order.

    Args:
        pool: batches of a pool inside which rows are sorted by length; None: rows of any length share a batch.

    The number of batches is always `ceil(rows / batch_size)`. From `SHUFFLED_ROWS` rows on, it is blocks of rows that
    are put into random order, and rows within groups of blocks: an order of all rows would not fit beside them.
    """
    if len(rows) >= SHUFFLED_ROWS:
        return _Groups(rows, batch_size, (seed, epoch), pool)
    random = np.random.default_rng([seed, epoch])
    return _batches(rows.lengths, random.permutation(len(rows)), batch_size, random, pool)


def _batches(
    lengths: np.ndarray, order: np.ndarray, batch_size: int, random: np.random.Generator, pool: int | None
) -> list[np.ndarray]:
    """The rows of `order` in batches; with bucketing, of like length, and in random order again."""
    if pool is None:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = []
    for start in range(0, len(order), pool * batch_size):
        rows = order[start : start + pool * batch_size]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


class _Groups(Sequence[np.ndarray]):
    """Keeps the batches of one group of blocks at a time; those of another are made when they are asked for."""

    def __init__(self, rows: Encoded, batch_size: int, seed: tuple[int, int], pool: int | None) -> None:
        self._rows, self._batch_size, self._seed, self._pool = rows, batch_size, seed, pool
        whole, rest = divmod(len(rows), batch_size * BLOCK_BATCHES)
        self._blocks = np.random.default_rng([*seed, 0]).permutation(whole)
        if rest:
            self._blocks = np.append(self._blocks, whole)  # the short block last: every batch before it is full
        self._group, self._held = -1, list[np.ndarray]()

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        group, place = divmod(index, BLOCK_BATCHES * GROUP_BLOCKS)
        if group != self._group:
            self._group, self._held = group, self._made(group)
        return self._held[place]

    def _made(self, group: int) -> list[np.ndarray]:
        size = self._batch_size * BLOCK_BATCHES
        blocks = self._blocks[group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]
        order = np.concatenate([np.arange(b * size, min((b + 1) * size, len(self._rows))) for b in blocks])
        random = np.random.default_rng([*self._seed, 1 + group])
        return _batches(self._rows.lengths, random.permutation(order), self._batch_size, random, self._pool)


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


def _refuse_another_number(names: Sequence[str], task: Task) -> None:
    if task.regression and len(names) != 1:
        raise ModelError(f"the model has {len(names)} labels; {task.name!r} is a regression task, which needs one")
    if not task.regression and len(names) != len(task.labels):
        raise ModelError(
            f"the model has {len(names)} labels ({_listed(names)}); "
            f"task {task.name!r} has {len(task.labels)} ({_listed(task.labels)})",
            "give a teacher that was fine-tuned on this task",
        )


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:LISTED]) + (f" and {len(labels) - LISTED} more" if len(labels) > LISTED else "")


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")


def _refuse_without_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in its tokenizer_config.json")
