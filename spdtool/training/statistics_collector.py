"""Collect what the criterion ranks by: gradients and layer inputs.

They are those of calibration batches at an event, or of the training steps before it.

A recipe may keep the hidden-state loss out of the gradients (`prune.saliency = "logits"`, as
GRAIN does, arXiv 2212.07634: it asks every layer to imitate, whether or not the answer needs it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.data.batches import training_batches
from spdtool.data.tokens import Encoded
from spdtool.errors import RecipeError
from spdtool.models import collectives
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.statistics import STATISTICS
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Prune
from spdtool.training.microbatches import Microbatch
from spdtool.training.precision import LossScale

CALIBRATION_EPOCH = 2**32  # seeds the order of calibration rows; no training epoch has so high a number

Terms = dict[str, Tensor]


class StatisticsCollector:
    """Collects the statistics that a pruner's criterion reads, between two events.

    Args:
        pruner: has events; its criterion says what it reads.
        section: `calibration` and `saliency` count.
    """

    def __init__(self, pruner: Pruner, section: Prune) -> None:
        self.pruner, self.section = pruner, section
        self._logit_gradients: dict[nn.Parameter, Tensor] = {}

    def needs_calibration(self, step: int) -> bool:
        """Whether calibration batches come before the event after optimiser step `step`."""
        reads = self.pruner.reads_inputs or self.pruner.reads_gradients
        if self.section.calibration == 0 or self.pruner.learns:  # learned scores come from training
            return False
        return reads and self.pruner.is_due(step)

    def needs_step(self, step: int) -> bool:
        """Whether the criterion sees the gradients of training step `step`."""
        if not self.pruner.reads_gradients or step >= self.pruner.last_event:
            return False
        return self.pruner.learns or self.section.calibration == 0

    def calibrate(
        self,
        model: nn.Module,
        loss: Callable[[Microbatch], Terms],
        batches: Iterable[Iterable[Microbatch]],
    ) -> None:
        """Show calibration batches to the criterion, without dropout; no weight moves.

        Collective: call on every rank.

        Args:
            loss: the loss terms of a micro-batch; those of all micro-batches of a batch, on all
                ranks, add up.
            batches: micro-batches of this rank, batch by batch.
        """
        self.pruner.reset_statistics()
        was_training = model.training
        model.eval()
        with torch.set_grad_enabled(self.pruner.reads_gradients):
            for microbatches in batches:
                has_gradients = False
                for microbatch in microbatches:
                    has_gradients |= self._add_microbatch(loss, microbatch)
                if has_gradients:
                    weights = self.pruner.masks.parameters.values()
                    collectives.sum_over_ranks(collectives.gradients_to_sum(weights))
                    self.pruner.observe_gradients()
                model.zero_grad()
        if self.pruner.reads_inputs:
            self.pruner.sum_inputs_over_ranks()
        model.train(was_training)

    def _add_microbatch(self, loss: Callable[[Microbatch], Terms], microbatch: Microbatch) -> bool:
        """Show a micro-batch's inputs, and add its gradients; return whether it has any."""
        attention_mask = torch.as_tensor(microbatch.batch["attention_mask"])  # on the processor, where it is indexed
        # a rank without rows passes one row of another's, which must not be counted twice
        is_padding = microbatch.weight.rows == 0
        with nullcontext() if is_padding else self.pruner.observe_inputs(attention_mask):
            term = self._choose_term(loss(microbatch))
        if not self.pruner.reads_gradients or not term.requires_grad:
            return False
        term.backward()  # type: ignore[no-untyped-call]
        return True

    def add_logit_gradients(self, terms: Terms, loss_scale: LossScale | None = None) -> None:
        """Add the logit term's gradients, before a micro-batch's backward pass.

        Do nothing where the criterion reads those of the whole loss.

        The other terms need the graph afterwards, so it is retained.
        """
        term = self._choose_term(terms)
        if self.section.saliency == "loss" or not term.requires_grad:
            return
        if loss_scale is not None:
            term = loss_scale.multiply(term)
        weights = list(self.pruner.masks.parameters.values())
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:  # its layer is in this draw
                summed = self._logit_gradients.get(weight)
                self._logit_gradients[weight] = gradient if summed is None else summed + gradient

    def observe_step(self, loss_scale: LossScale | None = None) -> None:
        """Show the gradients of a training step, after they were summed over the ranks. Collective.

        Args:
            loss_scale: of fp16; the gradients of the whole loss are unscaled already.
        """
        overflow = None if loss_scale is None else loss_scale.overflow
        if self.section.saliency == "loss":
            self.pruner.observe_gradients(overflow)
            return
        weights = list(self.pruner.masks.parameters.values())
        collectives.sum_over_ranks(
            self._logit_gradients[weight] for weight in weights if weight in self._logit_gradients
        )
        if loss_scale is not None:
            loss_scale.unscale(self._logit_gradients.values())
        with _replace_gradients(weights, self._logit_gradients):
            self.pruner.observe_gradients(overflow)
        self._logit_gradients = {}

    def _choose_term(self, terms: Terms) -> Tensor:
        """The loss term whose gradients the criterion reads."""
        return terms["loss"] if self.section.saliency == "loss" else terms["logits"]


