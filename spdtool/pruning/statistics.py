"""Statistics: what criteria read besides the weight, gathered between prune events.

Each is a small class that keeps a float32 sum on its weight's device. `@register_statistic(name)`
makes it available to the `needs` of a criterion, which finds the result under that name in its
`Stats`. `Observer` (`observer.py`) feeds them. Of a sharded weight all of this covers the rows of
the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spdtool.models import fsdp
from spdtool.recipe.training import Prune


@dataclass(frozen=True)
class Stats:
    """Observations of one weight since the last prune event; None where nobody asked.

    Attributes:
        gradient: mean gradient over the optimiser steps, shaped like the weight.
        gradient_squared: mean squared gradient over the optimiser steps, shaped like the weight.
        movement, movement_soft: scores learned over the whole stage, shaped like the weight; None
            before any step.
        fisher_blocks: empirical Fisher matrix of every `block` consecutive weights, dampened:
            [blocks, block, block].
        input_norm: root mean square of each input of the layer over the tokens: [inputs].
        input_mean: mean of each input of the layer over the tokens: [inputs].
        input_gram: mean outer product of the layer's inputs over the tokens, dampened: [inputs,
            inputs].
    """

    gradient: Tensor | None = None
    gradient_squared: Tensor | None = None
    movement: Tensor | None = None
    movement_soft: Tensor | None = None
    fisher_blocks: Tensor | None = None
    input_norm: Tensor | None = None
    input_mean: Tensor | None = None
    input_gram: Tensor | None = None


@dataclass(frozen=True)
class WeightGradient:
    """One weight and its gradient in one optimiser step.

    Attributes:
        gradient: float32, shaped like the weight.
        weight: the weight; where it is dead, the value that it had when it died if it may grow
            again, else 0.
        dead: the dead, where they stay dead; None where they may grow again.
        counts: scalar on the device, False if fp16 overflowed in this step: the gradient is then
            zero, and nothing may change; None: it counts.
    """

    gradient: Tensor
    weight: Tensor
    dead: Tensor | None = None
    counts: Tensor | None = None


class Statistic:
    """A sum over the optimiser steps or tokens of one weight, and their number.

    A subclass adds to `sum()` in `add_gradient` or `add_inputs`, as `reads` says.

    Attributes:
        reads: `gradient` or `input`.
        is_learned: whether it goes on over the whole stage, instead of beginning anew at each
            prune event.
        section: `fisher_block`, `dampening`, `penalty` and `score_rate` count.
    """

    reads: ClassVar[str] = "gradient"
    is_learned: ClassVar[bool] = False

    def __init__(self, weight: Tensor, section: Prune) -> None:
        self.weight, self.section = weight, section
        self.total: Tensor | None = None  # made when it is first needed: most of these are large
        # on the device, so that no step waits for it
        self.count = torch.zeros((), dtype=torch.int64, device=weight.device)

    def shape(self) -> tuple[int, ...]:
        """Shape of the sum."""
        return tuple(fsdp.local_rows(self.weight).shape)

    def sum(self) -> Tensor:
        """The sum so far, to be added to in place."""
        if self.total is None:
            self.total = torch.zeros(self.shape(), dtype=torch.float32, device=self.weight.device)
        return self.total

    def add_gradient(self, sample: WeightGradient) -> None:
        """Add the gradient of an optimiser step; `count` includes the step already."""
        raise NotImplementedError

    def add_inputs(self, tokens: Tensor) -> None:
        """Add the layer's inputs, [tokens, inputs]; `count` includes the tokens already."""
        raise NotImplementedError

    def mean(self) -> Tensor:
        """The sum over the count; zeros where nothing was observed."""
        return self.sum() / self.count.clamp(min=1)

    def read(self) -> Tensor | None:
        """The value for the criterion."""
        return self.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The state to resume from, gathered where it has a number for each weight."""
        if self.total is None:
            return {"count": self.count}
        total = self.total
        if self._is_by_weight():
            total = fsdp.gather_rows(total, self.weight)
        return {"count": self.count, "total": total}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        device = self.weight.device
        self.count = state["count"].to(device).clone()
        self.total = None
        if "total" in state:
            total = state["total"]
            if self._is_by_weight():
                total = fsdp.take_local_rows(total, self.weight)
            self.total = total.to(device).clone()

    def _is_by_weight(self) -> bool:
        """Whether the sum has a number for each weight."""
        return type(self).shape is Statistic.shape


STATISTICS: dict[str, type[Statistic]] = {}


def register_statistic(name: str) -> Callable[[type[Statistic]], type[Statistic]]:
    """Return a decorator that makes a statistic available to the `needs` of criteria.

    Args:
        name: field of `Stats`.
    """

    def register(kind: type[Statistic]) -> type[Statistic]:
        STATISTICS[name] = kind
        return kind

    return register


@register_statistic("gradient")
class MeanGradient(Statistic):
    """The mean gradient over optimiser steps; a step whose draw left the layer out counts as zero."""

    def add_gradient(self, sample: WeightGradient) -> None:
        self.sum().add_(sample.gradient)


@register_statistic("gradient_squared")
class MeanSquare(Statistic):
    """The mean squared gradient over optimiser steps."""

    def add_gradient(self, sample: WeightGradient) -> None:
        self.sum().addcmul_(sample.gradient, sample.gradient)


@register_statistic("movement")
class Movement(Statistic):
    """Minus the sum of weight x gradient: how far the loss drives the weight from zero.

    Sanh et al. 2020, arXiv 2005.07683. Where the dead may grow again, they count with the value
    that they had.
    """

    is_learned = True

    def add_gradient(self, sample: WeightGradient) -> None:
        self.sum().addcmul_(sample.weight.float(), sample.gradient, value=-1.0)

    def read(self) -> Tensor | None:
        """The scores, or None before the first step."""
        return self.total


@register_statistic("movement_soft")
class SoftMovement(Movement):
    """Movement with the sigmoid penalty of the soft variant, against undecided scores.

    The scores descend by `prune.score_rate` x (weight x gradient + penalty x the sigmoid's
    slope). The penalty needs scores of the order of 1, which the paper gets from Adam; here
    weight x gradient is divided by its root mean square over the matrix and all steps.
    """

    def __init__(self, weight: Tensor, section: Prune) -> None:
        super().__init__(weight, section)
        self.squares = torch.zeros((), dtype=torch.float32, device=weight.device)  # of one mean a step

    def add_gradient(self, sample: WeightGradient) -> None:
        change = sample.weight.float() * sample.gradient
        self.squares += fsdp.mean_over_shards(change.square(), self.weight)
        scale = (self.squares / self.count.clamp(min=1)).sqrt()  # 0 where the first steps of fp16 overflowed
        # without any gradient so far, 0 / 0 would be no number
        change /= scale.clamp(min=torch.finfo(torch.float32).tiny)
        scores = self.sum()
        slope = torch.sigmoid(scores)
        slope.mul_(1.0 - slope)
        if sample.counts is not None:
            slope.mul_(sample.counts)
        scores.sub_(change.add_(slope, alpha=self.section.penalty), alpha=self.section.score_rate)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.squares = state["squares"].to(self.weight.device).clone()


@register_statistic("fisher_blocks")
class FisherBlocks(Statistic):
    """The blockwise empirical Fisher matrix: mean outer products of gradients.

    Singh & Alistarh 2020 (WoodFisher, arXiv 2004.14340); Kurtic et al. 2022 (arXiv 2203.07259).
    The last block is padded with zeros. Its memory is `block` times the weight's; nothing else of
    that size is made while it is summed.
    """

    def shape(self) -> tuple[int, ...]:
        size = self.section.fisher_block
        return (-(-fsdp.local_rows(self.weight).numel() // size), size, size)

    def add_gradient(self, sample: WeightGradient) -> None:
        gradient = sample.gradient
        if sample.dead is not None:  # they stay zero: F is that of the weights that can move
            gradient = gradient.masked_fill(sample.dead, 0.0)
        rows = split_into_blocks(gradient, self.section.fisher_block)
        self.sum().baddbmm_(rows.unsqueeze(2), rows.unsqueeze(1))

    def read(self) -> Tensor:
        """The mean, with `dampening` x its mean diagonal added to the diagonal."""
        return _dampen(self.mean(), self.section.dampening, self.weight.numel(), self.weight)


class InputStatistic(Statistic):
    """A statistic of the inputs of a layer, over all tokens of the calibration batches."""

    reads = "input"

    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1],)


@register_statistic("input_norm")
class InputNorm(InputStatistic):
    """The root mean square of each input of a layer, over rows and tokens."""

    def add_inputs(self, tokens: Tensor) -> None:
        self.sum().add_(tokens.square().sum(0))

    def read(self) -> Tensor:
        return self.mean().sqrt()


@register_statistic("input_mean")
class InputMean(InputStatistic):
    """The mean of each input of a layer, over rows and tokens."""

    def add_inputs(self, tokens: Tensor) -> None:
        self.sum().add_(tokens.sum(0))


@register_statistic("input_gram")
class InputGram(InputStatistic):
    """The mean outer product of a layer's inputs.

    Up to a factor it is the Hessian of the squared error of the layer's output.
    """

    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1], self.weight.shape[1])

    def add_inputs(self, tokens: Tensor) -> None:
        self.sum().addmm_(tokens.T, tokens)

    def read(self) -> Tensor:
        """The mean, with `dampening` x its mean diagonal added to the diagonal."""
        return _dampen(self.mean(), self.section.dampening, self.weight.shape[1])


def split_into_blocks(matrix: Tensor, size: int) -> Tensor:
    """Cut a matrix into blocks of consecutive weights, the last padded with zeros: [blocks, size]."""
    flat = matrix.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _dampen(matrices: Tensor, share: float, size: int, like: Tensor | None = None) -> Tensor:
    """Add `share` of their mean diagonal to the diagonals of square matrices, in place.

    Args:
        size: numbers on the diagonals of all ranks together.
        like: the weight of which other ranks may have other matrices.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    total = diagonal.sum()
    if like is not None:
        total = fsdp.sum_over_shards(total, like)
    mean = total / size
    # nothing was ever observed: the identity can be inverted, and then ranks by magnitude
    diagonal.add_(torch.where(mean > 0, share * mean, torch.ones_like(mean)))
    return matrices
