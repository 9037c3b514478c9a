"""What the losses compare: logits, hidden states and attention maps of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spdtool.tasks.head import head_of_model

# whichever of them a family calls in eager attention
SOFTMAXES = (nn.functional.softmax, torch.softmax, Tensor.softmax)
AttentionKind = Literal["scores", "probabilities"]


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of one forward pass.

    Attributes:
        logits: [rows, labels], or [rows, tokens, labels] with zeros where there is padding.
        hidden_states: per layer [rows, tokens, width], the embeddings' output first; None if not
            requested.
        attentions: per layer [rows, heads, tokens, tokens]; None if not requested.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def compute_outputs(
    model: nn.Module, batch: dict[str, Tensor], *, hidden_states: bool = False, attention: AttentionKind | None = None
) -> ModelOutputs:
    """Run `model` on `batch` (without its labels) and return the requested outputs.

    Args:
        batch: columns [rows, tokens], on the device of the model.
        hidden_states: whether to return the output of the embeddings and of every layer.
        attention: `scores` before the softmax, `probabilities` after softmax and dropout, or None.
            Needs the eager attention implementation.
    """
    # with labels the model would compute a loss of its own
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    if attention == "scores":
        with SoftmaxInputs() as recorder:
            outputs = model(**inputs, output_hidden_states=hidden_states)
        attentions: tuple[Tensor, ...] | None = tuple(recorder.scores)
    else:
        with_attentions = attention == "probabilities"
        outputs = model(**inputs, output_hidden_states=hidden_states, output_attentions=with_attentions)
        attentions = outputs.attentions if with_attentions else None
    logits = widen(head_of_model(model).collect(outputs, inputs))
    return ModelOutputs(logits, outputs.hidden_states if hidden_states else None, attentions)


def widen(tensor: Tensor) -> Tensor:
    """Return half precision of any shape as float32, since it is too coarse for a loss."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class SoftmaxInputs(TorchFunctionMode):
    """Keeps the input of each softmax over [rows, heads, tokens, tokens] while the block runs.

    Every supported family computes eager attention with one softmax a layer, so this records the
    scores of all of them without a line of their code, with relative positions and rotary
    embeddings already added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in SOFTMAXES:
            scores = args[0]
            assert isinstance(scores, Tensor)
            # the head's softmax over labels has two dimensions
            if scores.dim() == 4 and scores.shape[-1] == scores.shape[-2]:
                self.scores.append(scores)
        return func(*args, **(kwargs or {}))
