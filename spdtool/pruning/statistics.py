"""Statistics: what criteria need to know of a weight besides its value, gathered between prune events.

Each is a small class that keeps a float32 sum on its weight's device. `@statistic(name)` makes it available to the
`needs` of a criterion, and the criterion finds what was read under that name in its `Stats`. Of a sharded weight all
this is about the rows that the process holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spdtool.models import fsdp


@dataclass(frozen=True)
class Stats:
    """What was observed of one weight since the last prune event; None where no criterion asked for it.

    Attributes:
        gradient: mean gradient over the optimiser steps, shaped like the weight.
        gradient_squared: mean squared gradient over the optimiser steps, shaped like the weight.
        movement, movement_soft: scores learned over the whole stage, shaped like the weight; None before any step.
        fisher_blocks: empirical Fisher matrix of every `block` consecutive weights, dampened: [blocks, block, block].
        input_norm: root mean square of each input of the layer over the tokens: [inputs].
        input_gram: mean outer product of the layer's inputs over the tokens, dampened: [inputs, inputs].
    """

    gradient: Tensor | None = None
    gradient_squared: Tensor | None = None
    movement: Tensor | None = None
    movement_soft: Tensor | None = None
    fisher_blocks: Tensor | None = None
    input_norm: Tensor | None = None
    input_gram: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How statistics are gathered: weights per Fisher block, dampening, weight of soft movement's sigmoid penalty, and
    the learning rate of its scores."""

    block: int = 16
    dampening: float = 0.01
    penalty: float = 1.0
    score_rate: float = 0.01


@dataclass(frozen=True)
class Gradient:
    """What a backward pass says of one weight.

    Attributes:
        value: the gradient, float32, shaped like the weight.
        weight: the weight; where it is dead, the value that it had when it died if it may grow again, else 0.
        out: the dead, where they stay dead; None where they may grow again.
    """

    value: Tensor
    weight: Tensor
    out: Tensor | None = None