def check_statistics(section: Prune, events: Sequence[tuple[int, float]], *, copied: bool = True) -> None:
    """Refuse a recipe whose criterion would have observed nothing at an event.

    Args:
        events: `(optimiser step, sparsity)`.
        copied: whether the student starts as its teacher, from whom it then learns nothing before
            the first event.

    Raises:
        UnknownName: no such criterion.
        RecipeError: says which setting is missing.
    """
    if section.saliency == "logits" and section.loss.logits == 0:
        raise RecipeError(
            "prune.saliency is of the logit term, whose weight is 0",
            "set prune.loss.logits, or prune.saliency=loss",
        )
    reads = set()
    for need in plugins.criteria.entry(section.criterion).meta.get("needs", ()):
        # an unknown need is refused by the pruner; learned scores fall back to the magnitude
        if need in STATISTICS and not STATISTICS[need].is_learned:
            reads.add(STATISTICS[need].reads)
    first_at_start = 0 in dict(events)
    if copied and "gradient" in reads and first_at_start and section.loss.hardness == 1:
        raise RecipeError(
            f"criterion {section.criterion!r} needs gradients at the first prune event, before the first step, when "
            "the student is still its teacher and learns nothing from it",
            "let the gold labels have a share, --set prune.loss.hardness=0.5, or leave prune.first out",
        )
    if section.calibration > 0:
        return
    if "input" in reads:
        raise RecipeError(
            f"criterion {section.criterion!r} reads the inputs of the layers, which only calibration batches show",
            "set how many: --set prune.calibration=16",
        )
    if "gradient" in reads and first_at_start:
        raise RecipeError(
            f"criterion {section.criterion!r} needs gradients, and the first prune event comes before the first step",
            "take them from batches of their own, --set prune.calibration=16, or leave prune.first out",
        )


def calibration_batches(rows: Encoded, section: Prune, recipe: Recipe, step: int) -> Iterator[np.ndarray]:
    """Yield the row numbers of the calibration batches of the event after `step`.

    They are others at each event, and the same ones when a run is resumed.
    """
    epoch = training_batches(rows, section.batch_size, recipe.seed, CALIBRATION_EPOCH + step, pool=recipe.pool)
    return islice(cycle(epoch), section.calibration)


@contextmanager
def _replace_gradients(weights: Iterable[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within the block, give the weights other gradients; None to those that are not named."""
    before = {weight: weight.grad for weight in weights}
    for weight in before:
        weight.grad = gradients.get(weight)
    try:
        yield
    finally:
        for weight, gradient in before.items():
            weight.grad = gradient
