"""Heads: which class of Hugging Face a kind of task needs, what it reads, and the form of its outputs.

A checkpoint names its class in config.json, so whatever opens one finds the head there. Neither torch nor transformers
is imported before a model is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spdtool import plugins

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

Reads = Literal["first token", "every token", "pooled mean"]


@dataclass(frozen=True)
class Head:
    """A head on an encoder. A subclass overrides the two `collect` methods where outputs need more than stacking.

    Attributes:
        auto_class: class of transformers that opens such a model.
        ending: of the class names that config.json has under `architectures`.
        about: what a model with this head is, for messages.
        outputs: fields of the model's output, which are also the outputs of an exported file, in order.
        reads: which tokens of the last layer the head reads; an export target may leave out what is not read.
        padding_value: what stands in the place of outputs of padding, with `per_token`.
        per_token: whether there is an output for each token, [rows, tokens, labels], instead of [rows, labels].
        pipeline: name of the pipeline of transformers that opens it.
        pools: whether it is an encoder alone, to which the pooling that its folder describes is added.
    """

    auto_class: str
    ending: str
    about: str
    outputs: tuple[str, ...] = ("logits",)
    reads: Reads = "first token"
    per_token: bool = False
    padding_value: float = 0.0
    pipeline: str = "text-classification"
    pools: bool = False

    def matches(self, name: str) -> bool:
        """Tell whether a class name of config.json is that of a model with this head."""
        return name.endswith(self.ending)

    def opens(self, source: str | Path) -> bool:
        """Tell whether a folder with such a class name has all that the head needs."""
        return True

    def name_outputs(self, config: Mapping[str, Any]) -> list[str]:
        """Name the outputs of a model with this config.json; empty: they are its labels."""
        return []

    def collect(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs of a torch model as one tensor, [rows, labels] or [rows, tokens, labels].

        Args:
            outputs: what the model's `forward` returned; several fields are stacked as if they were labels.
            inputs: what it was called with. Outputs of padding are set to one value, so that they can be compared.
        """
        import torch

        fields = [getattr(outputs, name) for name in self.outputs]
        values: Tensor = fields[0] if len(fields) == 1 else torch.stack(fields, dim=-1)
        if self.per_token:
            values = values.masked_fill(inputs["attention_mask"][..., None] == 0, self.padding_value)
        return values

    def collect_arrays(self, outputs: Sequence[np.ndarray], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Do the same for the outputs of a session of onnxruntime, in the order of `outputs`."""
        values = outputs[0] if len(self.outputs) == 1 else np.stack(outputs, axis=-1)
        if self.per_token:
            values = np.where(inputs["attention_mask"][..., None] == 0, np.float32(self.padding_value), values)
        return np.asarray(values)


SEQUENCE_CLASSIFIER = Head(
    "AutoModelForSequenceClassification", "ForSequenceClassification", "a classifier of whole texts"
)
"""The head of a checkpoint that names no other one."""


def find_head(architectures: Iterable[str] | None) -> Head | None:
    """Return the head of the first class name that a kind of task knows; None: they name none."""
    names = list(architectures or ())
    # first without the plugins: an exported folder is opened without importing them
    for entries in (plugins.task_kinds.builtin_entries, plugins.task_kinds.entries):
        for entry in entries():
            head: Head = entry.value.head
            if any(map(head.matches, names)):
                return head
    return None


def head_of_config(config: PretrainedConfig | Mapping[str, Any]) -> Head:
    """Return the head that a configuration names; that of sequence classifiers where it names none."""
    named = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
    names = named if isinstance(named, list | tuple) else ()
    return find_head(name for name in names if isinstance(name, str)) or SEQUENCE_CLASSIFIER


def read_head(folder: Path) -> Head:
    """Return the head of a checkpoint or an exported folder, by its config.json."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return head_of_config(config if isinstance(config, dict) else {})


def head_of_model(model: nn.Module) -> Head:
    """Return the head of a torch model by its class; that of sequence classifiers for any other module."""
    return find_head([type(model).__name__]) or SEQUENCE_CLASSIFIER
