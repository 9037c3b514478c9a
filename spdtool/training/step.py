"""One optimiser step: forward and backward passes, the criterion, clipping, AdamW. Nothing here reads a number back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spdtool.distillation.lesson import Lesson
from spdtool.distillation.losses import WHOLE_BATCH, LossTerms, LossWeight
from spdtool.models import collectives
from spdtool.models.predict import to_device
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Training
from spdtool.training.graphs import StepGraphs
from spdtool.training.learner import Learner
from spdtool.training.microbatches import Microbatch
from spdtool.training.optimizer import clip_gradients, set_learning_rate
from spdtool.training.precision import CastWeights, LossScale
from spdtool.training.schedules import Schedule
from spdtool.training.statistics_collector import StatisticsCollector


class LossWindow:
    """Sums of the loss terms on their device, so that nothing waits for the device between two log lines."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: LossTerms) -> None:
        """Add the terms of a micro-batch."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()

    def compute_means(self) -> dict[str, float]:
        """Compute each term's mean over the steps, of all ranks together. Collective: call on every rank."""
        collectives.sum_over_ranks(self.sums.values())
        return {name: float(value) / self.steps for name, value in self.sums.items()}


@dataclass(kw_only=True)
class Stepper:
    """Takes the optimiser steps of one stage.

    Attributes:
        steps: of the stage.
        trained: what the optimiser knows, by name.
        learning_rate: of progress.
        collector: what the criterion observes; None: there are no events.
        loss_scale: of fp16; None: another precision.
        cast_weights: the student's weights in half precision; None: autocast casts, or nobody.
        graphs: replays whole steps; None: every step is launched operation by operation.
    """

    learner: Learner
    lesson: Lesson
    section: Training
    recipe: Recipe
    steps: int
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: Schedule
    collector: StatisticsCollector | None = None
    loss_scale: LossScale | None = None
    cast_weights: CastWeights | None = None
    graphs: StepGraphs | None = None

    def take(self, step: int, microbatches: Iterable[Microbatch], window: LossWindow) -> None:
        """Take optimiser step `step`, counted from 0, and add its losses to `window`."""
        set_learning_rate(self.optimizer, self.learning_rate(step / self.steps))
        if collectives.group_size() > 1:
            # alone, the state of the generator is in the snapshot instead
            torch.manual_seed(derive_seed(self.recipe.seed, step, collectives.group_rank()))
        if self.graphs is not None:
            (microbatch,) = microbatches
            progress, rounding = step / self.steps, self.learner.rounding
            window.add(
                self.graphs.run(
                    microbatch.batch,
                    lambda batch: self.compute(batch, progress),
                    variant=rounding is not None and rounding.is_on,
                )
            )
        else:
            self._accumulate(step, microbatches, window)
        window.steps += 1

    def compute(self, batch: dict[str, Tensor], progress: float) -> LossTerms:
        """Take a whole step on one batch that is on the device: what a graph records."""
        # those of a step whose recording failed behind its backward pass were never computed
        self.optimizer.zero_grad()
        terms = self._compute_loss(batch, progress, WHOLE_BATCH)
        self._backward(terms["loss"])
        self._update(None)
        return {name: term.detach() for name, term in terms.items()}

    def compute_terms(self, microbatch: Microbatch, step: int) -> LossTerms:
        """Compute the loss terms of a micro-batch."""
        batch = to_device(microbatch.batch, self.learner.accelerator.device)
        return self._compute_loss(batch, step / self.steps, microbatch.weight)

    def compute_calibration_terms(self, microbatch: Microbatch, step: int) -> LossTerms:
        """Compute the loss terms of a calibration batch; of fp16 in float32, since no scale is known to fit them."""
        if self.loss_scale is None:
            return self.compute_terms(microbatch, step)
        device = self.learner.accelerator.device
        with torch.autocast(device.type, enabled=False):
            return self.lesson.loss(to_device(microbatch.batch, device), step / self.steps, microbatch.weight)

    def _accumulate(self, step: int, microbatches: Iterable[Microbatch], window: LossWindow) -> None:
        """Take a step of one or more micro-batches."""
        collector = self.collector if self.collector is not None and self.collector.needs_step(step) else None
        for microbatch in repeat_draw(self.lesson, microbatches):
            terms = self.compute_terms(microbatch, step)
            if collector is not None:
                collector.add_logit_gradients(terms, self.loss_scale)
            self._backward(terms["loss"])
            window.add(terms)
        self._update(collector)

    def _compute_loss(self, batch: dict[str, Tensor], progress: float, weight: LossWeight) -> LossTerms:
        with ExitStack() as stack:
            stack.enter_context(self.learner.accelerator.autocast())
            stack.enter_context(self._cast_weights())
            return self.lesson.loss(batch, progress, weight)

    def _cast_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.cast_weights is None else self.cast_weights.swapped()

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # when the draw has no layer that is trained
            return
        scaled = loss if self.loss_scale is None else self.loss_scale.multiply(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def _update(self, collector: StatisticsCollector | None) -> None:
        """Show the gradients to the criterion, clip them, step, and drop them."""
        pruner = self.learner.pruner
        counted = [*self.trained.values(), *self.lesson.clipped_parameters]
        collectives.sum_over_ranks(collectives.gradients_to_sum(counted))
        if self.loss_scale is not None:
            self.loss_scale.begin_step()
            # bystanders too: they count in the norm that scales the others down
            self.loss_scale.unscale([weight.grad for weight in counted if weight.grad is not None])
        if collector is not None:
            collector.observe_step(self.loss_scale)
        if pruner is not None and self.section.clip_over == "trained":
            pruner.zero_gradients()  # before clipping: dead weights have no part in the norm
        if any(parameter.grad is not None for parameter in self.trained.values()):
            if self.section.clip > 0:
                clip_gradients(counted, self.section.clip, self.learner.accelerator)
            if self.loss_scale is None:
                self.optimizer.step()
            else:
                self.loss_scale.step(self.optimizer)
        self.optimizer.zero_grad()
        # the optimiser does not know them
        for parameter in self.lesson.clipped_parameters:
            parameter.grad = None


def repeat_draw(lesson: Lesson, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
    """Yield the micro-batches of a batch; every one sees the same draw of grafted layers.

    A draw belongs to an optimiser step: splitting a batch, for lack of memory or among ranks, must
    not change it.
    """
    state = lesson.state_dict()
    for index, microbatch in enumerate(microbatches):
        if index:
            lesson.load_state_dict(state)
        yield microbatch


def derive_seed(*numbers: int) -> int:
    """Derive a seed for torch's generators: dropout differs between ranks and steps, and repeats when a step does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
