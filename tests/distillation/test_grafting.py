"""Grafting: fair draws that can be repeated, layers always put back, gradients only where they belong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from spdtool import encoders
from spdtool.distillation.grafting import Grafting
from spdtool.errors import ModelError


def stacks(depth: int = 3) -> tuple[nn.ModuleList, nn.ModuleList]:
    return tuple(nn.ModuleList(nn.Linear(2, 2) for _ in range(depth)) for _ in range(2))  # type: ignore[return-value]


@pytest.fixture
def models(tiny_bert: Any) -> tuple[Any, Any]:
    teacher = tiny_bert(4).requires_grad_(False)
    student = copy.deepcopy(teacher)
    encoders.trained_parameters(student, "layers")
    for model in (student, teacher):
        encoders.prime(model)
    return student, teacher


def graft(models: tuple[Any, Any], seed: int = 0, **how: Any) -> Grafting:
    student, teacher = models
    return Grafting(encoders.layer_stack(student), encoders.layer_stack(teacher), seed=seed, **how)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_each_layer_gets_its_share_of_the_draws(rate: float) -> None:
    grafting, counts, draws = Grafting(*stacks(4), seed=0), [0] * 4, 4000
    for _ in range(draws):
        with grafting.draw(rate) as own:
            for index, mine in enumerate(own):
                counts[index] += mine
    for count in counts:  # five standard deviations; 0 and 1 are exact
        assert abs(count - rate * draws) <= 5 * (rate * (1 - rate) * draws) ** 0.5


def test_layers_are_drawn_independently() -> None:
    grafting, seen = Grafting(*stacks(3), seed=0), []
    for _ in range(2000):
        with grafting.draw(0.5) as own:
            seen.append(tuple(own))
    assert len(set(seen)) == 8
    assert all(abs(seen.count(draw) - 250) < 5 * 15 for draw in set(seen))


def test_what_was_drawn_is_what_stands_in_the_list() -> None:
    student, teacher = stacks()
    mine, its = list(student), list(teacher)
    grafting = Grafting(student, teacher, seed=1)
    for _ in range(20):
        with grafting.draw(0.5) as own:
            assert [layer is m for layer, m in zip(student, mine, strict=True)] == own
            assert [layer is t for layer, t in zip(student, its, strict=True)] == [not o for o in own]
            assert grafting.drawn == own
        assert list(student) == mine
        assert list(teacher) == its


def test_the_list_is_restored_even_when_the_forward_raises() -> None:
    student, teacher = stacks()
    mine = list(student)
    grafting = Grafting(student, teacher, seed=0, stand_in_dropout=True)
    with pytest.raises(RuntimeError, match="no memory"), grafting.draw(0.0):
        raise RuntimeError("no memory")
    assert list(student) == mine
    assert not any(layer.training for layer in teacher)


def test_the_draws_depend_on_the_seed_alone_and_not_on_the_rate() -> None:
    def draws(seed: int, rates: tuple[float, ...]) -> list[list[bool]]:
        grafting = Grafting(*stacks(), seed=seed)
        seen = []
        for rate in rates:
            torch.rand(3)  # a global generator that must not matter
            with grafting.draw(rate) as own:
                seen.append(list(own))
        return seen

    assert draws(0, (0.5,) * 9) == draws(0, (0.5,) * 9) != draws(1, (0.5,) * 9)
    assert draws(0, (0.0, 1.0, 0.3, 0.5))[3] == draws(0, (0.5,) * 4)[3], "as many random numbers at every rate"


def test_the_state_goes_through_json_and_the_draws_go_on() -> None:
    grafting = Grafting(*stacks(), seed=0)
    for _ in range(5):
        with grafting.draw(0.5):
            pass
    kept = json.loads(json.dumps(grafting.state()))
    after = []
    for _ in range(20):
        with grafting.draw(0.5) as own:
            after.append(list(own))
    other = Grafting(*stacks(), seed=99)
    other.restore(kept)
    for expected in after:
        with other.draw(0.5) as own:
            assert own == expected


def test_stacks_of_different_depth_are_refused() -> None:
    with pytest.raises(ModelError, match="3 layers and the teacher 2"):
        Grafting(stacks(3)[0], stacks(2)[0], seed=0)


def test_gradients_reach_exactly_the_drawn_layers_of_the_student(models: tuple[Any, Any], toys: Any) -> None:
    student, teacher = models
    grafting, batch = graft(models), toys.batch()
    layers = list(encoders.layer_stack(student))
    seen = set()
    for _ in range(12):
        student.zero_grad()
        with grafting.draw(0.5) as own:
            loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sum()
        if True not in own:
            assert not loss.requires_grad
            continue
        loss.backward()
        seen.add(tuple(own))
        for layer, mine in zip(layers, own, strict=True):
            for name, parameter in layer.named_parameters():
                assert (parameter.grad is not None) == mine, name
        rest = [p for n, p in student.named_parameters() if not n.startswith("bert.encoder.layer.")]
        assert all(parameter.grad is None for parameter in (*teacher.parameters(), *rest))
    assert len(seen) > 5


def test_state_dict_keys_and_weights_are_the_students_before_and_after_and_the_teacher_never_changes(
    models: tuple[Any, Any], toys: Any
) -> None:
    student, teacher = models
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taught = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    grafting, batch = graft(models), toys.batch()
    for _ in range(5):
        with grafting.draw(0.3):
            assert list(student.state_dict()) == list(before), "the keys do not change even inside a draw"
            student(input_ids=batch["input_ids"])
    for kept, model in ((before, student), (taught, teacher)):
        now = model.state_dict()
        assert list(now) == list(kept)
        assert all(torch.equal(now[name], kept[name]) for name in kept)


@pytest.mark.parametrize("dropout", [False, True])
def test_stand_ins_have_dropout_only_when_asked_and_are_calm_again_afterwards(dropout: bool) -> None:
    student, teacher = stacks()
    student.train()
    teacher.eval()
    grafting = Grafting(student, teacher, seed=0, stand_in_dropout=dropout)
    for _ in range(10):
        with grafting.draw(0.5) as own:
            for layer, mine in zip(student, own, strict=True):
                assert layer.training == (mine or dropout)
        assert not any(layer.training for layer in teacher)
        assert all(layer.training for layer in student)
