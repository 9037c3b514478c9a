"""Sentence encoders: an encoder and the pooling of its sentence-transformers folder, as one model.

Weights keep the names that they have in the folder, and the class its name: what is saved is an ordinary checkpoint.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from spdtool.tasks.sentence_settings import SentenceSettings, read_sentence_settings


@dataclass
class SentenceOutput(ModelOutput):
    """Outputs of a sentence encoder.

    Attributes:
        sentence_embedding: [rows, width].
        last_hidden_state: [rows, tokens, width], from which clients pool by themselves.
    """

    sentence_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def add_pooling(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Let an encoder give the vectors of texts, pooled as the folder at `source` says.

    Raises:
        ModelError: it does not say, or says what is not supported.
    """
    # Classes can be hashed; the stubs say otherwise.
    model.__class__ = pooled_class(type(model), read_sentence_settings(source))  # type: ignore[arg-type]
    return model


def sentence_settings(model: torch.nn.Module) -> SentenceSettings | None:
    """Return the settings of a sentence encoder; None for any other model."""
    settings: SentenceSettings | None = getattr(type(model), "sentence", None)
    return settings


@functools.cache
def pooled_class(base: type[PreTrainedModel], settings: SentenceSettings) -> type[PreTrainedModel]:
    """Derive a class of sentence encoders from one of encoders.

    A class, because what shortens or narrows a model builds another one of its class.
    """
    compute = base.forward
    names = list(inspect.signature(compute).parameters)

    @functools.wraps(compute)
    def forward(self: PreTrainedModel, *arguments: Any, **keywords: Any) -> SentenceOutput:
        outputs = compute(self, *arguments, **keywords)
        mask = keywords.get("attention_mask")
        if mask is None and len(arguments) >= names.index("attention_mask"):
            mask = arguments[names.index("attention_mask") - 1]  # without `self`
        states = outputs.last_hidden_state
        if mask is None:
            mask = torch.ones(states.shape[:2], device=states.device)
        return SentenceOutput(
            sentence_embedding=pool(states, mask, settings),
            last_hidden_state=states,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    # Under the same name: transformers writes it into config.json, and looks up what it records by it.
    attributes = {"forward": forward, "sentence": settings, "__module__": base.__module__, "__doc__": base.__doc__}
    derived: type[PreTrainedModel] = type(base.__name__, (base,), attributes)
    return derived


def pool(states: Tensor, mask: Tensor, settings: SentenceSettings) -> Tensor:
    """Pool the vectors of tokens, [rows, tokens, width], into those of texts, [rows, width]."""
    if settings.pooling == "cls":
        vectors = states[:, 0]
    elif settings.pooling == "lasttoken":
        positions = torch.arange(states.shape[1], device=states.device)
        last = (mask * positions).float().argmax(dim=1)
        vectors = states[torch.arange(states.shape[0], device=states.device), last]
    else:
        weights = mask.unsqueeze(-1).to(states.dtype)
        vectors = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    return F.normalize(vectors, dim=1) if settings.normalize else vectors
