"""Layer maps pair each student layer with a teacher layer; maps that do not fit are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from spdtool.distillation.layer_map import check_attention_heads, check_relation_heads, map_layers, select_layers
from spdtool.distillation.outputs import ModelOutputs
from spdtool.errors import RecipeError
from spdtool.recipe.training import Loss


def test_layer_maps_are_uniform_last_or_listed() -> None:
    cases = [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 5, 12, (2, 5, 7, 10, 12)),
        ("uniform", 3, 2, (1, 1, 2)),
        ("uniform", 6, 2, (1, 1, 1, 1, 2, 2)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ((1, 1, 12), 3, 12, (1, 1, 12)),
        ([12, 1], 2, 12, (12, 1)),
    ]
    for layer_map, student, teacher, expected in cases:
        assert map_layers(layer_map, student, teacher) == expected, (layer_map, student, teacher)


def test_equal_depths_are_paired_one_to_one() -> None:
    for depth in (1, 2, 3, 7, 12, 24):
        for layer_map in ("uniform", "last"):
            assert map_layers(layer_map, depth, depth) == tuple(range(1, depth + 1)), (layer_map, depth)


def test_a_uniform_map_rises_and_ends_at_the_last_layer() -> None:
    for student, teacher in itertools.product(range(1, 14), range(1, 14)):
        case = f"{student} layers learn from {teacher}"
        layers = map_layers("uniform", student, teacher)
        assert list(layers) == sorted(layers), case
        assert layers[-1] == teacher, case
        assert layers[0] >= 1, case
        if student <= teacher:
            assert len(set(layers)) == student, case


def test_a_list_that_does_not_fit_is_refused_with_an_example() -> None:
    cases = {
        (1, 2): r"layer_map = \[1, 2\]: a student of 3 layers needs 3 numbers from 1 to 4",
        (1, 2, 5): r"needs 3 numbers from 1 to 4",
        (0, 1, 2): r"needs 3 numbers from 1 to 4",
        (): r"needs 3 numbers from 1 to 4",
    }
    for layer_map, message in cases.items():
        with pytest.raises(RecipeError, match=message) as error:
            map_layers(layer_map, 3, 4)
        assert "layer_map = [1, 3, 4]" in str(error.value.hint), layer_map


def test_the_map_last_needs_a_teacher_at_least_as_deep() -> None:
    with pytest.raises(RecipeError, match="student has 5 layers and the teacher only 4"):
        map_layers("last", 5, 4)


def test_the_embedding_output_is_always_selected_first() -> None:
    embedded, first, second, third = states = tuple(torch.full((1, 1, 1), float(number)) for number in range(4))
    selected = select_layers(ModelOutputs(torch.zeros(1, 2), states, (first, second, third)), (3, 1))
    assert selected.hidden_states == (embedded, third, first)
    assert selected.attentions == (third, first)


def test_relation_heads_must_divide_both_widths() -> None:
    check_relation_heads(Loss(relation=1, relation_heads=4), 32, 16)
    check_relation_heads(Loss(relation=0, relation_heads=5), 32, 16)
    with pytest.raises(RecipeError, match=r"relation_heads = 12 .* student \(312\) and teacher \(256\)") as error:
        check_relation_heads(Loss(relation=1, relation_heads=12), 312, 256)
    assert str(error.value.hint).endswith(": 1, 2, 4, 8")


def test_a_different_number_of_heads_is_refused_with_advice() -> None:
    check_attention_heads(Loss(attention=1), 4, 4)
    check_attention_heads(Loss(attention=0), 4, 2)
    with pytest.raises(RecipeError, match="student has 4 and the teacher 2") as error:
        check_attention_heads(Loss(attention=1), 4, 2)
    assert "relation" in str(error.value.hint)
