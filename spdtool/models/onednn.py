"""Linear layers through oneDNN, where torch's own float32 products use half of the machine.

torch multiplies float32 matrices with MKL, which keeps to 256-bit vectors on processors that are
not Intel's. oneDNN, which torch carries for its other types, uses all 512 bits: 2.1 times the
speed, measured in docs/explanation/training-speed.md. The results differ in the order of the
sums, so in the last bits.
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
def is_faster() -> bool:
    """Whether oneDNN is the faster of the two here: on a processor of AMD's with AVX-512."""
    try:
        cpu = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    has_avx512: bool = torch.cpu._is_avx512_supported()
    return "AuthenticAMD" in cpu and has_avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model: nn.Module) -> None:
    """Compute the float32 linear layers of a model with oneDNN, if that is faster.

    Names, state dicts and hooks stay as they are. Under autocast a layer computes as torch does.
    """
    if not is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:  # a subclass computes in its own way, which must not be lost
            module.__class__ = OneDNNLinear


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight.T` of contiguous float32 matrices on the CPU with the faster library."""
    return _onednn_linear(x, weight, None) if is_faster() else F.linear(x, weight)


class OneDNNLinear(nn.Linear):
    """A linear layer that oneDNN computes where it can."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., in] to [..., out]."""
        is_float32 = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if not is_float32 or torch.is_autocast_enabled("cpu") or x.numel() < LEAST_ROWS * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            product: Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return product
        return _onednn_linear(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` with its gradients, each one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        x_gradient, weight_gradient, bias_gradient = None, None, None
        # contiguous: oneDNN takes strided rows on a path that is 50 times slower
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        inputs = x.reshape(-1, x.shape[-1]).contiguous()
        if needs_x:
            x_gradient = _onednn_linear(gradient, weight.t(), None)
        if needs_weight:
            weight_gradient = _onednn_linear(rows.t(), inputs.t(), None)
        if needs_bias:
            bias_gradient = rows.sum(0)
        return x_gradient, weight_gradient, bias_gradient


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
