"""What a criterion reads beside the weights: gradients and inputs, of batches taken at an event or of training steps.

A recipe may keep the hidden-state loss out of the saliency (`prune.saliency = "logits"`, as GRAIN does, arXiv
2212.07634: it asks every layer to imitate, whether or not the answer needs it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.data.batches import training_batches
from spdtool.data.tokens import Encoded
from spdtool.errors import RecipeError
from spdtool.models import collectives, fsdp
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.statistics import STATISTICS
from spdtool.recipe.fields import Prune, Recipe
from spdtool.training.microbatches import NO_WEIGHT, Microbatch

CALIBRATION_EPOCH = 2**32  # of the data's order: no training epoch has that number

Terms = dict[str, Tensor]


class Saliency:
    """Keeps what the criterion is shown between two events; silent for a pruner that only holds.

    Args:
        pruner: prunes; its criterion says what it reads.
        section: `calibration` and `saliency` count.
    """

    def __init__(self, pruner: Pruner, section: Prune) -> None:
        self.pruner, self.section = pruner, section
        self._apart: dict[nn.Parameter, Tensor] = {}
        if not any(map(fsdp.is_sharded, pruner.masks.parameters.values())):
            pruner.agree = collectives.broadcast

    def calibrates(self, step: int) -> bool:
        """Whether batches have to be shown before the event after optimiser step `step`."""
        reads = self.pruner.reads_inputs or self.pruner.reads_gradients
        return self.section.calibration > 0 and reads and not self.pruner.learns and self.pruner.due(step)

    def follows(self, step: int) -> bool:
        """Whether the gradients of training step `step` are shown to the criterion."""
        if not self.pruner.reads_gradients or step >= self.pruner.last:
            return False
        return self.pruner.learns or self.section.calibration == 0

    def calibrate(
        self, model: nn.Module, loss: Callable[[Microbatch], Terms], batches: Iterable[Iterable[Microbatch]]
    ) -> None:
        """Show the criterion `batches` at the weights as they are, without dropout; no weight moves.

        Args:
            loss: gives the terms of a piece; those of a batch's pieces, on all processes, add up to the batch's.
        """
        self.pruner.forget()
        mode = model.training
        model.eval()
        with torch.set_grad_enabled(self.pruner.reads_gradients):
            for pieces in batches:
                learns = [self._backward(loss, piece) for piece in pieces]
                if any(learns):
                    collectives.sum_over_ranks(collectives.gradients_to_sum(self.pruner.masks.parameters.values()))
                    self.pruner.observe()
                model.zero_grad()
        if self.pruner.reads_inputs:
            self.pruner.pool(collectives.sum_over_ranks)
        model.train(mode)

    def _backward(self, loss: Callable[[Microbatch], Terms], piece: Microbatch) -> bool:
        """Show a piece's inputs, and add its gradients to those of its batch; return whether it has any."""
        real = torch.as_tensor(piece.batch["attention_mask"])
        with nullcontext() if piece.weight == NO_WEIGHT else self.pruner.watching(real):
            terms = loss(piece)
        if not self.pruner.reads_gradients or not self._of(terms).requires_grad:
            return False
        self._of(terms).backward()
        return True

    def note(self, terms: Terms) -> None:
        """Before the backward pass of a piece: take the gradients of the logit term apart, if they are asked for."""
        if self.section.saliency == "loss" or not self._of(terms).requires_grad:
            return
        weights = list(self.pruner.masks.parameters.values())
        found = torch.autograd.grad(self._of(terms), weights, retain_graph=True, allow_unused=True)
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                self._apart[weight] = self._apart[weight] + gradient if weight in self._apart else gradient

    def observe(self, scale: float) -> None:
        """After the backward passes, and after gradients were summed over the processes: show them to the criterion.

        Args:
            scale: the loss scale that multiplied them.
        """
        if self.section.saliency == "loss":
            self.pruner.observe(scale)
            return
        collectives.sum_over_ranks(
            self._apart[weight] for weight in self.pruner.masks.parameters.values() if weight in self._apart
        )
        with _gradients(self.pruner.masks.parameters.values(), self._apart):
            self.pruner.observe()  # no loss scale was in them
        self._apart = {}

    def _of(self, terms: Terms) -> Tensor:
        return terms["loss"] if self.section.saliency == "loss" else terms["logits"]


def check(section: Prune, events: Sequence[tuple[int, float]], *, copied: bool = True) -> None:
    """Refuse a recipe whose criterion would have seen nothing when it is asked.

    Args:
        events: `(optimiser step, sparsity)`.
        copied: whether the student starts as its teacher, from whom it then learns nothing before the first event.

    Raises:
        UnknownName: no such criterion.
        RecipeError: says which setting is missing.
    """
    if section.saliency == "logits" and section.loss.logits == 0:
        raise RecipeError(
            "prune.saliency is of the logit term, whose weight is 0", "set prune.loss.logits, or prune.saliency=loss"
        )
    needs = plugins.criteria.entry(section.criterion).meta.get("needs", ())
    fresh = {STATISTICS[need].reads for need in needs if need in STATISTICS and not STATISTICS[need].learned}
    if copied and "gradient" in fresh and 0 in dict(events) and section.loss.hardness == 1:
        raise RecipeError(
            f"criterion {section.criterion!r} needs gradients at the first prune event, before the first step, when "
            "the student is still its teacher and learns nothing from it",
            "let the gold labels have a share, --set prune.loss.hardness=0.5, or leave prune.first out",
        )
    if section.calibration > 0:
        return
    if "input" in fresh:
        raise RecipeError(
            f"criterion {section.criterion!r} reads the inputs of the layers, which only calibration batches show",
            "set how many: --set prune.calibration=16",
        )
    if "gradient" in fresh and 0 in dict(events):
        raise RecipeError(
            f"criterion {section.criterion!r} needs gradients, and the first prune event comes before the first step",
            "take them from batches of their own, --set prune.calibration=16, or leave prune.first out",
        )


def calibration_batches(rows: Encoded, section: Prune, recipe: Recipe, step: int) -> Iterator[Any]:
    """Row numbers of the calibration batches of the event after `step`: others at each event, the same when resumed."""
    epoch = training_batches(rows, section.batch_size, recipe.seed, CALIBRATION_EPOCH + step, pool=recipe.pool)
    return islice(cycle(epoch), section.calibration)


@contextmanager
def _gradients(weights: Any, shown: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within the block, the weights' gradients are `shown`."""
    own = {weight: weight.grad for weight in weights}
    for weight in own:
        weight.grad = shown.get(weight)
    try:
        yield
    finally:
        for weight, gradient in own.items():
            weight.grad = gradient
