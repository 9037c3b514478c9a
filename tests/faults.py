"""Faults to plant into exported folders: changed metadata files and changed stored weights.

`test_faults.py` runs them over every built-in target; plugins run them over their targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Fault = Callable[[Path], None]


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Fault:
    """Return a fault that changes the object in a JSON file."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), "utf-8")

    return plant


def _swap_labels(config: dict[str, Any]) -> None:
    labels = config["id2label"]
    labels["0"], labels["1"] = labels["1"], labels["0"]


def _swap_words(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]


def _cut_vocabulary(tokenizer: dict[str, Any]) -> None:
    for word in list(tokenizer["model"]["vocab"])[-10:]:
        del tokenizer["model"]["vocab"][word]


FILE_FAULTS: dict[str, Fault] = {
    "labels swapped": edit_json("config.json", _swap_labels),
    "a label renamed": edit_json("config.json", lambda config: config["id2label"].update({"0": "worse"})),
    "another kind of problem": edit_json(
        "config.json", lambda config: config.update(problem_type="multi_label_classification")
    ),
    "vocabulary of half the size": edit_json("config.json", lambda config: config.update(vocab_size=12)),
    "fewer positions": edit_json("config.json", lambda config: config.update(max_position_embeddings=16)),
    "another padding token": edit_json("config.json", lambda config: config.update(pad_token_id=3)),
    "two words swapped": edit_json("tokenizer.json", _swap_words),
    "ten words cut off": edit_json("tokenizer.json", _cut_vocabulary),
    "no normalizer": edit_json("tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=None)),
    "no pre-tokenizer": edit_json("tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=None)),
    "no post-processor": edit_json("tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None)),
    "an added token": edit_json(
        "tokenizer.json",
        lambda tokenizer: tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5, "content": "good"}),
    ),
    "a short longest input": edit_json("tokenizer_config.json", lambda config: config.update(model_max_length=4)),
    "padding on the left": edit_json("tokenizer_config.json", lambda config: config.update(padding_side="left")),
    "cut on the left": edit_json("tokenizer_config.json", lambda config: config.update(truncation_side="left")),
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "an empty config.json": lambda folder: (folder / "config.json").write_text("{}"),
}


def scaled(array: np.ndarray) -> np.ndarray:
    """Multiply by 1.01; int8: move every fourth number by one step."""
    if array.dtype != np.int8:
        return np.asarray(array * array.dtype.type(1.01))
    faulty = array.copy()
    nonzero = np.flatnonzero(array)[::4]
    faulty.flat[nonzero] -= np.sign(faulty.flat[nonzero])
    return faulty


def two_rows_negated(array: np.ndarray) -> np.ndarray:
    """Flip the signs of two rows."""
    return np.concatenate([-array[:2], array[2:]])


def rows_reversed(array: np.ndarray) -> np.ndarray:
    """Put the rows into another order."""
    return array[::-1].copy()


def one_zero_filled(array: np.ndarray) -> np.ndarray:
    """Replace one zero by a tiny number; int8: every zero, because small weights are zero as well."""
    faulty = array.copy()
    if array.dtype == np.int8:
        faulty[array == 0] = 1
    else:
        faulty.flat[np.flatnonzero(array == 0)[0]] = 1e-6
    return faulty


def last_row_changed(array: np.ndarray) -> np.ndarray:
    """Overwrite the last row with the row before it."""
    return np.concatenate([array[:-1], array[-2:-1]])


MATRIX = "bert.encoder.layer.1.intermediate.dense.weight"
TABLE = "bert.embeddings.word_embeddings.weight"
BIAS = "bert.encoder.layer.1.output.LayerNorm.bias"
WEIGHT_FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "1 % on a matrix": (MATRIX, scaled),
    "flipped signs of two rows": (MATRIX, two_rows_negated),
    "permuted rows": (MATRIX, rows_reversed),
    "a filled zero": (MATRIX, one_zero_filled),
    "the last word's embedding": (TABLE, last_row_changed),
    "a layer norm's bias": (BIAS, lambda array: array + array.dtype.type(1e-3)),
}
"""Parameter and change of its stored numbers, in whatever type and orientation they are."""