class Statistic:
    """Keeps the sum of what was observed of one weight, and over how many steps or tokens."""

    reads: ClassVar[str] = "gradient"
    learned: ClassVar[bool] = False

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        self.weight, self.settings = weight, settings
        self.total: Tensor | None = None  # made when it is first needed: most of these are large
        self.count = torch.zeros((), dtype=torch.int64, device=weight.device)

    def shape(self) -> tuple[int, ...]:
        """Shape of the sum."""
        return tuple(fsdp.local_rows(self.weight).shape)

    def sum(self) -> Tensor:
        """The sum so far, to be added to."""
        if self.total is None:
            self.total = torch.zeros(self.shape(), dtype=torch.float32, device=self.weight.device)
        return self.total

    def add(self, seen: Gradient) -> None:
        """Take in the gradients of an optimiser step."""
        raise NotImplementedError

    def add_inputs(self, tokens: Tensor) -> None:
        """Take in the layer's inputs, [tokens, inputs]."""
        raise NotImplementedError

    def mean(self) -> Tensor:
        """The sum over the count; zeros where nothing was observed."""
        return self.sum() / self.count.clamp(min=1)

    def read(self) -> Tensor | None:
        """What the criterion is given."""
        return self.mean()

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on later."""
        if self.total is None:
            return {"count": self.count}
        return {
            "count": self.count,
            "total": fsdp.gather_rows(self.total, self.weight) if self._by_rows() else self.total,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        device = self.weight.device
        self.count = state["count"].to(device).clone()
        self.total = None
        if "total" in state:
            total = fsdp.take_local_rows(state["total"], self.weight) if self._by_rows() else state["total"]
            self.total = total.to(device).clone()

    def _by_rows(self) -> bool:
        """Whether the sum has a place for each weight."""
        return type(self).shape is Statistic.shape


STATISTICS: dict[str, type[Statistic]] = {}


def statistic(name: str) -> Callable[[type[Statistic]], type[Statistic]]:
    """Decorator: makes a statistic available to the `needs` of criteria under `name`, a field of `Stats`."""

    def keep(kind: type[Statistic]) -> type[Statistic]:
        STATISTICS[name] = kind
        return kind

    return keep


@statistic("gradient")
class MeanGradient(Statistic):
    """The mean gradient over optimiser steps; a step whose draw left the layer out counts as zero."""

    def add(self, seen: Gradient) -> None:
        self.sum().add_(seen.value)


@statistic("gradient_squared")
class MeanSquare(Statistic):
    """The mean squared gradient over optimiser steps."""

    def add(self, seen: Gradient) -> None:
        self.sum().addcmul_(seen.value, seen.value)


@statistic("movement")
class Movement(Statistic):
    """Minus the sum of weight x gradient over all steps: how far the loss drives the weight from zero.

    Sanh et al. 2020, arXiv 2005.07683. Where the dead may grow again, they count with the value that they had.
    """

    learned = True

    def add(self, seen: Gradient) -> None:
        self.sum().addcmul_(seen.weight.float(), seen.value, value=-1.0)

    def read(self) -> Tensor | None:
        """The scores, or None before the first step."""
        return self.total


@statistic("movement_soft")
class SoftMovement(Movement):
    """Movement with the sigmoid penalty of the same paper's soft variant, which draws undecided scores down.

    The scores descend by `score_rate` x (weight x gradient + penalty x the sigmoid's slope). The penalty needs scores
    of the order of 1, which the paper gets from Adam; here weight x gradient is divided by its root mean square over
    the matrix and all steps.
    """

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        super().__init__(weight, settings)
        self.squares = torch.zeros((), dtype=torch.float32, device=weight.device)

    def add(self, seen: Gradient) -> None:
        change = seen.weight.float() * seen.value
        self.squares += fsdp.mean_over_shards(change.square(), self.weight)
        scale = (self.squares / self.count).sqrt()
        change /= scale.clamp(min=torch.finfo(torch.float32).tiny)
        scores = self.sum()
        slope = torch.sigmoid(scores)
        slope.mul_(1.0 - slope)
        scores.sub_(change.add_(slope, alpha=self.settings.penalty), alpha=self.settings.score_rate)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"squares": self.squares}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.squares = state["squares"].to(self.weight.device).clone()


@statistic("fisher_blocks")
class FisherBlocks(Statistic):
    """The blockwise empirical Fisher matrix: mean outer products of the gradients of consecutive weights.

    Singh & Alistarh 2020 (WoodFisher, arXiv 2004.14340); Kurtic et al. 2022 (arXiv 2203.07259). The last block is
    padded with zeros. Its memory is `block` times the weight's; nothing else of that size is made while it is summed.
    """

    def shape(self) -> tuple[int, ...]:
        size = self.settings.block
        return (-(-fsdp.local_rows(self.weight).numel() // size), size, size)

    def add(self, seen: Gradient) -> None:
        value = seen.value if seen.out is None else seen.value.masked_fill(seen.out, 0.0)
        rows = blocks_of(value, self.settings.block)
        self.sum().baddbmm_(rows.unsqueeze(2), rows.unsqueeze(1))

    def read(self) -> Tensor:
        """The mean, with `dampening` x its mean diagonal added to the diagonal."""
        return _dampened(self.mean(), self.settings.dampening, self.weight.numel(), self.weight)


class InputStatistic(Statistic):
    """What is observed of the inputs of a layer, over the tokens that it saw."""

    reads = "input"

    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1],)


@statistic("input_norm")
class InputNorm(InputStatistic):
    """The root mean square of each input of a layer, over rows and tokens."""

    def add_inputs(self, tokens: Tensor) -> None:
        self.sum().add_(tokens.square().sum(0))

    def read(self) -> Tensor:
        return self.mean().sqrt()


@statistic("input_gram")
class InputGram(InputStatistic):
    """The mean outer product of a layer's inputs: the Hessian, up to a factor, of its output's squared error."""

    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1], self.weight.shape[1])

    def add_inputs(self, tokens: Tensor) -> None:
        self.sum().addmm_(tokens.T, tokens)

    def read(self) -> Tensor:
        """The mean, with `dampening` x its mean diagonal added to the diagonal."""
        return _dampened(self.mean(), self.settings.dampening, self.weight.shape[1])


def blocks_of(matrix: Tensor, size: int) -> Tensor:
    """The weights of a matrix in rows of `size` consecutive ones, the last row padded with zeros: [blocks, size]."""
    flat = matrix.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _dampened(matrices: Tensor, share: float, size: int, like: Tensor | None = None) -> Tensor:
    """Square matrices, in place, plus `share` of their mean diagonal; the identity where nothing was ever observed.

    Args:
        like: the weight of which other processes may hold other matrices.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    mean = (diagonal.sum() if like is None else fsdp.sum_over_shards(diagonal.sum(), like)) / size
    diagonal.add_(torch.where(mean > 0, share * mean, torch.ones_like(mean)))
    return matrices
