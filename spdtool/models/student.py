"""Student and teacher as a pair: what the student starts from, and whether the one can learn from the other.

A student may be a copy of its teacher, or another encoder of any depth and width with the same vocabulary
(`recipe.student`). What does not fit is refused here, by configuration alone, before hours are spent on a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spdtool import console
from spdtool.data import tokens as data
from spdtool.distillation.layer_map import check_attention, check_relation, layer_map
from spdtool.errors import ModelError, RecipeError
from spdtool.models import load as encoders
from spdtool.recipe.fields import PHASES, Distilled, Recipe
from spdtool.tasks import Task

Forward = Callable[[data.Batch], np.ndarray]

PRETRAINED = "pretrained"
PROBE = ("The naïve CAFÉ-owner's 2nd dog, isn't it?", "It's 10,000 km away…")  # case, accents, punctuation, digits


def outline(recipe: Recipe, task: Task, teacher: Any) -> Any:
    """The student without its weights, for counting; the teacher's own outline where it is a copy of it.

    Raises:
        ModelError: its configuration cannot be read.
    """
    if recipe.student is None:
        return teacher
    if recipe.student == PRETRAINED and task.build is not None:
        return task.build(recipe.seed)[0]
    return encoders.outline(_source(recipe), smoke=recipe.smoke)


def check(recipe: Recipe, student: Any, teacher: Any) -> None:
    """Refuse what one of the three phases could not compare, and a student that is too short for the rows.

    Args:
        student, teacher: models, or their outlines.

    Raises:
        RecipeError: layer map, heads or pieces do not fit the two; names the phase.
        ModelError: the student has fewer positions than the rows may have tokens.
    """
    (depth, width, heads), (its_depth, its_width, its_heads) = shape(student), shape(teacher)
    for phase in PHASES:
        section = recipe.section(phase)
        assert isinstance(section, Distilled)
        try:
            layer_map(section.loss.layer_map, depth, its_depth)
            check_relation(section.loss, width, its_width)
            check_attention(section.loss, heads, its_heads)
        except RecipeError as error:
            raise RecipeError(f"{phase}.loss: {error.message}", error.hint) from None
    if recipe.student is not None:
        _check_positions(recipe, encoders.positions(student), encoders.positions(teacher))


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a student to which a token means another word than to its teacher, or that cuts text otherwise.

    Raises:
        ModelError: says which token, or what became of a sentence.
    """
    mine, its = student.get_vocab(), teacher.get_vocab()
    other = sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))
    hint = "give a student whose tokenizer is the teacher's: what they compare is token by token"
    if other:
        raise ModelError(
            f"the student's tokenizer has another vocabulary than the teacher's: {len(mine)} and {len(its)} tokens; "
            f"{other[0]!r} is {_number(mine, other[0])} here and {_number(its, other[0])} there",
            hint,
        )
    cut = [" ".join(made.convert_ids_to_tokens(made(*PROBE)["input_ids"])) for made in (student, teacher)]
    if cut[0] != cut[1]:
        raise ModelError(
            f"the student's tokenizer cuts text otherwise than the teacher's: {cut[0]!r} here and {cut[1]!r} there",
            hint,
        )


def load_tokenizer(recipe: Recipe, task: Task) -> Any:
    """The tokenizer that comes with the student of the recipe; raises ModelError where there is none."""
    if recipe.student == PRETRAINED and task.build is not None:
        return task.build(recipe.seed)[1]
    return encoders.load_tokenizer(_source(recipe))


def begin(recipe: Recipe, task: Task, names: list[str], *, eager: bool) -> Any:
    """The model that the student starts from, in eval mode, its labels those of the teacher.

    A classifier of the task keeps its head, whose logits are put into the teacher's order; anything else gets a new
    one, which depends on the seed alone.

    Args:
        names: the teacher's label names, in the order of its logits.
        eager: as in `encoders.load`.

    Raises:
        ModelError: it cannot be read.
        RecipeError: its head is new, and `prune.train` would leave it as it is.
    """
    own = check_head(recipe, task)
    torch.manual_seed(recipe.seed)
    if recipe.student == PRETRAINED and task.build is not None:
        return _built(recipe, task, names, eager=eager)
    labels = None if own is not None else () if task.regression else names
    dropout = recipe.prune.dropout
    model = encoders.load(_source(recipe), labels=labels, dropout=dropout, eager=eager, smoke=recipe.smoke)
    encoders.relabel(model, names, None if own is None else _order(own, names, task))
    return model


def check_head(recipe: Recipe, task: Task) -> list[str] | None:
    """The labels of the student's own head; None where it gets a new one, for lack of one of this task.

    Raises:
        ModelError: its configuration cannot be read.
        RecipeError: its head is new, and `prune.train` would leave it as it is.
    """
    own = None if recipe.student == PRETRAINED else encoders.head_labels(_source(recipe))
    if own is not None:
        try:
            data.label_order(own, task)
        except ModelError as error:
            console.warn(f"the student {recipe.student} gets a new head: {error.message}")
            own = None
    if own is None and recipe.prune.train == "layers":
        raise RecipeError(
            f"the student {recipe.student} gets a new head, and prune.train = 'layers' would leave it random",
            "set prune.train to all or layers+head",
        )
    return own


def alike(student: Any, teacher: Any) -> bool:
    """Whether layers of the one can stand in for those of the other: same family, depth and width."""
    same_family = student.config.model_type == teacher.config.model_type
    return same_family and shape(student)[:2] == shape(teacher)[:2]


def shape(model: Any) -> tuple[int, int, int]:
    """Layers, width and attention heads."""
    config = model.config
    return len(encoders.layer_stack(model)), config.hidden_size, config.num_attention_heads


def unread(tokenizer: Any) -> set[str]:
    """Columns that a model with this tokenizer does not take."""
    return {"token_type_ids"} - set(tokenizer.model_input_names)


def richest(student: Any, teacher: Any) -> Any:
    """The tokenizer whose columns are enough for both: a BERT reads token types, a DistilBERT of it does not."""
    return teacher if unread(student) - unread(teacher) else student


def reading(forward: Forward, tokenizer: Any) -> Forward:
    """`forward`, of a model with this tokenizer, for batches that may hold more than it takes."""
    left_out = unread(tokenizer)
    return lambda batch: forward({name: column for name, column in batch.items() if name not in left_out})


def _built(recipe: Recipe, task: Task, names: list[str], *, eager: bool) -> Any:
    assert task.build is not None
    if recipe.prune.dropout is not None:
        console.warn(f"prune.dropout is ignored: task {task.name!r} builds its own model")
    model = task.build(recipe.seed)[0].eval()
    if eager:
        model.set_attn_implementation("eager")
    encoders.relabel(model, names)
    return model


def _source(recipe: Recipe) -> str:
    assert recipe.student is not None
    return recipe.model if recipe.student == PRETRAINED else recipe.student


def _order(own: list[str], names: list[str], task: Task) -> list[int]:
    """For each of the teacher's logits, the number of the student's logit that means the same label of the task."""
    order = [0] * len(names)
    for mine, its in zip(data.label_order(own, task), data.label_order(names, task), strict=True):
        order[its] = mine
    return order


def _check_positions(recipe: Recipe, mine: int | None, its: int | None) -> None:
    longest = recipe.max_length if its is None else min(recipe.max_length, its)
    if mine is not None and mine < longest:
        raise ModelError(
            f"the student has {mine} positions, and rows may have {longest} tokens",
            f"lower max_length: --set max_length={mine}",
        )


def _number(vocabulary: dict[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "unknown"
