"""The int8 arithmetic, against plain code for single numbers and against its error bounds."""

from __future__ import annotations

import math

import torch
from torch import nn

from spdtool.models.int8 import (
    INPUT_CHUNK,
    Int8Linear,
    RoundedRows,
    multiply_rounded,
    round_tokens,
    round_weight_rows,
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
