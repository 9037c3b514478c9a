"""Grafting: in each forward pass, each layer is the student's own with probability p, else the teacher's.

The student learns its place in a network that already works (BERT-of-Theseus, arXiv 2002.02925; Sparse Progressive
Distillation, arXiv 2110.08190). No modelling code is copied: entries of the student's layer list are swapped for one
forward pass and put back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        if len(student) != len(teacher):
            raise ModelError(
                f"the student has {len(student)} layers and the teacher {len(teacher)}; grafting pairs them"
            )
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
