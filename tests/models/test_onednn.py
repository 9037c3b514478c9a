"""Linear layers on oneDNN: outputs and gradients equal torch's up to rounding; names do not change."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from spdtool.models import onednn


@pytest.fixture(autouse=True)
def onednn_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


def make_pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    converted = copy.deepcopy(plain)
    onednn.use_onednn(converted)
    assert isinstance(converted, onednn.OneDNNLinear)
    return plain, converted


def test_outputs_and_gradients_are_torchs() -> None:
    inputs = {
        "rows": torch.randn(16, 24),
        "few rows": torch.randn(2, 24),
        "tokens": torch.randn(3, 7, 24),
        "first tokens": torch.randn(16, 5, 24)[:, 0],
        "transposed": torch.randn(3, 24, 7).transpose(1, 2),
    }
    for (shape, x), bias in itertools.product(inputs.items(), (True, False)):
        results = []
        for layer in make_pair(bias):
            leaf = x.clone().requires_grad_()
            output = layer(leaf)
            output.square().sum().backward()
            results.append([output, leaf.grad, *(weight.grad for weight in layer.parameters())])
        for expected, actual in zip(*results, strict=True):
            case = f"{shape}, bias {bias}"
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, msg=lambda m, c=case: f"{c}: {m}")


def test_only_inputs_and_weights_that_require_gradients_get_them() -> None:
    _, converted = make_pair()
    converted.requires_grad_(False)
    x = torch.randn(16, 24, requires_grad=True)
    converted(x).sum().backward()
    assert x.grad is not None
    assert converted.weight.grad is None
    converted.requires_grad_(True)
    converted(x.detach()).sum().backward()
    assert converted.weight.grad is not None


def test_under_autocast_and_in_other_types_torch_computes() -> None:
    plain, converted = make_pair()
    x = torch.randn(16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), converted(x))
    assert torch.equal(plain.double()(x.double()), converted.double()(x.double()))


def test_names_copies_and_hooks_stay() -> None:
    plain, converted = make_pair()
    assert list(plain.state_dict()) == list(converted.state_dict())
    calls: list[int] = []
    converted.register_forward_hook(lambda *_: calls.append(1))
    copied = copy.deepcopy(converted)
    x = torch.randn(16, 24)
    assert torch.equal(copied(x), converted(x))
    assert calls == [1, 1]


def test_layers_are_not_converted_where_onednn_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    layer = nn.Linear(24, 40)
    onednn.use_onednn(layer)
    assert type(layer) is nn.Linear


def test_a_product_of_two_matrices() -> None:
    x, weight = torch.randn(5, 9), torch.randn(7, 9)
    torch.testing.assert_close(onednn.multiply(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-4)
