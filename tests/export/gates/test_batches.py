"""The batches on which an export is compared: lengths, padding on both sides, pairs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.data.tokens import Batch, Encoded
from spdtool.export.gates.batches import (
    is_right_padded,
    longest_supported_input,
    make_dev_batches,
    make_random_batches,
)


def comparison_batches(model: Any, rows: Encoded, sentences: int) -> list[tuple[str, Batch]]:
    """List the batches of the logits gate with their descriptions."""
    return [*make_dev_batches(rows, sentences).values(), *make_random_batches(model, rows)]


@pytest.fixture
def rows(toys: ModuleType) -> Encoded:
    """Ten encoded pairs."""
    return data.encode_splits(toys.tokenizer(), {"dev": toys.rows(10, pairs=True)}, 32)["dev"]


def test_batches_cover_lengths_sides_and_pairs(toys: ModuleType, rows: Encoded) -> None:
    batches = dict(comparison_batches(toys.bert(), rows, 6))
    assert list(batches)[:2] == ["6 dev rows, padding on the right", "6 dev rows, padding on the left"]
    for length in (1, 2, 7, 32, 64):
        batch = batches[f"shape (1, {length})"]
        assert batch["input_ids"].shape == (1, length)
        assert batch["attention_mask"].all(), f"no padding at length {length}"
        assert not batch["token_type_ids"].any(), f"no pair at length {length}"
    assert batches["shape (1, 64), pair"]["token_type_ids"].any()
    padded = {name for name in batches if "padding" in name and "rows" not in name}
    assert len(padded) >= 12
    assert all(batches[name]["token_type_ids"].any() for name in padded)
    assert not any("128" in name for name in batches), "the model takes 64 tokens"


def test_the_same_rows_are_padded_on_either_side(toys: ModuleType, rows: Encoded) -> None:
    batches = dict(comparison_batches(toys.bert(), rows, 6))
    padded_left, padded_right = (batches[f"shape (4, 24), pairs, padding on the {side}"] for side in ("left", "right"))
    assert (padded_left["attention_mask"].sum(axis=1) == padded_right["attention_mask"].sum(axis=1)).all()
    assert padded_left["attention_mask"][1:, -1].all()
    assert not padded_left["attention_mask"][1:, 0].any()
    assert padded_right["attention_mask"][1:, 0].all()


def test_padding_is_exactly_where_the_mask_is_zero(toys: ModuleType, rows: Encoded) -> None:
    for description, batch in comparison_batches(toys.bert(), rows, 3):
        if "gaps" in description:
            continue
        is_pad = batch["input_ids"] == rows.pad_values["input_ids"]
        assert (is_pad == (batch["attention_mask"] == 0)).all(), description
        assert batch["input_ids"].max() < len(toys.WORDS), description


def test_one_batch_has_gaps_in_its_mask_and_no_row_without_tokens(toys: ModuleType, rows: Encoded) -> None:
    batch = dict(comparison_batches(toys.bert(), rows, 3))["shape (4, 24), pairs, gaps in the mask"]
    assert not is_right_padded(batch)
    mask = batch["attention_mask"]
    assert (np.abs(np.diff(mask, axis=1)).sum(axis=1) > 1)[:3].all(), "hidden tokens between others"
    assert mask[:, 0].all()
    assert (batch["input_ids"][0] != rows.pad_values["input_ids"]).all(), "what is hidden is no padding"


def test_a_model_of_many_positions_is_tried_beyond_the_commonest_limit(toys: ModuleType, rows: Encoded) -> None:
    names = [name for name, _ in comparison_batches(toys.bert(max_position_embeddings=2048), rows, 3)]
    assert {"shape (1, 512)", "shape (1, 1024)", "shape (1, 1024), pair"} <= set(names)
    assert "shape (1, 2048)" not in names, "it would take minutes"


def test_there_are_no_pairs_without_token_types(toys: ModuleType, rows: Encoded) -> None:
    ids = {"input_ids": rows.columns["input_ids"]}
    single = Encoded(ids, rows.offsets, rows.labels, rows.pad_values, rows.pad_left)
    assert not any("pair" in name for name, _ in comparison_batches(toys.bert(), single, 3))


def test_more_sentences_than_rows_takes_all_rows(toys: ModuleType, rows: Encoded) -> None:
    name, batch = make_dev_batches(rows, 64)[False]
    assert name.startswith("10 dev rows")
    assert len(batch["input_ids"]) == 10


def test_without_rows_there_are_still_batches(toys: ModuleType) -> None:
    names = [name for name, _ in comparison_batches(toys.bert(), data.empty_split(toys.tokenizer()), 6)]
    assert "shape (1, 64), pair" in names
    assert not [name for name in names if "dev" in name]


def test_positions_are_counted_after_the_padding_position(toys: ModuleType) -> None:
    for padding, expected in ((None, 20), (0, 19), (1, 18)):
        model = toys.bert()
        model.bert.embeddings.position_embeddings = torch.nn.Embedding(20, 32, padding_idx=padding)
        assert longest_supported_input(model) == expected, f"padding_idx={padding}"


def test_positions_without_a_table_are_those_of_the_configuration(toys: ModuleType) -> None:
    model = toys.bert(max_position_embeddings=48)
    del model.bert.embeddings.position_embeddings
    assert longest_supported_input(model) == 48
