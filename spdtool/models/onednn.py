"""Linear layers through oneDNN, on processors where torch's own float32 products use half of the machine.

torch multiplies float32 matrices with MKL, which keeps to 256-bit vectors on processors that are not Intel's. oneDNN,
which torch carries for its other types, uses all 512 bits: 2.1 times the speed, measured in
docs/explanation/training-speed.md. The results
differ in the order of the sums, so in the last bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_ROWS = 8  # below it a product is a walk through the weight's memory, which MKL does as fast


@cache
def pays() -> bool:
    """Whether oneDNN is the faster here: a processor with AVX-512 that is AMD's."""
    try:
        own = "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    return own and torch.cpu._is_avx512_supported() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use(model: nn.Module) -> None:
    """Let every linear layer of `model` that is float32 and on the CPU compute through oneDNN, if that pays.

    Names, state dicts and hooks stay as they are. Under autocast a layer computes as torch does.
    """
    if not pays():
        return
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of float32 matrices on the CPU, by the faster library; rows with gaps are slow."""
    return _times(x, weight, None) if pays() else F.linear(x, weight)


class Linear(nn.Linear):
    """A linear layer, computed by oneDNN where it can be."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., in] to [..., out]."""
        plain = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if not plain or torch.is_autocast_enabled("cpu") or x.numel() < LEAST_ROWS * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            product: Tensor = _Product.apply(x, self.weight, self.bias)
            return product
        return _times(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` with its gradients, each one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat, rows = gradient.reshape(-1, gradient.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
        return (
            _times(gradient, weight.t(), None) if of_x else None,
            _times(flat.t(), rows.t(), None) if of_weight else None,  # rows with gaps take a path 50 times slower
            flat.sum(0) if of_bias else None,
        )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
