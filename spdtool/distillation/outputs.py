"""What the losses look at in one forward pass: logits, hidden states, attention maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAXES = (nn.functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Observation:
    """One forward pass.

    Attributes:
        logits: [rows, labels].
        hidden: per layer [rows, tokens, width], the embeddings' output first; None where not asked for.
        attention: per layer [rows, heads, tokens, tokens]; None where not asked for.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    attention: tuple[Tensor, ...] | None = None


def observe(
    model: nn.Module, batch: dict[str, Tensor], *, hidden: bool = False, attention: str | None = None
) -> Observation:
    """Run `model` on `batch` (without its labels) and keep what is asked for.

    Args:
        attention: `scores` before the softmax, `probabilities` after softmax and dropout, or None. Needs the eager
            attention implementation.
    """
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    if attention == "scores":
        with _SoftmaxInputs() as scores:
            outputs = model(**inputs, output_hidden_states=hidden)
        return Observation(outputs.logits, outputs.hidden_states if hidden else None, tuple(scores.seen))
    outputs = model(**inputs, output_hidden_states=hidden, output_attentions=attention == "probabilities")
    return Observation(
        outputs.logits,
        outputs.hidden_states if hidden else None,
        outputs.attentions if attention == "probabilities" else None,
    )


class _SoftmaxInputs(TorchFunctionMode):
    """Keeps what goes into each softmax over [rows, heads, tokens, tokens] while the block runs.

    Every supported family computes eager attention with one softmax a layer, so this sees the scores of all of them
    without a line of their code, with relative positions and rotary embeddings already in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SOFTMAXES:
            scores = args[0]
            if scores.dim() == 4 and scores.shape[-1] == scores.shape[-2]:
                self.seen.append(scores)
        return func(*args, **(kwargs or {}))
