"""Grafting: reproducible draws at the given rate, restored layer stacks, gradients of the student only."""

from __future__ import annotations

import copy
import itertools
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from toys import ARCHITECTURES

from spdtool.distillation.grafting import LayerBlend, LayerDraw, create_mixing, replacing_rate
from spdtool.distillation.outputs import compute_outputs
from spdtool.errors import ModelError, UnknownName
from spdtool.models.layers import (
    configure_layers,
    find_layer_stack,
    find_prunable_weights,
    install_capture_hooks,
    select_trained_parameters,
)
from spdtool.recipe.training import Grafting


def stacks(depth: int = 3) -> tuple[nn.ModuleList, nn.ModuleList]:
    return tuple(nn.ModuleList(nn.Linear(2, 2) for _ in range(depth)) for _ in range(2))  # type: ignore[return-value]


@pytest.fixture
def models(tiny_bert: Any) -> tuple[Any, Any]:
    teacher = tiny_bert(4).requires_grad_(False)
    student = copy.deepcopy(teacher)
    select_trained_parameters(student, "layers")
    for model in (student, teacher):
        install_capture_hooks(model)
    return student, teacher


def graft(models: tuple[Any, Any], seed: int = 0, **options: Any) -> LayerDraw:
    student, teacher = models
    return LayerDraw(find_layer_stack(student), find_layer_stack(teacher), seed=seed, **options)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_each_layer_is_drawn_at_the_replacing_rate(rate: float) -> None:
    grafting, counts, draws = LayerDraw(*stacks(4), seed=0), [0] * 4, 4000
    for _ in range(draws):
        with grafting.mix(rate) as drawn:
            for index, is_student in enumerate(drawn):
                counts[index] += is_student
    for count in counts:  # five standard deviations; 0 and 1 are exact
        assert abs(count - rate * draws) <= 5 * (rate * (1 - rate) * draws) ** 0.5


def test_layers_are_drawn_independently() -> None:
    grafting, samples = LayerDraw(*stacks(3), seed=0), []
    for _ in range(2000):
        with grafting.mix(0.5) as drawn:
            samples.append(tuple(drawn))
    assert len(set(samples)) == 8
    assert all(abs(samples.count(draw) - 250) < 5 * 15 for draw in set(samples))


def test_the_drawn_layers_stand_in_the_layer_stack() -> None:
    student, teacher = stacks()
    student_layers, teacher_layers = list(student), list(teacher)
    grafting = LayerDraw(student, teacher, seed=1)
    for _ in range(20):
        with grafting.mix(0.5) as drawn:
            assert [layer is m for layer, m in zip(student, student_layers, strict=True)] == drawn
            assert [layer is t for layer, t in zip(student, teacher_layers, strict=True)] == [not o for o in drawn]
            assert grafting.drawn == drawn
        assert list(student) == student_layers
        assert list(teacher) == teacher_layers


def test_the_list_is_restored_even_when_the_forward_raises() -> None:
    student, teacher = stacks()
    student_layers = list(student)
    grafting = LayerDraw(student, teacher, seed=0, stand_in_dropout=True)
    with pytest.raises(RuntimeError, match="no memory"), grafting.mix(0.0):
        raise RuntimeError("no memory")
    assert list(student) == student_layers
    assert not any(layer.training for layer in teacher)


def test_the_draws_depend_on_the_seed_alone_and_not_on_the_rate() -> None:
    def draws(seed: int, rates: tuple[float, ...]) -> list[list[bool]]:
        grafting = LayerDraw(*stacks(), seed=seed)
        samples = []
        for rate in rates:
            torch.rand(3)  # advances the global generator, which must not matter
            with grafting.mix(rate) as drawn:
                samples.append(list(drawn))
        return samples

    assert draws(0, (0.5,) * 9) == draws(0, (0.5,) * 9) != draws(1, (0.5,) * 9)
    assert draws(0, (0.0, 1.0, 0.3, 0.5))[3] == draws(0, (0.5,) * 4)[3], "as many random numbers at every rate"


