"""Grafting: each layer of a forward pass is the student's with probability p, or a blend of both.

The student's layers learn inside a network that already works (BERT-of-Theseus, arXiv 2002.02925;
Sparse Progressive Distillation, Huang et al., ACL 2022, arXiv 2110.08190). With x the input of
layer i, S_i the student's layer and T_i the teacher's:

    LayerDraw    y = r S_i(x) + (1 - r) T_i(x), r drawn from Bernoulli(p) for each layer and step
    LayerBlend   y = p S_i(x) + (1 - p) T_i(x)

p is the replacing rate, a function of progress: `replacing_rate`. No modelling code is copied:
entries of the student's layer list are swapped for one forward pass and put back.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from spdtool.errors import ModelError, UnknownName
from spdtool.recipe.training import Grafting

RandomState = list[JsonValue]
"""State of a draw's generator, as JSON can hold it."""


class LayerDraw:
    """Keeps the layers of student and teacher, and the generator that draws between them.

    The module replacing of BERT-of-Theseus (arXiv 2002.02925), one encoder layer at a time.

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
        _check_depths(student, teacher)
        self._list = student
        self._student, self._teacher = list(student), list(teacher)
        self._random = random.Random(seed)  # not torch's: dropout must not shift the draws
        self._stand_in_dropout = stand_in_dropout
        self.drawn = [True] * len(student)

    @contextmanager
    def mix(self, rate: float) -> Iterator[list[bool]]:
        """Draw which layers are the student's; inside the block the teacher's stand in for the others.

        Args:
            rate: the replacing rate p in [0, 1]; the same number of random draws is made whatever
                it is.

        Yields:
            per layer, whether it is the student's.
        """
        # one number a layer at any rate, so that a schedule changes no later draw
        self.drawn = [self._random.random() < rate for _ in self._student]
        replaced = [index for index, is_student in enumerate(self.drawn) if not is_student]
        try:
            for index in replaced:
                self._list[index] = self._teacher[index].train(self._stand_in_dropout)
            yield self.drawn
        finally:
            # after an error too: the student's list would be saved with layers of the teacher
            for index in replaced:
                self._list[index] = self._student[index]
                self._teacher[index].eval()

    def state_dict(self) -> RandomState:
        """Return the generator's state, as JSON can hold it."""
        version, internal, gauss = self._random.getstate()
        return [version, list(internal), gauss]

    def load_state_dict(self, state: RandomState) -> None:
        """Restore what `state_dict` returned."""
        version, internal, gauss = state
        assert isinstance(internal, list)
        self._random.setstate((version, tuple(internal), gauss))


class LayerBlend:
    """Keeps the student's layers and hook-free copies of the teacher's, to mix their outputs.

    In place of a draw, every layer gives `rate` times its output plus `1 - rate` times the
    teacher's: nothing is random, and every layer of the student learns in every step. The layers
    stay in their list; only their `forward` is replaced inside the block.

    Args:
        student: the layers that are mixed.
        teacher: the teacher's layers, frozen; as many as the student's.
        stand_in_dropout: run the teacher's layers with dropout.

    Raises:
        ModelError: the two have different depths.
    """

    def __init__(self, student: nn.ModuleList, teacher: nn.ModuleList, *, stand_in_dropout: bool = False) -> None:
        _check_depths(student, teacher)
        self._student = list(student)
        self.teacher_layers = [_copy_without_hooks(layer) for layer in teacher]
        self._stand_in_dropout = stand_in_dropout
        self.drawn = [True] * len(student)

    @contextmanager
    def mix(self, rate: float) -> Iterator[list[bool]]:
        """Mix the layers' outputs inside the block; at rate 1 the teacher's layers do not run.

        Args:
            rate: the weight of the student's output in [0, 1].

        Yields:
            per layer, whether the student's is in the forward pass: True for all.
        """
        with ExitStack() as stack:
            if rate < 1:  # at 1 the teacher's outputs would be computed and multiplied by 0
                for student_layer, teacher_layer in zip(self._student, self.teacher_layers, strict=True):
                    stack.callback(teacher_layer.eval)
                    teacher_layer.train(self._stand_in_dropout)
                    stack.enter_context(_blend_outputs(student_layer, teacher_layer, rate))
            yield self.drawn

    def state_dict(self) -> RandomState:
        """Return an empty state: there is no draw."""
        return []

    def load_state_dict(self, state: RandomState) -> None:
        """Restore what `state_dict` returned."""


