"""The batches on which an exported file is compared with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from spdtool.data.tokens import Batch, Encoded
from spdtool.models.layers import max_positions

LONGEST_BATCH = 512
PADDED = ((2, 5), (3, 16), (4, 24), (5, 33), (8, 48), (2, 96))  # rows and tokens, padded on either side
ROWS = "dev rows"


def longest_supported_input(model: PreTrainedModel) -> int:
    """The longest input, in tokens, that is worth trying on the model."""
    return max_positions(model) or int(getattr(model.config, "max_position_embeddings", None) or LONGEST_BATCH)


def make_comparison_batches(model: PreTrainedModel, rows: Encoded, sentences: int) -> Iterator[tuple[str, Batch]]:
    """What checkpoint and exported file are compared on, each with a name for the user.

    `sentences` real rows, if there are any; one row of random tokens, from 1 to 512 or what the model takes; batches of
    unlike lengths. What is padded is so on the right and on the left; where there are two token types, the batches and
    the longest row are pairs.
    """
    some = np.unique(np.linspace(0, max(len(rows) - 1, 0), sentences).round().astype(int))
    for left in (False, True) if len(rows) else ():
        yield f"{len(some)} {ROWS}, {_side(left)}", replace(rows, pad_left=left).collate(some)
    longest = min(longest_supported_input(model), LONGEST_BATCH)
    lengths = sorted({1, 2, 3, 7, *(2**power for power in range(2, 10)), longest})
    two_types = "token_type_ids" in rows.columns and getattr(model.config, "type_vocab_size", 2) > 1
    kind = "pairs" if two_types else "single"
    for length in lengths:
        if length <= longest:
            yield f"shape (1, {length})", _synthetic(model, rows, (1, length), pair=False)
    for count, length in PADDED:
        for left in (False, True):
            shape = (count, min(longest, length))
            yield f"shape {shape}, {kind}, {_side(left)}", _synthetic(model, rows, shape, pair=two_types, left=left)
    if two_types:
        yield f"shape (1, {longest}), pair", _synthetic(model, rows, (1, longest), pair=True)


def is_dev_batch(name: str, *, left: bool) -> bool:
    """Whether a probe is of real rows, padded on this side."""
    return name.endswith(f" {ROWS}, {_side(left)}")


def _side(left: bool) -> str:
    return f"padding on the {'left' if left else 'right'}"


def _synthetic(
    model: PreTrainedModel, rows: Encoded, shape: tuple[int, int], *, pair: bool, left: bool = False
) -> Batch:
    """Random tokens of `shape`; the first row is full, each further one shorter; a pair's later half is of type 1."""
    random, (count, length) = np.random.default_rng(shape), shape
    real = np.arange(length)[None, :] < np.linspace(length, 1, count).round()[:, None]
    real = real[:, ::-1] if left else real
    pad = rows.pad_values["input_ids"]
    tokens = random.integers(0, model.config.vocab_size - 1, shape)
    batch = {"input_ids": np.where(real, tokens + (tokens >= pad), pad), "attention_mask": real.astype(np.int64)}
    if "token_type_ids" in rows.columns:
        later = (np.arange(length) >= (length + 1) // 2)[None, :] & real & pair
        batch["token_type_ids"] = later.astype(np.int64)
    return batch
