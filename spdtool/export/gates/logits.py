"""The gates that every exported file has to pass: the checkpoint's zeros, and the checkpoint's logits.

They know nothing of a file format: they compare counts of zeros, and two functions from a batch to logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from spdtool.data.tokens import Batch, Encoded
from spdtool.errors import GateError
from spdtool.export.graph.weights import Held
from spdtool.models.layers import max_positions
from spdtool.models.predict import Forward

LONGEST_PROBE = 512
PADDED = ((2, 5), (3, 16), (4, 24), (5, 33), (8, 48), (2, 96))  # rows and tokens, padded on either side
ROWS = "dev rows"
SLACK = 1e-5  # of float32 arithmetic in a rounding


def check_zeros(
    audited: Mapping[str, tuple[int, int]], expected: Mapping[str, tuple[int, int]], *, more: bool = False
) -> None:
    """Refuse exported files whose matrices have other zeros than the checkpoint's.

    Args:
        more: let them have more, where small weights are rounded to zero.

    Raises:
        GateError: names the first matrix that is missing or differs, and how many there are.
    """

    def differs(found: tuple[int, int] | None, zeros: int, size: int) -> bool:
        return found is None or found[1] != size or found[0] < zeros or (found[0] > zeros and not more)

    wrong = [name for name, (zeros, size) in expected.items() if differs(audited.get(name), zeros, size)]
    if not wrong:
        return
    name, further = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    found = audited.get(name)
    shown = f"{found[0]} zeros among {found[1]} weights" if found else "no such matrix"
    raise GateError(
        f"{name}{further}: the exported file has {shown}; the checkpoint has {expected[name][0]} among "
        f"{expected[name][1]}"
    )


def check_stored(held: Iterable[Held], model: PreTrainedModel) -> None:
    """Refuse stored weights that are not the model's: a zero that is none, or more than the storage rounds.

    Raises:
        GateError: names the parameter, and what was found.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, array, error in held:
        if name not in parameters:
            continue
        weight = parameters[name].detach().cpu().numpy()
        if weight.shape != array.shape:
            raise GateError(f"{name}: the exported file holds shape {array.shape}; the checkpoint has {weight.shape}")
        filled = int((array[weight == 0] != 0).sum())
        if filled:
            raise GateError(f"{name}: the exported file holds other numbers in place of {filled} zeros")
        moved = np.abs(array - weight) - error * (1 + SLACK) - SLACK * np.abs(weight).max()
        if not (moved <= 0).all():
            raise GateError(
                f"{name}: {int((~(moved <= 0)).sum())} of {weight.size} weights in the exported file are further from "
                f"the checkpoint's than its storage rounds, by up to {np.nanmax(np.abs(array - weight)):.2g}"
            )


def positions(model: PreTrainedModel) -> int:
    """The longest input, in tokens, that is worth trying on the model."""
    return max_positions(model) or int(getattr(model.config, "max_position_embeddings", None) or LONGEST_PROBE)


def probes(model: PreTrainedModel, rows: Encoded, sentences: int) -> Iterator[tuple[str, Batch]]:
    """What checkpoint and exported file are compared on, each with a name for the user.

    `sentences` real rows, if there are any; one row of random tokens, from 1 to 512 or what the model takes; batches of
    unlike lengths. What is padded is so on the right and on the left; where there are two token types, the batches and
    the longest row are pairs.
    """
    some = np.unique(np.linspace(0, max(len(rows) - 1, 0), sentences).round().astype(int))
    for left in (False, True) if len(rows) else ():
        yield f"{len(some)} {ROWS}, {_side(left)}", replace(rows, pad_left=left).collate(some)
    longest = min(positions(model), LONGEST_PROBE)
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


def parity(
    expected: Forward, found: Forward, batches: Iterable[tuple[str, Batch]], tolerance: float
) -> tuple[float, str]:
    """The largest difference of a logit between two forwards, and the batch that shows it.

    Raises:
        GateError: it is above `tolerance`, or a logit is not finite; names the batch.
    """
    largest, where = 0.0, ""
    for name, batch in batches:
        reference, logits = expected(batch), found(batch)
        for who, values in (("checkpoint", reference), ("exported file", logits)):
            if not np.isfinite(values).all():
                raise GateError(f"the {who} gives logits that are not finite on {name}")
        difference = float(np.abs(reference - logits).max())
        if difference > tolerance:
            raise GateError(
                f"checkpoint and exported file differ by {difference:.2g} on {name}; the tolerance is {tolerance:g}",
                "export.tolerance sets it; a difference that is much larger is a fault of the export",
            )
        if difference >= largest:
            largest, where = difference, name
    return largest, where


def deviation(expected: Forward, found: Forward, batches: Iterable[tuple[str, Batch]]) -> tuple[float, float]:
    """How far coarse arithmetic moves the logits: root mean square as a share of the logits' own, and the most.

    Raises:
        GateError: a logit is not finite; names the batch.
    """
    moved, size, largest = 0.0, 0.0, 0.0
    for name, batch in batches:
        reference, logits = expected(batch).astype(np.float64), found(batch).astype(np.float64)
        if not np.isfinite(logits).all():
            raise GateError(f"the exported file gives logits that are not finite on {name}")
        moved += float(np.square(logits - reference).sum())
        size += float(np.square(reference).sum())
        largest = max(largest, float(np.abs(logits - reference).max()))
    return float(np.sqrt(moved / size)) if size else 0.0, largest


def is_real(name: str, *, left: bool) -> bool:
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
