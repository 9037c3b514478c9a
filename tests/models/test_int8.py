"""The int8 arithmetic, against plain code for single numbers and against its error bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from spdtool.models.int8 import (
    INPUT_CHUNK,
    Int8Linear,
    RoundedRows,
    attend_rounded,
    multiply_rounded,
    round_symmetric,
    round_tokens,
    round_weight_rows,
    use_int8_attention,
    use_int8_products,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_weights_are_within_half_a_step_and_their_largest_is_127() -> None:
    weight = draw(20, 48)
    weight[3] = 0
    values, scales = round_weight_rows(weight)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert values.abs().amax(1).tolist() == [0 if row == 3 else 127 for row in range(20)]
    assert scales[3] == 1
    error = (values * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert (values[weight == 0] == 0).all()


def test_weights_at_half_a_step_go_to_the_even_number() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49]])
    assert round_weight_rows(weight).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 0]]


def test_weights_of_any_finite_size_have_a_positive_scale() -> None:
    for size in (1e-45, 1e-38, 1.0, 3e38):
        values, scales = round_weight_rows(torch.tensor([[size, -size / 2, 0.0]]))
        assert 0 < scales.item() < math.inf
        assert torch.isfinite(values * scales[:, None]).all(), size
        assert values[0, 0] > 0, size


def test_tokens_are_rounded_as_written_out() -> None:
    values, scale, zero_point = round_tokens(torch.tensor([[-51.0, 0.0, 0.5, 1.5, 204.0], [2.55, 1.0, 0.5, 0.0, 0.0]]))
    assert values.dtype == torch.uint8
    assert zero_point.tolist() == [[51], [0]]
    assert values.tolist() == [[0, 51, 51, 53, 255], [255, 100, 50, 0, 0]]
    assert scale[0].item() == 1
    assert abs(scale[1].item() - 0.01) < 1e-8


def test_tokens_without_a_range_are_zero() -> None:
    for token in (torch.zeros(6), torch.full((6,), 1e-40)):
        values, scale, zero_point = round_tokens(token)
        assert (values == 0).all()
        assert scale.item() == 1
        assert zero_point.item() == 0


def test_tokens_are_within_half_a_step_and_zero_is_exact() -> None:
    for shift in (-3.0, 0.0, 3.0):
        x = draw(4, 7, 32) + shift
        x[..., 5] = 0
        values, scale, zero_point = round_tokens(x)
        assert zero_point.min() >= 0
        assert zero_point.max() <= 255
        restored = (values.float() - zero_point) * scale
        # Both the value and the zero point are rounded.
        assert ((restored - x).abs() <= scale * 1.0001).all()
        assert (restored[..., 5] == 0).all()


def test_products_are_those_of_integers_chunk_by_chunk() -> None:
    inputs = INPUT_CHUNK + 40
    x, rows, bias = draw(3, inputs), round_weight_rows(draw(5, inputs, seed=1)), draw(5, seed=2)
    y = multiply_rounded(x, rows, bias)
    for token in range(3):
        for output in range(5):
            expected = bias[output].item()
            for start in (0, INPUT_CHUNK):
                values, scale, zero_point = round_tokens(x[token, start : start + INPUT_CHUNK])
                total = 0
                for index, value in enumerate(values.tolist()):
                    total += (value - int(zero_point)) * int(rows.values[output, start + index])
                expected += total * rows.scales[output].item() * scale.item()
            assert abs(y[token, output].item() - expected) < 1e-4 * max(1, abs(expected))


def test_products_are_near_those_of_float32() -> None:
    x, linear = draw(2, 9, 64), nn.Linear(64, 32)
    with torch.no_grad():
        expected, rounded = linear(x), Int8Linear(linear)(x)
    assert rounded.shape == expected.shape
    assert (rounded - expected).abs().max() < 0.02 * expected.abs().max()
    assert not torch.equal(rounded, expected)


def test_products_of_rounded_numbers_have_no_error() -> None:
    x = torch.tensor([[255.0, 17.0, 0.0, 3.0]])
    rows = RoundedRows(torch.tensor([[127, -127, 5, 1]], dtype=torch.int8), torch.ones(1))
    assert multiply_rounded(x, rows).tolist() == [[255 * 127 - 17 * 127 + 3]]


def test_named_layers_of_a_model_compute_in_int8() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    use_int8_products(model, ["2.weight"])
    assert type(model[0]) is nn.Linear
    assert isinstance(model[2], Int8Linear)
    assert model(draw(3, 8)).shape == (3, 2)


def test_symmetric_rounding_as_written_out() -> None:
    values, scales = round_symmetric(torch.tensor([[-127.0, 0.5, 1.5], [0.0, 0.0, 0.0], [2.54, 1.27, -1.0]]), 1)
    assert values.tolist() == [[-127, 0, 2], [0, 0, 0], [127, 64, -50]]
    assert torch.allclose(scales, torch.tensor([[1.0], [1.0], [0.02]]))


def attend_slowly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend in 8 bits, number by number; `query`, `key` and `value` of one head, without a mask."""
    key_scales = [max(abs(x) for x in row) / 127 for row in key.tolist()]
    value_scales = [max(abs(x) for x in column) / 127 for column in value.T.tolist()]
    rows = []
    for token in query.tolist():
        least, most = min(0.0, *token), max(0.0, *token)
        scale = (most - least) / 255
        numbers = [round(x / scale) for x in token]
        scores = [
            scale * key_scale * sum(number * round(x / key_scale) for number, x in zip(numbers, row, strict=True))
            for row, key_scale in zip(key.tolist(), key_scales, strict=True)
        ]
        probabilities = [round(255 * math.exp(score - max(scores))) for score in scores]
        rows.append(
            [
                scale
                * sum(p * round(x / scale) for p, x in zip(probabilities, column, strict=True))
                / sum(probabilities)
                for column, scale in zip(value.T.tolist(), value_scales, strict=True)
            ]
        )
    return torch.tensor(rows)


