"""The batches on which file and checkpoint are compared: real rows, and random tokens of many shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from spdtool.data.tokens import Batch, Encoded
from spdtool.models.layers import max_positions

UNLIMITED = 512  # tokens; longest input of a model that says nothing of it
# Longer ones take minutes. Above 512, because that is the commonest limit that an exporter might freeze.
LONGEST_BATCH = 1024  # tokens
POWERS = range(2, 11)  # single rows have these powers of two as lengths
ODD_LENGTHS = (1, 2, 3, 7)
# Rows and tokens: an axis that was frozen when the graph was traced fits one of them at most.
PADDED_SHAPES = ((2, 5), (3, 16), (4, 24), (5, 33), (8, 48), (2, 96))
GAPS_SHAPE = (4, 24)
GAPS_SHARE = 0.3  # of the tokens of each row


def longest_supported_input(model: PreTrainedModel) -> int:
    """Longest input, in tokens, that is worth trying on the model."""
    return max_positions(model) or int(getattr(model.config, "max_position_embeddings", None) or UNLIMITED)


def make_dev_batches(rows: Encoded, sentences: int) -> dict[bool, tuple[str, Batch]]:
    """Make a batch of real rows with its description, by whether it is padded on the left.

    Args:
        rows: the dev set; without rows, the result is empty.
        sentences: number of real rows, spread evenly over the dev set.
    """
    batches: dict[bool, tuple[str, Batch]] = {}
    if not len(rows):
        return batches
    chosen = np.unique(np.linspace(0, len(rows) - 1, sentences).round().astype(int))
    for pad_left in (False, True):
        description = f"{len(chosen)} dev rows, {_padding(pad_left)}"
        batches[pad_left] = description, replace(rows, pad_left=pad_left).collate(chosen)
    return batches


def make_random_batches(model: PreTrainedModel, rows: Encoded) -> Iterator[tuple[str, Batch]]:
    """Yield batches of random tokens with a description of each.

    First come single rows without padding, then padded batches of rows of different lengths, each twice, padded on the
    right and on the left, and one with gaps in its mask. Where the model distinguishes token types, the padded batches
    and the longest row are pairs.

    Args:
        rows: the dev set, whose columns and padding they have; it may be empty.
    """
    longest = min(longest_supported_input(model), LONGEST_BATCH)
    has_pairs = "token_type_ids" in rows.columns and getattr(model.config, "type_vocab_size", 2) > 1
    for length in sorted({*ODD_LENGTHS, *(2**power for power in POWERS), longest}):
        if length <= longest:
            yield f"shape (1, {length})", _random_batch(model, rows, (1, length), pair=False)
    kind = "pairs" if has_pairs else "single"
    for count, length in PADDED_SHAPES:
        shape = (count, min(longest, length))
        for pad_left in (False, True):
            batch = _random_batch(model, rows, shape, pair=has_pairs, pad_left=pad_left)
            yield f"shape {shape}, {kind}, {_padding(pad_left)}", batch
    shape = (GAPS_SHAPE[0], min(longest, GAPS_SHAPE[1]))
    yield f"shape {shape}, {kind}, gaps in the mask", _with_gaps(_random_batch(model, rows, shape, pair=has_pairs))
    if has_pairs:
        yield f"shape (1, {longest}), pair", _random_batch(model, rows, (1, longest), pair=True)


def is_right_padded(batch: Batch) -> bool:
    """Whether the tokens of every row come before its padding."""
    return bool((np.diff(batch["attention_mask"], axis=1) <= 0).all())


def _padding(pad_left: bool) -> str:
    if pad_left:
        return "padding on the left"
    return "padding on the right"


def _with_gaps(batch: Batch) -> Batch:
    """Hide tokens in the middle of each row; the first and the last one stay, so that no row is without any."""
    mask = batch["attention_mask"]
    is_hidden = np.random.default_rng(len(mask)).random(mask.shape) < GAPS_SHARE
    rows, last = np.arange(len(mask)), mask.sum(axis=1) - 1
    is_hidden[rows, last] = is_hidden[:, 0] = False
    return batch | {"attention_mask": mask * ~is_hidden}


def _random_batch(
    model: PreTrainedModel, rows: Encoded, shape: tuple[int, int], *, pair: bool, pad_left: bool = False
) -> Batch:
    """Draw tokens for a batch of `shape`; the first row is full, each further one shorter.

    Args:
        pair: give the later half of each row the token type 1.
        pad_left: pad on the left.
    """
    generator = np.random.default_rng(shape)  # the same batch in every run, and another one for every shape
    count, length = shape
    is_token = np.arange(length)[None, :] < np.linspace(length, 1, count).round()[:, None]
    if pad_left:
        is_token = is_token[:, ::-1]
    pad = rows.pad_values["input_ids"]
    tokens = generator.integers(0, model.config.vocab_size - 1, shape)
    tokens += tokens >= pad  # any token but the one that pads
    batch = {"input_ids": np.where(is_token, tokens, pad), "attention_mask": is_token.astype(np.int64)}
    if "token_type_ids" in rows.columns:
        is_later = (np.arange(length) >= (length + 1) // 2)[None, :]
        batch["token_type_ids"] = (is_later & is_token & pair).astype(np.int64)
    return batch
