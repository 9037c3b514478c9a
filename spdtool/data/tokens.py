"""From rows to tokens: every text is tokenized once, and large splits come from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spdtool.data import cache
from spdtool.data.dataset import Rows, hash_texts
from spdtool.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Batch = dict[str, np.ndarray]

IGNORED = -100  # label of a token that counts in no loss; the number that torch's cross-entropy ignores
LABELED = "labeled"  # column of a batch: which rows have a label
TOKENIZED_ROWS = 10_000  # at a time
LONG_TEXT = 16  # times the longest input, in characters: shorter ones overflow into few parts
SHORTENED_TO = 4  # times the longest input, in tokens
FORMAT = 1  # of the tokens in the cache: another layout, another number
CACHED_ROWS = 1_000  # fewer are tokenized faster than they are looked up


class Details(Protocol):
    """What a kind of task has to know of its rows beside tokens and labels: words, windows, gold answers."""

    def select(self, rows: np.ndarray) -> Details:
        """Return those of these rows alone, in this order."""


@dataclass(frozen=True)
class Mixture:
    """Training rows of which the last ones have no label, and come into an epoch in turn.

    Attributes:
        labeled, unlabeled: number of rows of each.
        per_epoch: rows without labels in an epoch, at most all of them.
    """

    labeled: int
    unlabeled: int
    per_epoch: int

    def rows_of_epoch(self, seed: int, epoch: int, groups: np.ndarray | None = None) -> np.ndarray:
        """Return the numbers of the rows of an epoch: every labelled one, and the next of an endless shuffle.

        Args:
            groups: number of each row's group, see `Encoded`. Groups are shuffled as a whole; one at the border of two
                epochs is cut there.
        """
        numbers, start, missing = [np.arange(self.labeled)], epoch * self.per_epoch, self.per_epoch
        while missing:
            round_number, position = divmod(start, self.unlabeled)
            # one random order a round, so that each text comes once before any comes again
            order = np.random.default_rng([seed, round_number, self.unlabeled]).permutation(self.unlabeled)
            if groups is not None:
                order = _gather_groups(order, groups[self.labeled :])
            chosen = order[position : position + missing]
            numbers.append(self.labeled + chosen)
            start, missing = start + len(chosen), missing - len(chosen)
        return np.concatenate(numbers)


def _gather_groups(order: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the row numbers of `order`, the rows of a group next to each other where its first one was."""
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    return order[np.argsort(first[inverse], kind="stable")]


