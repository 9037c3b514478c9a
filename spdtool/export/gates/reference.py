"""A checkpoint as what its exported files are held against: what it says is computed once, for all its targets."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spdtool.data.tokens import Batch
from spdtool.export.gates.batches import longest_supported_input, make_comparison_batches
from spdtool.export.gates.score import DevLogits, DevSets
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model
from spdtool.models.predict import Forward, torch_forward
from spdtool.recipe.fields import Recipe


class Reference:
    """Keeps a checkpoint's zeros, and its logits on the probes and on the dev sets, once somebody has asked for them.

    Attributes:
        dev: encoded for this checkpoint; without rows, only the probes are compared.
    """

    def __init__(self, checkpoint: Path, dev: DevSets, recipe: Recipe) -> None:
        self.checkpoint, self.dev, self.recipe = checkpoint, dev, recipe
        self._answers: dict[str, dict[int, np.ndarray]] = {}
        self._predicted: dict[str, DevLogits] = {}

    def model(self, *, eager: bool = False) -> Any:
        """The model anew, which the caller may change."""
        return load_model(self.checkpoint, eager=eager)

    @cached_property
    def positions(self) -> int:
        """The longest input, in tokens, that is worth trying."""
        return longest_supported_input(self.model())

    @cached_property
    def zeros(self) -> dict[str, tuple[int, int]]:
        """`(zeros, size)` of each prunable matrix."""
        weights = find_prunable_weights(self.model())
        return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in weights.items()}

    @cached_property
    def probes(self) -> list[tuple[str, Batch]]:
        """What checkpoint and files are compared on, each with a name for the user."""
        return list(make_comparison_batches(self.model(), self.dev.sets["dev"], self.recipe.export.sentences))

    def on_probes(self, provider: str) -> Forward:
        """The checkpoint, for its own probes alone.

        Eager attention answers, which is what is exported: where a row's window holds nothing but padding (ModernBERT,
        padded on the left), torch's own two attentions differ. The dev sets are for the checkpoint as a client loads
        it.
        """
        if provider not in self._answers:
            forward = torch_forward(self.model(eager=True).to(provider), provider)
            self._answers[provider] = {id(batch): forward(batch) for _, batch in self.probes}
        known = self._answers[provider]
        return lambda batch: known[id(batch)]

    def on_dev(self, provider: str) -> DevLogits:
        """What the checkpoint says of the dev sets."""
        if provider not in self._predicted:
            self._predicted[provider] = self.dev.predict(torch_forward(self.model().to(provider), provider))
        return self._predicted[provider]
