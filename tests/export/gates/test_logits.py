"""The gates: zeros, logits, and what they are tried on."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.data.tokens import Batch, Encoded
from spdtool.errors import GateError
from spdtool.export.gates.batches import longest_supported_input, make_comparison_batches
from spdtool.export.gates.logits import compare_logits
from spdtool.export.gates.weights import check_zeros


@pytest.fixture
def rows(toys: ModuleType) -> Encoded:
    """Ten encoded pairs."""
    return data.encode_splits(toys.tokenizer(), {"dev": toys.rows(10, pairs=True)}, 32)["dev"]


def test_probes_cover_lengths_sides_and_pairs(toys: ModuleType, rows: Encoded) -> None:
    probes = dict(make_comparison_batches(toys.bert(), rows, 6))
    assert list(probes)[:2] == ["6 dev rows, padding on the right", "6 dev rows, padding on the left"]
    for length in (1, 2, 7, 32, 64):
        batch = probes[f"shape (1, {length})"]
        assert batch["input_ids"].shape == (1, length)
        assert batch["attention_mask"].all()
        assert not batch["token_type_ids"].any()
    assert probes["shape (1, 64), pair"]["token_type_ids"].any()
    padded = {name for name in probes if "padding" in name and "rows" not in name}
    assert len(padded) >= 12
    assert all(probes[name]["token_type_ids"].any() for name in padded)
    assert not any("128" in name for name in probes)
    left, right = (probes[f"shape (4, 24), pairs, padding on the {side}"] for side in ("left", "right"))
    assert (left["attention_mask"].sum(axis=1) == right["attention_mask"].sum(axis=1)).all()
    assert left["attention_mask"][1:, -1].all()
    assert not left["attention_mask"][1:, 0].any()
    assert right["attention_mask"][1:, 0].all()


def test_padding_is_where_the_mask_says_and_nowhere_else(toys: ModuleType, rows: Encoded) -> None:
    for _, batch in make_comparison_batches(toys.bert(), rows, 3):
        padded = batch["input_ids"] == rows.pad_values["input_ids"]
        assert (padded == (batch["attention_mask"] == 0)).all()
        assert batch["input_ids"].max() < len(toys.WORDS)


def test_no_pairs_without_token_types(toys: ModuleType, rows: Encoded) -> None:
    plain = Encoded({"input_ids": rows.columns["input_ids"]}, rows.offsets, rows.labels, rows.pad_values, rows.pad_left)
    assert not any("pair" in name for name, _ in make_comparison_batches(toys.bert(), plain, 3))


def test_more_sentences_than_rows_takes_all_rows(toys: ModuleType, rows: Encoded) -> None:
    name, batch = next(make_comparison_batches(toys.bert(), rows, 64))
    assert name.startswith("10 dev rows")
    assert len(batch["input_ids"]) == 10


@pytest.mark.parametrize(("padding", "expected"), [(None, 20), (0, 19), (1, 18)])
def test_positions_are_counted_after_the_padding_s_own(toys: ModuleType, padding: int | None, expected: int) -> None:
    model = toys.bert()
    model.bert.embeddings.position_embeddings = torch.nn.Embedding(20, 32, padding_idx=padding)
    assert longest_supported_input(model) == expected


def test_positions_without_a_table_are_the_configuration_s(toys: ModuleType) -> None:
    model = toys.bert(max_position_embeddings=48)
    del model.bert.embeddings.position_embeddings
    assert longest_supported_input(model) == 48


def ones(batch: Batch) -> np.ndarray:
    return np.ones((len(batch["x"]), 2), dtype=np.float32)


def batches() -> list[tuple[str, Batch]]:
    return [(f"shape (1, {length})", {"x": np.zeros((1, length))}) for length in (1, 2, 5)]


def test_parity_names_the_largest_difference() -> None:
    largest, where = compare_logits(
        ones, lambda batch: ones(batch) + 1e-3 * (batch["x"].shape[1] == 2), batches(), 0.01
    )
    assert largest == pytest.approx(1e-3, rel=1e-3)
    assert where == "shape (1, 2)"


def test_parity_refuses_beyond_the_tolerance_and_names_the_shape() -> None:
    with pytest.raises(GateError, match=r"differ by 0.5 on shape \(1, 5\); the tolerance is 0.01"):
        compare_logits(ones, lambda batch: ones(batch) + 0.5 * (batch["x"].shape[1] == 5), batches(), 0.01)


@pytest.mark.parametrize(("faulty", "who"), [(0, "checkpoint"), (1, "exported file")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parity_refuses_what_is_not_finite(faulty: int, who: str, value: float) -> None:
    sides = [ones, ones]
    sides[faulty] = lambda batch: ones(batch) * value
    with pytest.raises(GateError, match=f"the {who} gives logits that are not finite on shape"):
        compare_logits(*sides, batches(), 0.01)


def test_zeros_must_be_equal() -> None:
    expected = {"a": (5, 10), "b": (2, 4)}
    check_zeros({"a": (5, 10), "b": (2, 4), "other": (0, 1)}, expected)
    with pytest.raises(
        GateError, match="a: the exported file has 4 zeros among 10 weights; the checkpoint has 5 among"
    ):
        check_zeros({"a": (4, 10), "b": (2, 4)}, expected)
    with pytest.raises(GateError, match=r"a \(and 1 more\): the exported file has no such matrix"):
        check_zeros({}, expected)


def test_without_rows_there_are_still_probes(toys: ModuleType) -> None:
    names = [name for name, _ in make_comparison_batches(toys.bert(), data.empty_split(toys.tokenizer()), 6)]
    assert "shape (1, 64), pair" in names
    assert not [name for name in names if "dev" in name]