LayerMixing = LayerDraw | LayerBlend


def replacing_rate(section: Grafting) -> Callable[[float], float]:
    """Return the replacing rate, the probability of the student's layer, as a function of progress.

    The published code's four schedules, in fractions of a stage instead of counts of steps
    (BERT-of-Theseus, arXiv 2002.02925; Sparse Progressive Distillation, arXiv 2110.08190):

    - `constant`: `start` throughout.
    - `constant-then-one`: `start` for `hold` of the stage, then 1.
    - `linear`: from `start` to 1 over `rise` of the stage, then 1.
    - `constant-then-linear`: `start` for `hold`, then to 1 over `rise`.
    - `constant-then-linear-with-gap`: `start` for `hold`, then a jump to `base` and from there to
      1 over `rise`.

    Args:
        section: `schedule` and its numbers; see `recipe.training.Grafting`.

    Returns:
        Progress of the stage, from 0 to 1, to the replacing rate p, from 0 to 1.

    Raises:
        UnknownName: no such schedule.
    """
    start, hold, rise = section.start, section.hold, section.rise
    base = start if section.base is None else section.base

    def climb(progress: float, lowest: float) -> float:
        """Rise from `lowest` to 1, and stay there."""
        if rise <= 0:
            return 1.0
        return min(1.0, lowest + (1.0 - lowest) * progress / rise)

    def hold_then(later: Callable[[float], float]) -> Callable[[float], float]:
        """Hold `start`, then follow `later`, which counts from the end of the hold."""
        return lambda progress: start if progress < hold else later(progress - hold)

    schedules: dict[str, Callable[[float], float]] = {
        "constant": lambda _: start,
        "constant-then-one": hold_then(lambda _: 1.0),
        "linear": lambda progress: climb(progress, start),
        "constant-then-linear": hold_then(lambda progress: climb(progress, start)),
        "constant-then-linear-with-gap": hold_then(lambda progress: climb(progress, base)),
    }
    if section.schedule not in schedules:
        raise UnknownName("replacing-rate schedule", section.schedule, schedules)
    return schedules[section.schedule]


def create_mixing(
    kind: str, student: nn.ModuleList, teacher: nn.ModuleList, *, seed: int, stand_in_dropout: bool
) -> LayerMixing:
    """Create what `grafting.kind` names.

    Args:
        kind: `bernoulli` for `LayerDraw`, `blend` for `LayerBlend`.
        student, teacher: lists of layers, equally many.
        seed: of the draws; a blend draws nothing.
        stand_in_dropout: run the teacher's layers with dropout.

    Raises:
        ModelError: the two have different depths.
    """
    if kind == "blend":
        return LayerBlend(student, teacher, stand_in_dropout=stand_in_dropout)
    return LayerDraw(student, teacher, seed=seed, stand_in_dropout=stand_in_dropout)


@contextmanager
def _blend_outputs(student: nn.Module, teacher: nn.Module, rate: float) -> Iterator[None]:
    """Let `student.forward`, whose result transformers' hooks capture, return the blend in the block."""
    # accelerate and torch.compile may have set a forward of the instance, which must come back
    forward, previous = student.forward, vars(student).get("forward")

    def blend(*args: object, **options: object) -> object:
        student_output = forward(*args, **options)
        # outputs.py records the softmaxes of the student's pass, and must not see the teacher's
        with torch._C.DisableTorchFunction():
            teacher_output = teacher(*args, **options)
        if isinstance(student_output, tuple):
            return (torch.lerp(teacher_output[0], student_output[0], rate), *student_output[1:])
        assert isinstance(student_output, Tensor)
        return torch.lerp(teacher_output, student_output, rate)

    student.forward = blend
    try:
        yield
    finally:
        del student.forward
        if previous is not None:
            student.forward = previous


def _copy_without_hooks(layer: nn.Module) -> nn.Module:
    """Copy a layer, but for its weights, without the hooks that would capture its outputs."""
    # the memo makes deepcopy keep the parameters: a second teacher would not fit beside the first
    clone = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for module in clone.modules():
        module._forward_hooks.clear()
    return clone


def _check_depths(student: nn.ModuleList, teacher: nn.ModuleList) -> None:
    if len(student) != len(teacher):
        raise ModelError(f"the student has {len(student)} layers and the teacher {len(teacher)}; grafting pairs them")