def test_attention_is_that_of_single_numbers_and_near_float32() -> None:
    query, key, value = draw(1, 1, 6, 8, seed=1), draw(1, 1, 9, 8, seed=2), draw(1, 1, 9, 8, seed=3)
    rounded = attend_rounded(query, key, value)
    assert torch.allclose(rounded[0, 0], attend_slowly(query[0, 0], key[0, 0], value[0, 0]), atol=1e-5)
    exact = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    assert 1e-4 < (rounded - exact).abs().max() < 0.05


def test_hidden_keys_count_for_nothing_and_a_row_without_tokens_reads_all_alike() -> None:
    query, key, value = draw(2, 3, 5, 8, seed=1), draw(2, 3, 7, 8, seed=2), draw(2, 3, 7, 8, seed=3)
    mask = torch.zeros(2, 1, 1, 7)
    mask[0, ..., 4:] = torch.finfo(torch.float32).min
    value[0, :, 5] = 1000.0  # would make the steps of all values coarse
    rounded = attend_rounded(query, key, value, mask)
    alone = attend_rounded(query[:1], key[:1, :, :4], value[:1, :, :4])
    assert torch.equal(rounded[:1], alone)
    assert torch.equal(rounded[1:], attend_rounded(query[1:], key[1:], value[1:]))
    mask[0] = torch.finfo(torch.float32).min
    means = attend_rounded(query, key, value, mask)[0]
    assert torch.allclose(means, value[0].mean(dim=-2, keepdim=True).expand_as(means), rtol=0.02, atol=0.02)


def test_a_model_attends_in_8_bits_only_where_all_its_inputs_do() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8, 0], [9, 10, 11, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    names = [f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")]
    with torch.no_grad():
        use_int8_products(model, names[:2])
        two_rounded = model(**inputs).last_hidden_state
        if not use_int8_attention(model):
            pytest.skip("before transformers 5, BERT has no attention of another kind")
        assert torch.allclose(model(**inputs).last_hidden_state, two_rounded, atol=1e-6)
        use_int8_products(model, names[2:])
        all_rounded = model(**inputs).last_hidden_state
        model.set_attn_implementation("eager")
        products_rounded = model(**inputs).last_hidden_state
    difference = (all_rounded - products_rounded).abs().max()
    assert 1e-5 < difference < 0.05
