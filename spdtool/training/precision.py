"""Half precision: the loss scale of fp16, and weights that are cast once a pass and all together.

autocast casts each weight of each layer by itself, forward and backward: 592 operations in a step
of 12 layers with a teacher beside them, which a GPU finishes before the processor has launched
them. Cast together, they are the same numbers in two operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spdtool.models.fsdp import is_sharded
from spdtool.models.onednn import OneDNNLinear

PLAIN_LINEAR = (nn.Linear, OneDNNLinear)  # a subclass may read its weight in float32

# As torch.amp.GradScaler has them.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """The factor that keeps small gradients of fp16 from becoming zero, and what it overflowed. Nothing is read back.

    torch's `GradScaler` knows the optimiser's parameters alone. Here the gradients of parameters
    that only count in the clipped norm, and those that only the criterion reads, overflow for all
    of them: the step is then skipped.

    Attributes:
        overflow: 1 if a gradient of this step was not finite, else 0; a scalar on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.full((), FIRST_SCALE, dtype=torch.float32, device=device)
        self._steady_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.overflow = torch.zeros((), dtype=torch.float32, device=device)

    def multiply(self, loss: Tensor) -> Tensor:
        """Return the loss to take gradients of."""
        return loss * self._scale

    @torch.no_grad()
    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place, and note whether one of them is not finite."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        inverse = self._scale.double().reciprocal().float()  # exact: the scale is a power of two
        for group in by_type.values():
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.overflow, inverse)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step with unscaled gradients, unless one was not finite; then lower or raise the scale."""
        # the fused kernel reads these on the device, and then changes nothing
        optimizer.grad_scale, optimizer.found_inf = None, self.overflow  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        torch._amp_update_scale_(self._scale, self._steady_steps, self.overflow, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def begin_step(self) -> None:
        """Forget the overflow of the step before."""
        self.overflow.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scale, and the number of steps for which it has held."""
        return {"scale": self._scale, "steady_steps": self._steady_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._scale.copy_(state["scale"])
        self._steady_steps.copy_(state["steady_steps"])


class CastWeights:
    """Casts the weights of a model's linear layers to half precision for one pass, as autocast would, but together.

    Args:
        model: its linear layers that are trained now; the parameters stay float32.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._slots: list[tuple[nn.Module, str]] = []
        parameters: dict[nn.Parameter, None] = {}  # a tied weight once
        for module, name, parameter in _linear_parameters(model):
            # of a frozen one nobody wants a gradient, which those cast together would all have
            if parameter.requires_grad:
                self._slots.append((module, name))
                parameters[parameter] = None
        self.parameters = list(parameters)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the layers compute with the cast weights inside the block; gradients reach the float32 parameters."""
        if not self.parameters:
            yield
            return
        originals = [module._parameters[name] for module, name in self._slots]
        cast = _CastTogether.apply(self.dtype, *self.parameters)  # type: ignore[no-untyped-call]
        replacement = dict(zip(self.parameters, cast, strict=True))
        try:
            for (module, name), parameter in zip(self._slots, originals, strict=True):
                assert isinstance(parameter, nn.Parameter)
                # past `nn.Module.__setattr__`, which takes nothing but parameters
                module._parameters[name] = replacement[parameter]
            yield
        finally:
            for (module, name), parameter in zip(self._slots, originals, strict=True):
                module._parameters[name] = parameter


class _CastTogether(torch.autograd.Function):
    """Cast tensors to another type, and their gradients back to float32, each in one operation."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        # a layer that is replaced in this pass has no gradient, and must not get zeros
        ctx.set_materialize_grads(False)
        return _copy_together(tensors, dtype)

    @staticmethod
    def backward(_: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in gradients if gradient is not None]
        cast = iter(_copy_together(present, torch.float32))
        return (None, *(None if gradient is None else next(cast) for gradient in gradients))


def _copy_together(tensors: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copy tensors to another type in one operation."""
    tensors = list(tensors)
    # one allocation each: in a common one their beginnings would not be aligned, and cuBLAS would
    # take slower kernels
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if tensors:
        torch._foreach_copy_(copies, tensors)
    return tuple(copies)


def cast_linear_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of a frozen model's linear layers in half precision, in which autocast multiplies anyway."""
    for _, _, parameter in _linear_parameters(model):
        assert not parameter.requires_grad, "a trained weight needs float32"
        parameter.data = parameter.data.to(dtype)


def _linear_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the layer, the name in it and the parameter, of every plain linear layer."""
    for module in model.modules():
        if type(module) not in PLAIN_LINEAR:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.float32 and not is_sharded(parameter):
                yield module, name, parameter
