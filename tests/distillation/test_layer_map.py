"""Layer maps: every layer of the student has one of the teacher's to learn from, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from spdtool.distillation.layer_map import check_attention_heads, check_relation_heads, map_layers, select_layers
from spdtool.distillation.outputs import ModelOutputs
from spdtool.errors import RecipeError
from spdtool.recipe.fields import Loss


@pytest.mark.parametrize(
    ("how", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 5, 12, (2, 5, 7, 10, 12)),
        ("uniform", 3, 2, (1, 1, 2)),
        ("uniform", 6, 2, (1, 1, 1, 1, 2, 2)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ((1, 1, 12), 3, 12, (1, 1, 12)),
        ([12, 1], 2, 12, (12, 1)),
    ],
)
def test_the_map(how: str | tuple[int, ...], student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert map_layers(how, student, teacher) == expected


@pytest.mark.parametrize("how", ["uniform", "last"])
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 12, 24])
def test_equal_depths_are_paired_one_to_one(how: str, depth: int) -> None:
    assert map_layers(how, depth, depth) == tuple(range(1, depth + 1))


@pytest.mark.parametrize("student", range(1, 14))
@pytest.mark.parametrize("teacher", range(1, 14))
def test_uniform_rises_and_ends_at_the_last(student: int, teacher: int) -> None:
    made = map_layers("uniform", student, teacher)
    assert list(made) == sorted(made)
    assert made[-1] == teacher
    assert made[0] >= 1
    if student <= teacher:
        assert len(set(made)) == student


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((1, 2), r"layer_map = \[1, 2\]: a student of 3 layers needs 3 numbers from 1 to 4"),
        ((1, 2, 5), r"needs 3 numbers from 1 to 4"),
        ((0, 1, 2), r"needs 3 numbers from 1 to 4"),
        ((), r"needs 3 numbers from 1 to 4"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_one_that_does(how: tuple[int, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        map_layers(how, 3, 4)
    assert "layer_map = [1, 3, 4]" in str(caught.value.hint)


def test_last_needs_a_teacher_that_is_as_deep() -> None:
    with pytest.raises(RecipeError, match="student has 5 layers and the teacher only 4"):
        map_layers("last", 5, 4)


def test_the_embeddings_output_goes_with_the_embeddings_output() -> None:
    embedded, one, two, three = states = tuple(torch.full((1, 1, 1), float(number)) for number in range(4))
    shown = select_layers(ModelOutputs(torch.zeros(1, 2), states, (one, two, three)), (3, 1))
    assert shown.hidden_states == (embedded, three, one)
    assert shown.attentions == (three, one)


def test_pieces_that_divide_no_width_are_refused_with_those_that_divide_both() -> None:
    check_relation_heads(Loss(relation=1, relation_heads=4), 32, 16)
    check_relation_heads(Loss(relation=0, relation_heads=5), 32, 16)
    with pytest.raises(RecipeError, match=r"relation_heads = 12 .* student \(312\) and teacher \(256\)") as caught:
        check_relation_heads(Loss(relation=1, relation_heads=12), 312, 256)
    assert str(caught.value.hint).endswith(": 1, 2, 4, 8")


def test_maps_of_other_heads_are_refused_and_the_way_out_is_named() -> None:
    check_attention_heads(Loss(attention=1), 4, 4)
    check_attention_heads(Loss(attention=0), 4, 2)
    with pytest.raises(RecipeError, match="student has 4 and the teacher 2") as caught:
        check_attention_heads(Loss(attention=1), 4, 2)
    assert "relation" in str(caught.value.hint)
