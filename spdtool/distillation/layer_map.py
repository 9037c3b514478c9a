"""Which of the teacher's layers each layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spdtool.distillation.outputs import ModelOutputs
from spdtool.errors import RecipeError
from spdtool.models.layers import ModelShape
from spdtool.recipe import PHASES
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Loss


def map_layers(layer_map: str | tuple[int, ...], student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Return the teacher's layer, counted from 1, for each layer of the student, first to last.

    `uniform` spreads them evenly, so that the last learns from the last; `last` takes the
    teacher's topmost layers; a tuple lists them layer by layer. Two stacks of one depth are paired
    one to one by the first two.

    Args:
        layer_map: `uniform`, `last`, or a number for each layer of the student.
        student_depth, teacher_depth: numbers of layers.

    Raises:
        RecipeError: the tuple has another length, or names a layer that does not exist; `last` for
            a deeper student.
    """
    if layer_map == "uniform":
        # a student twice as deep would otherwise round its first layer to 0, the embeddings
        return tuple(max(1, round(layer * teacher_depth / student_depth)) for layer in range(1, student_depth + 1))
    if layer_map == "last":
        if student_depth > teacher_depth:
            raise RecipeError(
                f"layer_map = 'last': the student has {student_depth} layers and the teacher only {teacher_depth}",
                "layer_map = 'uniform' lets several layers of the student learn from one of the teacher's",
            )
        return tuple(range(teacher_depth - student_depth + 1, teacher_depth + 1))
    layers = tuple(int(layer) for layer in layer_map)
    if len(layers) != student_depth or min(layers) < 1 or max(layers) > teacher_depth:
        raise RecipeError(
            f"layer_map = {list(layers)}: a student of {student_depth} layers needs {student_depth} numbers from 1 to "
            f"{teacher_depth}, the teacher's layers",
            f"for example layer_map = {list(map_layers('uniform', student_depth, teacher_depth))}",
        )
    return layers


def check_phases(recipe: Recipe, student: ModelShape, teacher: ModelShape) -> None:
    """Refuse what one of the three phases could not compare.

    Raises:
        RecipeError: the layer map, the relation heads or the attention heads do not fit the two;
            names the phase.
    """
    for phase in PHASES:
        section = recipe.section(phase)
        assert isinstance(section, Distilled)
        try:
            map_layers(section.loss.layer_map, student.layers, teacher.layers)
            check_relation_heads(section.loss, student.width, teacher.width)
            check_attention_heads(section.loss, student.heads, teacher.heads)
        except RecipeError as error:
            raise RecipeError(f"{phase}.loss: {error.message}", error.hint) from None


def select_layers(outputs: ModelOutputs, layers: Sequence[int]) -> ModelOutputs:
    """Return the teacher's outputs in the order of the student's layers, embeddings first.

    Args:
        layers: the teacher's, counted from 1, one for each layer of the student.
    """
    hidden_states, attentions = outputs.hidden_states, outputs.attentions
    if hidden_states is not None:
        # the embeddings' output has index 0, so layer n has index n; attention maps have none
        hidden_states = (hidden_states[0], *(hidden_states[layer] for layer in layers))
    if attentions is not None:
        attentions = tuple(attentions[layer - 1] for layer in layers)
    return replace(outputs, hidden_states=hidden_states, attentions=attentions)


def check_relation_heads(loss: Loss, student_width: int, teacher_width: int) -> None:
    """Refuse widths that `relation_heads` does not divide.

    Raises:
        RecipeError: its hint lists the numbers of heads that fit.
    """
    heads = loss.relation_heads
    if loss.relation > 0 and (student_width % heads or teacher_width % heads):
        divisors = []
        for divisor in range(1, min(student_width, teacher_width, 64) + 1):  # enough to choose from
            if student_width % divisor == teacher_width % divisor == 0:
                divisors.append(str(divisor))
        raise RecipeError(
            f"relation_heads = {heads} does not divide the widths of student ({student_width}) and teacher "
            f"({teacher_width})",
            f"what divides both: {', '.join(divisors)}",
        )


def check_attention_heads(loss: Loss, student_heads: int, teacher_heads: int) -> None:
    """Refuse attention maps of different numbers of heads.

    Raises:
        RecipeError: its hint names the loss that compares any two widths.
    """
    if loss.attention > 0 and student_heads != teacher_heads:
        raise RecipeError(
            f"attention compares head with head: the student has {student_heads} and the teacher {teacher_heads}",
            "set attention to 0; relation compares token-to-token relations of any width",
        )
