"""AdamW with its parameter groups, the norm of all gradients, and the learning rate over a stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spdtool.models import fsdp
from spdtool.recipe.training import Prune, Training
from spdtool.training.schedules import Schedule, rewound, warmup_then_linear


def create_adamw(
    parameters: Iterable[nn.Parameter], section: Training, device: torch.device, *, capturable: bool = False
) -> torch.optim.AdamW:
    """Create AdamW without decay on biases and normalisation, fused on devices that have the kernel.

    Args:
        capturable: let a graph of a step be recorded: the learning rate is then a tensor on the device.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:  # the fused step takes either sharded or whole weights
        groups.setdefault((parameter.dim() > 1, fsdp.is_sharded(parameter)), []).append(parameter)
    options = []
    for (is_matrix, _), weights in groups.items():
        options.append({"params": weights, "weight_decay": section.weight_decay if is_matrix else 0.0})
    # the loop sets the learning rate before every step
    rate = torch.ones((), device=device) if capturable else 1.0
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(options, lr=rate, eps=section.epsilon, fused=fused, capturable=capturable)


def clip_gradients(parameters: Collection[nn.Parameter], max_norm: float, accelerator: Accelerator) -> None:
    """Scale all gradients down until their common norm is `max_norm`, if it is larger."""
    sharded = [parameter for parameter in parameters if fsdp.is_sharded(parameter)]
    if not sharded:
        accelerator.clip_grad_norm_(parameters, max_norm)
        return
    zero = torch.zeros((), device=accelerator.device)
    gradients, sharded_squares, whole_squares = [], [zero], [zero]
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = fsdp.local_rows(parameter.grad)
        gradients.append(gradient)
        squares = sharded_squares if fsdp.is_sharded(parameter) else whole_squares
        squares.append(gradient.square().sum())
    # whole parameters have the same gradient on every rank and are counted once
    total = fsdp.sum_over_shards(torch.stack(sharded_squares).sum(), sharded[0]) + torch.stack(whole_squares).sum()
    scale = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    for gradient in gradients:
        gradient.mul_(scale)


def create_learning_rate(section: Training, events: Iterable[int], steps: int, peak: float) -> Schedule:
    """Return the learning rate as a function of progress: one decay, or one after each prune event.

    Args:
        events: optimiser steps of the prune events.
        steps: optimiser steps of the stage.
        peak: the highest learning rate.
    """
    initial, final = section.initial_learning_rate, section.final_learning_rate / section.initial_learning_rate
    # `final` is a fraction of the peak, the factor below one of the initial rate
    decay = warmup_then_linear(section.warmup, final)
    if isinstance(section, Prune) and section.rewind is not None:
        restarts = [step / steps for step in sorted(events) if 0 < step < steps]
        decay = rewound(section.warmup, restarts, section.rewind, final)
    return lambda progress: peak * (initial * decay(progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups, in place where a graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