@dataclass(frozen=True)
class Encoded:
    """The tokenized rows of a split, end to end in flat arrays.

    Attributes:
        columns: `input_ids`, and `token_type_ids` where the tokenizer has them; each of `offsets[-1]` integers.
        offsets: row i is `columns[...][offsets[i]:offsets[i + 1]]`.
        labels: int64 class indices, or float32 for regression, [rows, ...]; with `labels_per_token`, [tokens] of int64.
        pad_values: value that pads each column.
        pad_left: whether padding goes on the left.
        per_row: further arrays with one entry per row; a batch gets the entries of its rows.
        per_token: the same with one entry per token, [tokens, ...], which a batch pads with zeros.
        labels_per_token: whether each token has a label; a batch pads them with IGNORED, which counts in no loss.
        labels_are_positions: whether labels [rows, ...] are numbers of tokens, which padding on the left moves.
        details: what a kind of task has to know of the rows beside their tokens; it enters no batch. Of a mixture, of
            the labelled rows alone.
        mixture: which of the rows have a label, in training rows with texts that have none; None: all have.
        stored_lengths: tokens of each row, where they are stored; None: computed from the offsets.
        hashes: of the columns and offsets, where they are stored (`cache.hash_array`).
        groups: number of each row's group, [rows]: training batches hold whole groups; None: any row goes with any.
    """

    columns: dict[str, np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray
    pad_values: dict[str, int]
    pad_left: bool
    per_row: dict[str, np.ndarray] = field(default_factory=dict)
    per_token: dict[str, np.ndarray] = field(default_factory=dict)
    labels_per_token: bool = False
    labels_are_positions: bool = False
    details: Details | None = None
    mixture: Mixture | None = None
    stored_lengths: np.ndarray | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def label_counts(self) -> np.ndarray:
        """For each row, how many labels count in a loss: one, or those of its tokens that are not IGNORED."""
        if not self.labels_per_token:
            return np.ones(len(self), np.int64)
        counted = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        counts: np.ndarray = counted[self.offsets[1:]] - counted[self.offsets[:-1]]
        return counts

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets) if self.stored_lengths is None else self.stored_lengths

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch of training."""
        return len(self) if self.mixture is None else self.mixture.labeled + self.mixture.per_epoch

    @property
    def digest(self) -> str:
        """Hash of the tokens and labels: other data, other digest."""
        # Not of `per_row` and `per_token`: the teacher's outputs are stored under this digest.
        hashes = {}
        for name, array in (self.columns | {"offsets": self.offsets, "labels": self.labels}).items():
            hashes[name] = self.hashes.get(name) or cache.hash_array(array)
        return cache.cache_key(hashes)

    def select(self, rows: np.ndarray) -> Encoded:
        """Return these rows alone, in this order."""
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        details = self.details
        if details is not None:
            has_details = self.mixture is None or bool((rows < self.mixture.labeled).all())
            details = details.select(rows) if has_details else None
        tokens = np.concatenate([np.empty(0, np.int64), *spans])
        return replace(
            self,
            columns={name: flat[tokens] for name, flat in self.columns.items()},
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            labels=self.labels[tokens if self.labels_per_token else rows],
            details=details,
            per_row={name: values[rows] for name, values in self.per_row.items()},
            per_token={name: values[tokens] for name, values in self.per_token.items()},
            mixture=None,
            stored_lengths=None if self.stored_lengths is None else self.stored_lengths[rows],
            hashes={},
            groups=None if self.groups is None else self.groups[rows],
        )

    def select_labeled(self) -> Encoded:
        """Return the rows that have a label; itself where all have one."""
        return self if self.mixture is None else self.select(np.arange(self.mixture.labeled))

    def sample(self, size: int, seed: int) -> Encoded:
        """Draw `size` rows that have a label, or whole groups of about as many, and keep their order.

        All of them where there are no more.
        """
        count = len(self) if self.mixture is None else self.mixture.labeled
        if size >= count:
            return self.select_labeled()
        if self.groups is not None:
            return self._sample_groups(self.groups[:count], size, seed)
        return self.select(np.sort(np.random.default_rng(seed).choice(count, size, replace=False)))

    def _sample_groups(self, groups: np.ndarray, size: int, seed: int) -> Encoded:
        """Draw whole groups of the first rows, whose group numbers are `groups`, with at most `size` rows together."""
        names, sizes = np.unique(groups, return_counts=True)
        order = np.random.default_rng(seed).permutation(len(names))
        drawn = names[order[np.cumsum(sizes[order]) <= size]]
        return self.select(np.flatnonzero(np.isin(groups, drawn)))

    def collate(self, rows: Sequence[int] | np.ndarray, length: int | None = None) -> Batch:
        """Pad rows to int64 arrays [rows, tokens], with `attention_mask` and `labels`.

        Args:
            rows: row numbers.
            length: pad to this many tokens; None: to the longest of these rows.
        """
        rows = np.asarray(rows)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        width = int(length or lengths.max())
        # Which token of its row stands at each position; out of range where there is padding.
        position = np.arange(width)[None, :] - (self.pad_left * (width - lengths))[:, None]
        mask = (position >= 0) & (position < lengths[:, None])
        source = (self.offsets[rows][:, None] + position)[mask]
        batch: Batch = {}
        for name, flat in self.columns.items():
            batch[name] = np.full(mask.shape, self.pad_values[name], dtype=np.int64)
            batch[name][mask] = flat[source]
        batch["attention_mask"] = mask.astype(np.int64)
        if self.labels_per_token:
            batch["labels"] = np.full(mask.shape, IGNORED, np.int64)
            batch["labels"][mask] = self.labels[source]
        else:
            batch["labels"] = self.labels[rows]
        if self.labels_are_positions and self.pad_left:
            batch["labels"] = batch["labels"] + (width - lengths)[:, None]
        for name, flat in self.per_token.items():
            batch[name] = self._pad_with_zeros(flat, rows, first_positions=-position[:, 0], width=width)
        for name, values in self.per_row.items():
            batch[name] = values[rows]
        return batch

    def make_outputs(self, outputs: np.ndarray) -> np.ndarray:
        """Make room for the outputs of all rows: zeros [rows, ...], or [all tokens, ...] if they are per token.

        Args:
            outputs: of a batch, [rows, labels] or [rows, tokens, labels].
        """
        count = len(self) if outputs.ndim == 2 else int(self.offsets[-1])
        return np.zeros((count, outputs.shape[-1]), np.float32)

    def store_outputs(self, target: np.ndarray, rows: Sequence[int] | np.ndarray, outputs: np.ndarray) -> None:
        """Write the outputs of a batch of these rows, without those of padding, into what `make_outputs` returned."""
        if outputs.ndim == 2:
            target[rows] = outputs
            return
        width = outputs.shape[1]
        for row, row_outputs in zip(rows, outputs, strict=True):
            start, stop = self.offsets[row], self.offsets[row + 1]
            first = (width - (stop - start)) if self.pad_left else 0
            target[start:stop] = row_outputs[first : first + stop - start]

    def _pad_with_zeros(
        self, flat: np.ndarray, rows: np.ndarray, *, first_positions: np.ndarray, width: int
    ) -> np.ndarray:
        """Pad an array [tokens, ...] to [rows, tokens, ...]."""
        padded = np.zeros((len(rows), width, *flat.shape[1:]), flat.dtype)
        # Row by row, as slices: an entry may be a hidden state, and an index array would copy each once more.
        for target, row, first in zip(padded, rows, first_positions, strict=True):
            tokens = flat[self.offsets[row] : self.offsets[row + 1]]
            target[first : first + len(tokens)] = tokens
        return padded


def mix_rows(labeled: Encoded, unlabeled: Encoded, per_epoch: int) -> Encoded:
    """Join training rows with rows whose labels mean nothing, of which `per_epoch` come into an epoch.

    A batch says in `labeled` which of its rows have a label. Groups of the two have different numbers.
    """
    columns, groups = {}, labeled.groups
    if groups is not None:
        assert unlabeled.groups is not None
        groups = np.concatenate([groups, unlabeled.groups])
    for name, flat in labeled.columns.items():
        columns[name] = np.concatenate([flat, unlabeled.columns[name]])
    return replace(
        labeled,
        columns=columns,
        offsets=np.concatenate([labeled.offsets, labeled.offsets[-1] + unlabeled.offsets[1:]]),
        labels=np.concatenate([labeled.labels, unlabeled.labels]),
        per_row=labeled.per_row | {LABELED: np.repeat([True, False], [len(labeled), len(unlabeled)])},
        mixture=Mixture(len(labeled), len(unlabeled), per_epoch),
        groups=groups,
        stored_lengths=np.concatenate([labeled.lengths, unlabeled.lengths]).astype(np.int32),
        hashes={},
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> Encoded:
    """Tokenize a split, or take its tokens from the cache; pairs longer than `max_length` lose from the longer text.

    The cache key is a hash of the tokenizer, the texts and the length (`cache.py`). Few rows are not cached, nor is the
    output of a tokenizer that is not one of the fast ones: only the files of those say all about them.
    """
    limit = min(max_length, tokenizer.model_max_length)

    def fill(append: cache.Append) -> None:
        append("offsets", np.zeros(1, np.int64))
        end = 0
        for start in range(0, len(rows), TOKENIZED_ROWS):
            encoding = _tokenize_chunk(tokenizer, rows, start, limit)
            lengths = np.array(list(map(len, encoding["input_ids"])))
            append("offsets", end + np.cumsum(lengths))
            append("lengths", lengths.astype(np.int32))
            end += int(lengths.sum())
            for name in ("input_ids", "token_type_ids"):
                if name in encoding:
                    # int32: half the size, and no vocabulary has two thousand million tokens.
                    append(name, np.fromiter(chain.from_iterable(encoding[name]), np.int32, lengths.sum()))

    if len(rows) >= CACHED_ROWS and tokenizer.is_fast:
        key = cache.cache_key(FORMAT, _describe_tokenizer(tokenizer), hash_texts(rows), limit)
        arrays = cache.cached_arrays("tokens", key, fill)
    else:
        arrays = cache.arrays_in_memory(fill)
    try:
        labels = np.asarray(rows.labels)
    except ValueError:  # lists of any length, of which a kind of task makes its own labels
        labels = np.zeros(len(rows), np.int64)
    label_type = np.int64 if np.issubdtype(labels.dtype, np.integer) else np.float32
    return Encoded(
        columns={name: flat for name, flat in arrays.items() if name not in ("offsets", "lengths")},
        offsets=arrays["offsets"],
        labels=labels.astype(label_type, copy=False),
        pad_values=_pad_values(tokenizer),
        pad_left=tokenizer.padding_side == "left",
        stored_lengths=arrays["lengths"],
        hashes=arrays.hashes,
    )


def _tokenize_chunk(tokenizer: PreTrainedTokenizerBase, rows: Rows, start: int, limit: int) -> BatchEncoding:
    stop = start + TOKENIZED_ROWS
    second = None if rows.second is None else rows.second[start:stop]
    first = rows.first[start:stop]
    if second is not None and tokenizer.is_fast:

        def locate(text: str) -> Sequence[tuple[int, int]]:
            located: Sequence[tuple[int, int]] = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )["offset_mapping"]
            return located

        first, second = shorten_pairs(first, second, limit, locate, from_left=tokenizer.truncation_side == "left")
    encoding: BatchEncoding = tokenizer(first, second, truncation=True, max_length=limit, return_attention_mask=False)
    return encoding


def shorten_pairs(
    first: Sequence[str],
    second: Sequence[str],
    limit: int,
    locate: Callable[[str], Sequence[tuple[int, int]]],
    *,
    from_left: bool,
) -> tuple[Sequence[str], Sequence[str]]:
    """Cut off what truncation would, roughly, where both texts of a pair are very long.

    The library tokenizers makes an encoding of every combination of what overflows on both sides: two texts of 100 kB
    took 32 s and 5.6 GB. A text of four times the longest input is truncated as a longer one is.

    Args:
        limit: longest input in tokens.
        locate: returns begin and end, in characters, of each token of a text.
        from_left: whether truncation cuts off the begin of a text.
    """
    long_rows = []
    for row, texts in enumerate(zip(first, second, strict=True)):
        if min(map(len, texts)) > LONG_TEXT * limit:
            long_rows.append(row)
    if not long_rows:
        return first, second
    columns = [list(first), list(second)]
    for column in columns:
        for row in long_rows:
            spans = locate(column[row])
            if len(spans) > SHORTENED_TO * limit:
                start, end = spans[-SHORTENED_TO * limit][0], spans[SHORTENED_TO * limit - 1][1]
                column[row] = column[row][start:] if from_left else column[row][:end]
    return columns[0], columns[1]


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return all that decides what a fast tokenizer makes of a text, for a cache key."""
    import tokenizers  # imported here: whoever only names tasks does not wait for transformers
    import transformers

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left over from the last call
        core.pop(state, None)
    versions = [tokenizers.__version__, transformers.__version__]
    return [type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names, versions, core]


