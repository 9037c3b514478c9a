"""Grafting: in each forward pass, each layer is the student's own with probability p, else the teacher's; or a blend.

The student learns its place in a network that already works (BERT-of-Theseus, arXiv 2002.02925; Sparse Progressive
Distillation, arXiv 2110.08190). No modelling code is copied: entries of the student's layer list are swapped for one
forward pass and put back.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from spdtool.errors import ModelError


class Grafting:
    """Keeps the student's layer list, both sets of layers, and the generator that draws between them.

    Args:
        student: the list in which layers are swapped.
        teacher: the teacher's layers, frozen; as many as the student's.
        seed: seed of the draws.
        stand_in_dropout: put the teacher's layers in training mode while they stand in.

    Raises:
        ModelError: the two have different depths.
    """

    def __init__(
        self, student: nn.ModuleList, teacher: nn.ModuleList, *, seed: int, stand_in_dropout: bool = False
    ) -> None:
        _refuse_other_depth(student, teacher)
        self._list = student
        self._student, self._teacher = list(student), list(teacher)
        self._random = random.Random(seed)
        self._stand_in_dropout = stand_in_dropout
        self.drawn = [True] * len(student)

    @contextmanager
    def draw(self, rate: float) -> Iterator[list[bool]]:
        """Draw which layers are the student's own, and let the teacher's stand in for the others inside the block.

        Args:
            rate: the replacing rate p in [0, 1]; the same number of random draws is made whatever it is.

        Yields:
            per layer, whether it is the student's own.
        """
        self.drawn = [self._random.random() < rate for _ in self._student]
        away = [index for index, own in enumerate(self.drawn) if not own]
        try:
            for index in away:
                self._list[index] = self._teacher[index].train(self._stand_in_dropout)
            yield self.drawn
        finally:
            for index in away:
                self._list[index] = self._student[index]
                self._teacher[index].eval()

    def state(self) -> list[Any]:
        """The generator's state, as JSON can hold it."""
        version, internal, gauss = self._random.getstate()
        return [version, list(internal), gauss]

    def restore(self, state: list[Any]) -> None:
        """Take over what `state` gave."""
        version, internal, gauss = state
        self._random.setstate((version, tuple(internal), gauss))


class Blend:
    """Keeps the student's layers and silent twins of the teacher's, to mix what both make of the same input.

    In place of a draw, every layer gives `rate` times its own output plus `1 - rate` times the teacher's: nothing is
    random, and every layer of the student learns in every step. The layers stay where they are; only their `forward`
    is another one inside the block.

    Args:
        student: the layers that are mixed.
        teacher: the teacher's layers, frozen; as many as the student's.
        stand_in_dropout: run the teacher's layers with dropout.

    Raises:
        ModelError: the two have different depths.
    """

    def __init__(self, student: nn.ModuleList, teacher: nn.ModuleList, *, stand_in_dropout: bool = False) -> None:
        _refuse_other_depth(student, teacher)
        self._student, self._teacher = list(student), [_silent(layer) for layer in teacher]
        self._stand_in_dropout = stand_in_dropout
        self.drawn = [True] * len(student)

    @contextmanager
    def draw(self, rate: float) -> Iterator[list[bool]]:
        """Mix the layers' outputs inside the block; at rate 1 the teacher's layers do not run at all.

        Args:
            rate: the student's share in [0, 1].

        Yields:
            per layer, whether it is in the forward pass: all are.
        """
        with ExitStack() as after:
            if rate < 1:
                for own, other in zip(self._student, self._teacher, strict=True):
                    after.callback(other.eval)
                    after.enter_context(_mixed(own, other.train(self._stand_in_dropout), rate))
            yield self.drawn

    def state(self) -> list[Any]:
        """Nothing: there is no draw."""
        return []

    def restore(self, state: list[Any]) -> None:
        """Take over what `state` gave."""


def make(kind: str, student: nn.ModuleList, teacher: nn.ModuleList, *, seed: int, dropout: bool) -> Grafting | Blend:
    """`bernoulli` or `blend`, as `grafting.kind` says; raises as they do."""
    if kind == "blend":
        return Blend(student, teacher, stand_in_dropout=dropout)
    return Grafting(student, teacher, seed=seed, stand_in_dropout=dropout)


@contextmanager
def _mixed(own: nn.Module, other: nn.Module, rate: float) -> Iterator[None]:
    """Let `own` give the mixture while the block runs; transformers captures what `forward` gives, so the mixture."""
    forward, before = own.forward, vars(own).get("forward")

    def mixture(*args: Any, **options: Any) -> Any:
        mine, its = forward(*args, **options), _unobserved(other, args, options)
        if isinstance(mine, tuple):
            return (torch.lerp(its[0], mine[0], rate), *mine[1:])
        return torch.lerp(its, mine, rate)

    own.forward = mixture
    try:
        yield
    finally:
        del own.forward
        if before is not None:
            own.forward = before


def _unobserved(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What `layer` gives, its softmax hidden from whoever watches the student's (`observation.py`)."""
    with torch._C.DisableTorchFunction():
        return layer(*args, **options)


def _silent(layer: nn.Module) -> nn.Module:
    """A twin that shares the layer's weights and has none of its hooks, so that nothing of its pass is captured."""
    twin = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for part in twin.modules():
        part._forward_hooks.clear()
    return twin


def _refuse_other_depth(student: nn.ModuleList, teacher: nn.ModuleList) -> None:
    if len(student) != len(teacher):
        raise ModelError(f"the student has {len(student)} layers and the teacher {len(teacher)}; grafting pairs them")