def test_draws_resume_from_a_state_saved_as_json() -> None:
    grafting = LayerDraw(*stacks(), seed=0)
    for _ in range(5):
        with grafting.mix(0.5):
            pass
    state = json.loads(json.dumps(grafting.state_dict()))
    after = []
    for _ in range(20):
        with grafting.mix(0.5) as drawn:
            after.append(list(drawn))
    restored = LayerDraw(*stacks(), seed=99)
    restored.load_state_dict(state)
    for expected in after:
        with restored.mix(0.5) as drawn:
            assert drawn == expected


def test_stacks_of_different_depth_are_refused() -> None:
    with pytest.raises(ModelError, match="3 layers and the teacher 2"):
        LayerDraw(stacks(3)[0], stacks(2)[0], seed=0)


def test_gradients_reach_exactly_the_drawn_layers_of_the_student(models: tuple[Any, Any], toys: ModuleType) -> None:
    student, teacher = models
    grafting, batch = graft(models), toys.batch()
    layers = list(find_layer_stack(student))
    samples = set()
    for _ in range(12):
        student.zero_grad()
        with grafting.mix(0.5) as drawn:
            loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sum()
        if True not in drawn:
            assert not loss.requires_grad
            continue
        loss.backward()
        samples.add(tuple(drawn))
        for layer, is_student in zip(layers, drawn, strict=True):
            for name, parameter in layer.named_parameters():
                assert (parameter.grad is not None) == is_student, name
        other_parameters = [p for n, p in student.named_parameters() if not n.startswith("bert.encoder.layer.")]
        assert all(parameter.grad is None for parameter in (*teacher.parameters(), *other_parameters))
    assert len(samples) > 5


def test_mixing_changes_neither_state_dict_of_student_nor_teacher(models: tuple[Any, Any], toys: ModuleType) -> None:
    student, teacher = models
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher_before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    grafting, batch = graft(models), toys.batch()
    for _ in range(5):
        with grafting.mix(0.3):
            assert list(student.state_dict()) == list(before), "the keys do not change even inside a draw"
            student(input_ids=batch["input_ids"])
    for expected, model in ((before, student), (teacher_before, teacher)):
        actual = model.state_dict()
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dropout", [False, True])
def test_teacher_layers_have_dropout_only_if_requested_and_only_inside_a_draw(dropout: bool) -> None:
    student, teacher = stacks()
    student.train()
    teacher.eval()
    grafting = LayerDraw(student, teacher, seed=0, stand_in_dropout=dropout)
    for _ in range(10):
        with grafting.mix(0.5) as drawn:
            for layer, is_student in zip(student, drawn, strict=True):
                assert layer.training == (is_student or dropout)
        assert not any(layer.training for layer in teacher)
        assert all(layer.training for layer in student)


each_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def blended(toys: ModuleType, architecture: str, seed: int = 1) -> tuple[Any, Any, LayerBlend, dict[str, Any]]:
    """Return a student, a teacher that differs only in its layers, their blend, and a batch."""
    teacher = toys.classifier(architecture).requires_grad_(False)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in find_prunable_weights(student).values():
            weight.mul_(0.7)
    select_trained_parameters(student, "layers")
    for model in (student, teacher):
        install_capture_hooks(model)
    blend = LayerBlend(find_layer_stack(student), find_layer_stack(teacher))
    batch = toys.batch(architecture=architecture)
    return student, teacher, blend, {name: column for name, column in batch.items() if name != "labels"}


@each_architecture
def test_a_blend_at_one_is_the_student_and_at_zero_the_teacher_to_the_bit(toys: ModuleType, architecture: str) -> None:
    student, teacher, blend, batch = blended(toys, architecture)
    with torch.no_grad():
        student_logits, teacher_logits = student(**batch).logits, teacher(**batch).logits
        assert not torch.equal(student_logits, teacher_logits)
        with blend.mix(1.0):
            assert torch.equal(student(**batch).logits, student_logits)
        with blend.mix(0.0):
            assert torch.equal(student(**batch).logits, teacher_logits)
        with blend.mix(0.5):
            blended_logits = student(**batch).logits
    assert not torch.equal(blended_logits, student_logits)
    assert not torch.equal(blended_logits, teacher_logits)


