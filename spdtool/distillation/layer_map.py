"""Which of the teacher's layers each layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spdtool.distillation.outputs import Observation
from spdtool.errors import RecipeError
from spdtool.models.layers import ModelShape
from spdtool.recipe.fields import PHASES, Distilled, Loss, Recipe


def layer_map(how: str | tuple[int, ...], student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's layer, from 1, for each layer of the student, first to last.

    `uniform` spreads them evenly, so that the last learns from the last; `last` takes the teacher's topmost layers;
    a tuple says it layer by layer. Two stacks of one depth are paired one to one by the first two.

    Args:
        student, teacher: numbers of layers.

    Raises:
        RecipeError: the tuple has another length, or names a layer that is not there; `last` for a deeper student.
    """
    if how == "uniform":
        return tuple(max(1, round(index * teacher / student)) for index in range(1, student + 1))
    if how == "last":
        if student > teacher:
            raise RecipeError(
                f"layer_map = 'last': the student has {student} layers and the teacher only {teacher}",
                "layer_map = 'uniform' lets several layers of the student learn from one of the teacher's",
            )
        return tuple(range(teacher - student + 1, teacher + 1))
    listed = tuple(int(layer) for layer in how)
    if len(listed) != student or not all(1 <= layer <= teacher for layer in listed):
        raise RecipeError(
            f"layer_map = {list(listed)}: a student of {student} layers needs {student} numbers from 1 to {teacher}, "
            "the teacher's layers",
            f"for example layer_map = {list(layer_map('uniform', student, teacher))}",
        )
    return listed


def check_phases(recipe: Recipe, student: ModelShape, teacher: ModelShape) -> None:
    """Refuse what one of the three phases could not compare.

    Raises:
        RecipeError: the layer map, the relation heads or the attention heads do not fit the two; names the phase.
    """
    for phase in PHASES:
        section = recipe.section(phase)
        assert isinstance(section, Distilled)
        try:
            layer_map(section.loss.layer_map, student.layers, teacher.layers)
            check_relation(section.loss, student.width, teacher.width)
            check_attention(section.loss, student.heads, teacher.heads)
        except RecipeError as error:
            raise RecipeError(f"{phase}.loss: {error.message}", error.hint) from None


def taught_by(teacher: Observation, mapped: Sequence[int]) -> Observation:
    """What the teacher shows, in the order of the student's layers: embeddings' output first, then `mapped`."""
    hidden, attention = teacher.hidden, teacher.attention
    return replace(
        teacher,
        hidden=None if hidden is None else (hidden[0], *(hidden[layer] for layer in mapped)),
        attention=None if attention is None else tuple(attention[layer - 1] for layer in mapped),
    )


def check_relation(loss: Loss, student: int, teacher: int) -> None:
    """Refuse widths that `relation_heads` does not divide.

    Raises:
        RecipeError: names the numbers of pieces that would fit.
    """
    pieces = loss.relation_heads
    if loss.relation > 0 and (student % pieces or teacher % pieces):
        fitting = [str(n) for n in range(1, min(student, teacher, 64) + 1) if student % n == teacher % n == 0]
        raise RecipeError(
            f"relation_heads = {pieces} does not divide the widths of student ({student}) and teacher ({teacher})",
            f"what divides both: {', '.join(fitting)}",
        )


def check_attention(loss: Loss, student: int, teacher: int) -> None:
    """Refuse attention maps of different numbers of heads.

    Raises:
        RecipeError: says what else can be compared.
    """
    if loss.attention > 0 and student != teacher:
        raise RecipeError(
            f"attention compares head with head: the student has {student} and the teacher {teacher}",
            "set attention to 0; relation compares token-to-token relations of any width",
        )
