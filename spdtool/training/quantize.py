"""Quantization-aware training: linear layers that compute as an int8 engine will, with gradients straight through.

`models/int8.py` defines the arithmetic. Here weights and activations are rounded and scaled back,
so that every pass sees the rounding and its gradient is that of the numbers themselves. The weights
stay float32; export rounds them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spdtool.models.int8 import INPUT_CHUNK, round_tokens, round_weight_rows


class RoundedProducts:
    """Linear layers that round from some optimiser step of a phase on.

    Args:
        layers: changed in place: they round while `is_on`, and compute as before otherwise.
        start: share of the steps after which they round.
        steps: optimiser steps of the phase.
    """

    def __init__(self, layers: Iterable[nn.Linear], start: float, steps: int) -> None:
        self.first_step = math.ceil(start * steps)  # a function of the step alone: a resumed phase needs no state
        self.is_on = False
        for layer in layers:
            layer.__class__ = _rounded_class(type(layer))  # type: ignore[arg-type]  # a class is hashable
            assert isinstance(layer, RoundedLinear)
            layer.rounding = self

    def switch(self, step: int) -> None:
        """Round or not, as optimiser step `step`, counted from 0, asks for."""
        self.is_on = step >= self.first_step

    def was_on(self, done: int) -> bool:
        """Whether the weights after `done` steps have been trained with rounding."""
        return done > self.first_step


class RoundedLinear(nn.Linear):
    """A linear layer that rounds its weights and inputs while its `RoundedProducts` are on."""

    rounding: RoundedProducts

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., inputs] to [..., outputs]."""
        if not self.rounding.is_on:
            return super().forward(x)
        return nn.functional.linear(imitate_token_rounding(x), imitate_row_rounding(self.weight), self.bias)


def imitate_row_rounding(weight: Tensor) -> Tensor:
    """Round a matrix [outputs, inputs] as `round_weight_rows` does, and scale it back; the gradient passes unchanged.

    Zeros stay zero.
    """
    with torch.no_grad():
        rows = round_weight_rows(weight.float())  # the definition is of float32, also under autocast
        change = rows.values * rows.scales[:, None] - weight
    return weight + change


def imitate_token_rounding(x: Tensor) -> Tensor:
    """Round activations [..., inputs] as `round_tokens` does, chunk by chunk; the gradient passes unchanged."""
    with torch.no_grad():
        rounded = []
        # the engine rounds each chunk with a scale of its own, so that a chunk never leaves its cache
        for chunk in torch.split(x.float(), INPUT_CHUNK, dim=-1):
            tokens = round_tokens(chunk)
            rounded.append((tokens.values.to(chunk.dtype) - tokens.zero_point) * tokens.scale)
        change = torch.cat(rounded, dim=-1) - x
    return x + change


@functools.cache
def _rounded_class(base: type[nn.Linear]) -> type[RoundedLinear]:
    """Build a class of layers that compute as `base` while nothing is rounded."""
    return type("Rounded" + base.__name__, (RoundedLinear, base), {})
