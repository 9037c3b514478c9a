"""What the student starts from, and whether it and its teacher read text alike.

A student is a copy of its teacher, or of some layers of it, or another encoder of any depth and
width with the same vocabulary (`recipe.student`). A student that does not fit is refused by its
configuration alone, before hours are spent on a teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import console
from spdtool.errors import ModelError, RecipeError
from spdtool.models.layers import find_layer_stack, max_positions, model_shape
from spdtool.models.load import (
    build_empty_model,
    load_model,
    load_tokenizer,
    read_head_labels,
    relabel,
)
from spdtool.models.predict import Forward
from spdtool.recipe.fields import Recipe
from spdtool.tasks.task import Task

PRETRAINED = "pretrained"
# case, accents, punctuation, digits: what tokenizers of one vocabulary may treat differently
PROBE = ("The naïve CAFÉ-owner's 2nd dog, isn't it?", "It's 10,000 km away…")


def build_empty_student(recipe: Recipe, task: Task, teacher: PreTrainedModel) -> PreTrainedModel:
    """Build the student without its weights; `teacher` itself where all of it is copied.

    Raises:
        ModelError: its configuration cannot be read.
    """
    if recipe.student is None:
        return copy_teacher(recipe, teacher)
    if recipe.student == PRETRAINED and task.dataset.build is not None:
        model: PreTrainedModel = task.dataset.build(recipe.seed)[0]
        return model
    return build_empty_model(_student_source(recipe), head=task.head, smoke=recipe.smoke)


def copy_teacher(recipe: Recipe, teacher: PreTrainedModel) -> PreTrainedModel:
    """Return the teacher as the student, with the layers of `prune.layers` alone where the recipe names them.

    Raises:
        RecipeError: the teacher has no such layers.
        ModelError: the family cannot be built with these layers.
    """
    if not recipe.prune.layers:
        return teacher
    return keep_layers(teacher, choose_layers(recipe.prune.layers, model_shape(teacher).layers))


def check_positions(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a student that has fewer positions than the rows can have tokens.

    Args:
        student, teacher: models, empty or not.

    Raises:
        ModelError: says how many it has, and which `max_length` fits.
    """
    if recipe.student is None:
        return
    # Rows are cut to the teacher's positions anyway.
    longest = min(recipe.max_length, max_positions(teacher) or recipe.max_length)
    positions = max_positions(student)
    if positions is not None and positions < longest:
        raise ModelError(
            f"the student has {positions} positions, and rows may have {longest} tokens",
            f"lower max_length: --set max_length={positions}",
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a student that reads text otherwise than its teacher.

    Raises:
        ModelError: says which token, or what became of a sentence.
    """
    hint = "give a student whose tokenizer is the teacher's: what they compare is token by token"
    of_student, of_teacher = student.get_vocab(), teacher.get_vocab()
    # By number and not by size: two vocabularies of one size may number their tokens otherwise.
    tokens = of_student.keys() | of_teacher.keys()
    different = sorted(token for token in tokens if of_student.get(token) != of_teacher.get(token))
    if different:
        token = different[0]
        here, there = _describe_token(of_student, token), _describe_token(of_teacher, token)
        raise ModelError(
            "the student's tokenizer has another vocabulary than the teacher's: "
            f"{len(of_student)} and {len(of_teacher)} tokens; "
            f"{token!r} is {here} here and {there} there",
            hint,
        )
    # equal vocabularies are not enough: one may lower the case, strip accents or split words otherwise
    student_text = " ".join(student.convert_ids_to_tokens(student(*PROBE)["input_ids"]))
    teacher_text = " ".join(teacher.convert_ids_to_tokens(teacher(*PROBE)["input_ids"]))
    if student_text != teacher_text:
        raise ModelError(
            f"the student's tokenizer cuts text otherwise than the teacher's: {student_text!r} here and "
            f"{teacher_text!r} there",
            hint,
        )


def load_student_tokenizer(recipe: Recipe, task: Task) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe's student; raises ModelError where there is none."""
    if recipe.student == PRETRAINED and task.dataset.build is not None:
        tokenizer: PreTrainedTokenizerBase = task.dataset.build(recipe.seed)[1]
        return tokenizer
    return load_tokenizer(_student_source(recipe))


def load_student(recipe: Recipe, task: Task, names: list[str], *, eager: bool) -> PreTrainedModel:
    """Load the model that the student starts from, in eval mode, with the teacher's labels.

    A classifier of the task keeps its head, whose logits are put into the teacher's order.
    Anything else gets a new head, which depends on the seed alone.

    Args:
        names: the teacher's label names, in the order of its logits.
        eager: as in `load_model`.

    Raises:
        ModelError: it cannot be read.
        RecipeError: its head is new, and `prune.train` would leave it as it is.
    """
    head_labels = read_student_labels(recipe, task)
    torch.manual_seed(recipe.seed)  # of the new head
    if recipe.student == PRETRAINED and task.dataset.build is not None:
        if recipe.prune.dropout is not None:
            console.warn(f"prune.dropout is ignored: task {task.name!r} builds its own model")
        model: PreTrainedModel = task.dataset.build(recipe.seed)[0]
        model.eval()  # type: ignore[no-untyped-call]
        if eager:
            model.set_attn_implementation("eager")
        relabel(model, names)
        return model
    order, new_labels = None, None
    if head_labels is not None:
        order = match_labels(head_labels, names, task)
    else:
        new_labels = names
    dropout = recipe.prune.dropout
    model = load_model(
        _student_source(recipe),
        labels=new_labels,
        head=task.head,
        problem_type=task.problem_type,
        dropout=dropout,
        eager=eager,
        smoke=recipe.smoke,
    )
    relabel(model, names, order)
    # The student's own may be of another task, and transformers would compute another loss by it.
    model.config.problem_type = task.problem_type
    return model


def read_student_labels(recipe: Recipe, task: Task) -> list[str] | None:
    """Read the labels of the student's head; None where it gets a new one.

    Raises:
        ModelError: its configuration cannot be read.
        RecipeError: its head is new, and `prune.train` would leave it as it is.
    """
    labels = None if recipe.student == PRETRAINED else read_head_labels(_student_source(recipe), task.head)
    if labels is not None:
        try:
            task.label_order(labels)
        except ModelError as error:
            console.warn(f"the student {recipe.student} gets a new head: {error.message}")
            labels = None
    # Told now: a random head would pass the first phase and spoil every score.
    if labels is None and recipe.prune.train == "layers":
        raise RecipeError(
            f"the student {recipe.student} gets a new head, and prune.train = 'layers' would leave it random",
            "set prune.train to all or layers+head",
        )
    return labels


def match_labels(student: list[str], teacher: list[str], task: Task) -> list[int]:
    """For each of the teacher's logits, find the student's logit for the same label.

    Args:
        student, teacher: label names in the order of each model's logits.
    """
    order = [0] * len(teacher)
    for from_student, from_teacher in zip(task.label_order(student), task.label_order(teacher), strict=True):
        order[from_teacher] = from_student
    return order


def same_architecture(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether layers of one can stand in for those of the other: same family, depth and width."""
    if student.config.model_type != teacher.config.model_type:
        return False
    shape, of_teacher = model_shape(student), model_shape(teacher)
    return (shape.layers, shape.width) == (of_teacher.layers, of_teacher.width)


def unread_columns(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Columns that a model with this tokenizer does not take."""
    return {"token_type_ids"} - set(tokenizer.model_input_names)


def choose_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Choose the tokenizer that makes the columns of both models."""
    # a BERT reads token types, a DistilBERT that was made of it does not
    return teacher if unread_columns(student) - unread_columns(teacher) else student


def drop_unread_columns(forward: Forward, tokenizer: PreTrainedTokenizerBase) -> Forward:
    """Wrap a model's `forward` to accept batches with columns that it does not take.

    Args:
        tokenizer: the model's.
    """
    unread = unread_columns(tokenizer)
    return lambda batch: forward({name: column for name, column in batch.items() if name not in unread})


def _student_source(recipe: Recipe) -> str:
    assert recipe.student is not None
    return recipe.model if recipe.student == PRETRAINED else recipe.student


def _describe_token(vocabulary: dict[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "unknown"


def choose_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Turn `prune.layers` into layers of a teacher of `depth`, counted from 1; one number: so many, spread evenly.

    Raises:
        RecipeError: they do not exist, or are not in rising order.
    """
    if len(layers) == 1 and 1 <= layers[0] <= depth:
        count = layers[0]
        # as distillation.layer_map pairs them, so that each layer learns from the one that it was
        return [max(1, round(layer * depth / count)) for layer in range(1, count + 1)]
    if sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] <= depth:
        raise RecipeError(
            f"prune.layers = {list(layers)}: the teacher has the layers 1 to {depth}",
            f"give some of them in rising order, or one number up to {depth}: so many are spread evenly",
        )
    return list(layers)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Build the same model with some of its layers, counted from 1; everything else is the same.

    A model without weights gives one without.

    Raises:
        ModelError: the family cannot be built with these layers.
    """
    stack = find_layer_stack(model)
    numbers = [layer - 1 for layer in layers]
    config = copy.deepcopy(model.config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(stack):  # one entry for each layer
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    device = next(model.parameters()).device
    # the new weights are drawn only to be replaced: no draw of the training may shift
    with torch.random.fork_rng(devices=[]), torch.device(device):
        shallow = type(model)(config)
    if device.type != "meta":
        weights = _select_layers(model, stack, numbers)
        missing, unexpected = shallow.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ModelError(
                f"{config.model_type!r} cannot be built of the layers {list(layers)}: "
                f"{', '.join([*missing, *unexpected][:3])} has no counterpart",
                "keep the first layer: in some families it differs from the others",
            )
    shallow.train(model.training)
    return shallow


def _select_layers(model: PreTrainedModel, stack: nn.ModuleList, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the state dict with the layers `numbers` alone, renumbered."""
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    selected = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            selected[name] = weight
            continue
        number, _, parameter = name.removeprefix(prefix).partition(".")
        if int(number) in numbers:
            selected[f"{prefix}{numbers.index(int(number))}.{parameter}"] = weight
    return selected