@each_architecture
def test_every_blended_layer_outputs_the_mixture_of_both_layers(toys: ModuleType, architecture: str) -> None:
    """Check each layer on its real inputs, and against the captured hidden states."""
    student, teacher, blend, batch = blended(toys, architecture)
    layer_calls: list[Any] = []

    def note(_: Any, args: Any, options: Any, out: Any) -> None:
        layer_calls.append((args, options, out))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in find_layer_stack(student)]
    with torch.no_grad(), blend.mix(0.3):
        outputs = student(**batch, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    depth = len(layer_calls)
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (depth + 1, depth)
    equal_states = 0
    for index, (args, options, out) in enumerate(layer_calls):
        with torch.no_grad():
            student_output, teacher_output = (find_layer_stack(m)[index](*args, **options) for m in (student, teacher))
        student_output, teacher_output, out = (
            result[0] if isinstance(result, tuple) else result for result in (student_output, teacher_output, out)
        )
        torch.testing.assert_close(out, 0.3 * student_output + 0.7 * teacher_output)
        assert not torch.equal(student_output, teacher_output)
        equal_states += torch.equal(outputs.hidden_states[index + 1], out)
    assert equal_states >= depth - 1, "the last one may have been normalised"


@each_architecture
def test_a_blend_captures_the_states_and_maps_of_the_student_only(toys: ModuleType, architecture: str) -> None:
    student, teacher, blend, batch = blended(toys, architecture)
    depth = len(find_layer_stack(student))
    for attention in ("scores", "probabilities"):
        with blend.mix(0.4):
            blend_outputs = compute_outputs(student, batch, hidden_states=True, attention=attention)
        assert blend_outputs.hidden_states is not None
        assert blend_outputs.attentions is not None
        assert (len(blend_outputs.hidden_states), len(blend_outputs.attentions)) == (depth + 1, depth)
        assert all(attention_map.requires_grad for attention_map in blend_outputs.attentions), (
            "those of the layers that are trained"
        )
    with torch.no_grad():
        assert len(teacher(**batch, output_hidden_states=True).hidden_states) == depth + 1
        student_outputs = compute_outputs(student, batch, hidden_states=True, attention="scores")
        assert student_outputs.attentions is not None
        assert len(student_outputs.attentions) == depth


@each_architecture
def test_gradients_of_a_blend_reach_only_the_student(toys: ModuleType, architecture: str) -> None:
    student, teacher, blend, batch = blended(toys, architecture)
    with blend.mix(0.5):
        loss = student(**batch).logits.square().sum()
    loss.backward()
    through_both = {name: weight.grad.clone() for name, weight in find_prunable_weights(student).items()}
    assert all(bool((gradient != 0).any()) for gradient in through_both.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    name = next(iter(through_both))
    weight, step = find_prunable_weights(student)[name], 1e-3
    row, column = divmod(int(through_both[name].abs().argmax()), weight.shape[1])
    ends = []
    for change in (step, -2 * step):  # the derivative by finite differences
        with torch.no_grad():
            weight[row, column] += change
            with blend.mix(0.5):
                ends.append(float(student(**batch).logits.double().square().sum()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(through_both[name][row, column]), rel=0.05)


@each_architecture
def test_a_blend_leaves_the_model_as_it_was(toys: ModuleType, architecture: str) -> None:
    student, teacher, blend, batch = blended(toys, architecture)
    modules = {name: id(module) for name, module in student.named_modules()}
    keys = list(student.state_dict())
    with pytest.raises(RuntimeError, match="no memory"), blend.mix(0.5):
        assert {name: id(module) for name, module in student.named_modules()} == modules
        student(**batch)
        raise RuntimeError("no memory")
    assert list(student.state_dict()) == keys
    assert all("forward" not in vars(layer) for layer in find_layer_stack(student))
    shared = {id(parameter) for parameter in teacher.parameters()}
    assert all(
        id(parameter) in shared for teacher_layer in blend.teacher_layers for parameter in teacher_layer.parameters()
    ), "no copy"


def test_a_blend_of_gradient_checkpoints_has_the_same_gradients(toys: ModuleType) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        student, _, blend, batch = blended(toys, "bert")
        configure_layers(student, checkpointing=checkpointing, compile_layers=False)
        student.train()
        with blend.mix(0.6):
            loss = student(**batch).logits.square().sum()
        loss.backward()
        return {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_teacher_layers_of_a_blend_have_dropout_only_if_requested(dropout: bool) -> None:
    student, teacher = stacks()
    blend = create_mixing("blend", student, teacher, seed=0, stand_in_dropout=dropout)
    assert isinstance(blend, LayerBlend)
    with blend.mix(0.5):
        assert {layer.training for layer in blend.teacher_layers} == {dropout}
    assert not any(layer.training for layer in blend.teacher_layers)


def test_create_mixing_follows_the_kind_and_a_blend_has_an_empty_state() -> None:
    assert isinstance(create_mixing("bernoulli", *stacks(), seed=0, stand_in_dropout=False), LayerDraw)
    blend = create_mixing("blend", *stacks(), seed=0, stand_in_dropout=False)
    blend.load_state_dict(json.loads(json.dumps(blend.state_dict())))
    with pytest.raises(ModelError, match="3 layers and the teacher 2"):
        create_mixing("blend", stacks(3)[0], stacks(2)[0], seed=0, stand_in_dropout=False)


def test_replacing_rates_follow_the_published_schedules() -> None:
    with_gap = {"schedule": "constant-then-linear-with-gap", "hold": 0.5, "rise": 0.5}
    cases: list[tuple[dict[str, Any], list[float]]] = [  # rates at progress 0, 0.25, 0.5, 0.75 and 1
        ({"schedule": "constant", "start": 0.8}, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"schedule": "constant-then-one", "start": 0.8, "hold": 0.5}, [0.8, 0.8, 1, 1, 1]),
        ({"schedule": "constant-then-one", "start": 0.8}, [1, 1, 1, 1, 1]),
        ({"schedule": "linear", "start": 0.6}, [0.6, 0.7, 0.8, 0.9, 1]),
        ({"schedule": "linear", "start": 0.6, "rise": 0.5}, [0.6, 0.8, 1, 1, 1]),
        ({"schedule": "linear", "start": 0.6, "rise": 0.0}, [1, 1, 1, 1, 1]),
        ({"schedule": "constant-then-linear", "start": 0.6, "hold": 0.5, "rise": 0.5}, [0.6, 0.6, 0.6, 0.8, 1]),
        ({"schedule": "constant-then-linear", "start": 0.6, "hold": 0.5, "rise": 0.0}, [0.6, 0.6, 1, 1, 1]),
        (with_gap | {"start": 0.8, "base": 0.4}, [0.8, 0.8, 0.4, 0.7, 1]),
        (with_gap | {"start": 0.6}, [0.6, 0.6, 0.6, 0.8, 1]),
    ]
    for fields, expected in cases:
        rate = replacing_rate(Grafting(**fields))
        assert [rate(progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected), fields


def test_grafting_is_enabled_where_some_replacing_rate_is_below_one() -> None:
    schedules = ("constant", "constant-then-one", "linear", "constant-then-linear", "constant-then-linear-with-gap")
    for schedule, start, hold, base, rise in itertools.product(
        schedules, (0.5, 1.0), (0.0, 0.5, 1.0), (None, 0.5, 1.0), (0.0, 0.25)
    ):
        section = Grafting(schedule=schedule, start=start, hold=hold, base=base, rise=rise)
        lowest = min(replacing_rate(section)(step / 100) for step in range(100))
        assert section.enabled == (lowest < 1), section


def test_an_unknown_replacing_rate_offers_near_matches() -> None:
    with pytest.raises(UnknownName, match="replacing-rate schedule 'liner'") as error:
        replacing_rate(Grafting(schedule="liner"))
    assert "linear" in error.value.near