def encode_splits(
    tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Rows], max_length: int
) -> dict[str, Encoded]:
    """Tokenize every split.

    Raises:
        ModelError: the tokenizer cannot pad.
    """
    _refuse_without_padding(tokenizer)
    return {name: tokenize(tokenizer, rows, max_length) for name, rows in splits.items()}


def empty_split(tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return a split without rows; its columns and padding are those of the tokenizer.

    Raises:
        ModelError: the tokenizer cannot pad.
    """
    _refuse_without_padding(tokenizer)
    columns: dict[str, np.ndarray] = {}
    for name in ("input_ids", "token_type_ids"):
        if name in tokenizer.model_input_names:
            columns[name] = np.empty(0, np.int32)
    return Encoded(
        columns=columns,
        offsets=np.zeros(1, np.int64),
        labels=np.empty(0, np.int64),
        pad_values=_pad_values(tokenizer),
        pad_left=tokenizer.padding_side == "left",
    )


def _pad_values(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}


def _refuse_without_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token", "set pad_token in its tokenizer_config.json")


def check_lengths(splits: Mapping[str, Encoded], positions: int | None) -> None:
    """Raise DataError if a row is longer than the model has positions for."""
    longest = max(int(split.lengths.max()) for split in splits.values())
    if positions is not None and longest > positions:
        raise DataError(
            f"the longest row has {longest} tokens; the model has {positions} positions", "lower max_length"
        )


def check_vocabulary(splits: Mapping[str, Encoded], size: int) -> None:
    """Raise ModelError if a token has no row among the model's `size` word embeddings."""
    largest = max(int(split.columns["input_ids"].max()) for split in splits.values())
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}; the model has {size} word embeddings",
            "tokenizer and model must come from the same place",
        )
