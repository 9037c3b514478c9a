"""The pruner: events happen at their steps, with statistics of the steps in between."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import GateError, ModelError, PluginError, RecipeError, UnknownName
from spdtool.pruning.allocation import zeros_in
from spdtool.pruning.masks import Masks
from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.statistics import Stats
from spdtool.recipe.training import Prune

pytestmark = pytest.mark.usefixtures("clean_plugins")


def make_weights(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {"a": nn.Parameter(torch.randn(6, 5)), "b": nn.Parameter(torch.randn(4, 5))}


def make_pruner(weights: dict[str, nn.Parameter], events: list[tuple[int, float]], **settings: Any) -> Pruner:
    section = Prune(**settings)
    return Pruner(Masks.from_zeros(weights, find_pattern(section.pattern)), events, section, events[-1][1])


def test_events_happen_at_their_steps_and_at_no_others() -> None:
    weights = make_weights()
    pruner = make_pruner(weights, [(2, 0.3), (4, 0.5)])
    happened = {step: pruner.prune(step) for step in range(7)}
    assert {step: sparsity for step, sparsity in happened.items() if sparsity is not None} == {2: 0.3, 4: 0.5}
    assert [pruner.is_done(step) for step in (0, 3, 4, 5)] == [False, False, True, True]
    pruner.finalize()
    assert {name: int((weight == 0).sum()) for name, weight in weights.items()} == {"a": 15, "b": 10}


def test_without_events_the_masks_stay_as_they_are() -> None:
    weights = make_weights()
    with torch.no_grad():
        weights["a"].view(-1)[:15] = 0
        weights["b"].view(-1)[:10] = 0
    pruner = Pruner(Masks.from_zeros(weights), [], Prune(), 0.5)
    assert pruner.is_done(0)
    assert [pruner.prune(step) for step in range(3)] == [None, None, None]
    pruner.finalize()


def test_finalizing_refuses_a_count_that_was_not_reached() -> None:
    pruner = make_pruner(make_weights(), [(2, 0.3), (4, 0.5)])
    pruner.prune(2)
    with pytest.raises(GateError, match=r"a has 9 zeros of 30; sparsity 0\.5 asks for 15"):
        pruner.finalize()


def test_weights_that_became_nan_are_refused_at_the_event() -> None:
    weights = make_weights()
    pruner = make_pruner(weights, [(2, 0.5)])
    with torch.no_grad():
        weights["a"].fill_(torch.nan)
    with pytest.raises(RecipeError, match="'magnitude' must give a score for each weight of a, and 30 of 30 are not"):
        pruner.prune(2)
    with pytest.raises(GateError, match="a has 0 zeros"):
        pruner.finalize()


def test_scores_of_the_wrong_shape_or_type_are_refused() -> None:
    for score, message in (
        (lambda weight, stats: weight.abs()[:1], r"shape \(6, 5\), and gives shape \(1, 5\)"),
        (lambda weight, stats: weight.abs().flatten(), r"gives shape \(30,\)"),
        (lambda weight, stats: 1.0, "gives float"),
        (lambda weight, stats: None, "gives NoneType"),
        (lambda weight, stats: weight / 0 - weight / 0, "30 of 30 are not numbers"),
    ):
        plugins.criteria.register("wrong")(score)
        pruner = make_pruner(make_weights(), [(1, 0.5)], criterion="wrong")
        with pytest.raises(RecipeError, match=message):
            pruner.prune(1)


def test_a_plugin_that_fails_is_named_with_the_place() -> None:
    def score(weight: Tensor, stats: Stats) -> Tensor:
        return stats.nothing_of_that_kind

    plugins.criteria.register("failing")(score)
    pruner = make_pruner(make_weights(), [(1, 0.5)], criterion="failing")
    with pytest.raises(PluginError, match=r"'failing' of .* has failed: AttributeError.*test_pruner\.py, line \d+"):
        pruner.prune(1)


def register_saliency(needs: tuple[str, ...], **meta: Any) -> list[Stats]:
    observed: list[Stats] = []

    def score(weight: Tensor, stats: Stats) -> Tensor:
        observed.append(stats)
        return (weight * (stats.gradient if stats.gradient is not None else 1)).abs()

    plugins.criteria.register("saliency", needs=needs, **meta)(score)
    return observed


def test_a_criterion_sees_the_mean_over_the_steps_since_the_last_event() -> None:
    observed = register_saliency(("gradient", "gradient_squared"))
    weights = make_weights()
    pruner = make_pruner(weights, [(3, 0.3), (5, 0.5)], criterion="saliency")
    gradients: dict[str, list[Tensor]] = {"a": [], "b": []}
    for step in range(1, 6):
        for name, weight in weights.items():
            weight.grad = torch.randn_like(weight)
            gradients[name].append(weight.grad.clone())
        if step == 2:
            weights["b"].grad = None  # its layer was not in the draw
            gradients["b"][-1] = torch.zeros(4, 5)
        pruner.observe_gradients()
        pruner.zero_gradients()
        pruner.prune(step)
    first, last = observed[:2], observed[2:]
    assert len(last) == 2
    for stats, name in zip(first, ("a", "b"), strict=True):
        torch.testing.assert_close(stats.gradient, torch.stack(gradients[name][:3]).mean(0))
        torch.testing.assert_close(stats.gradient_squared, torch.stack(gradients[name][:3]).square().mean(0))
    for stats, name in zip(last, ("a", "b"), strict=True):
        torch.testing.assert_close(stats.gradient, torch.stack(gradients[name][3:]).mean(0))


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_the_dead_stay_only_if_the_criterion_says_so(dense: bool) -> None:
    register_saliency(("gradient",), dense_gradients=dense)
    weights = make_weights()
    pruner = make_pruner(weights, [(1, 0.5), (2, 0.6)], criterion="saliency")
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    pruner.observe_gradients()
    pruner.prune(1)
    pruner.zero_gradients()
    for name, weight in weights.items():
        assert weight.grad is not None
        assert bool((weight.grad[pruner.masks.dead[name]] != 0).any()) == dense
        assert bool((weight.grad[~pruner.masks.dead[name]] == 1).all())


def test_a_resumed_pruner_gives_the_same_weights() -> None:
    register_saliency(("gradient", "gradient_squared"))

    def run(stop: int | None, **settings: Any) -> dict[str, Tensor]:
        weights = make_weights()
        pruner = make_pruner(weights, [(3, 0.3), (6, 0.7)], **settings)
        for step in range(1, 7):
            for index, weight in enumerate(weights.values()):
                draw = torch.Generator().manual_seed(10 * step + index)
                weight.grad = torch.randn(weight.shape, generator=draw)
            pruner.observe_gradients()
            pruner.prune(step)
            if step == stop:
                state = {key: value.clone() for key, value in pruner.state_dict().items()}
                pruner = make_pruner(weights, [(3, 0.3), (6, 0.7)], **settings)
                pruner.load_state_dict(state)
        return {name: weight.detach().clone() for name, weight in weights.items()}

    for criterion, regrowth in itertools.product(("saliency", "movement", "movement-soft", "obert"), (False, True)):
        expected = run(None, criterion=criterion, regrowth=regrowth)
        for stop in (1, 2, 3, 4, 5):
            for name, weight in run(stop, criterion=criterion, regrowth=regrowth).items():
                assert torch.equal(weight, expected[name]), (criterion, regrowth, stop, name)


def test_unknown_names_and_needs_are_refused() -> None:
    with pytest.raises(UnknownName, match="criterion 'magnitud'"):
        make_pruner(make_weights(), [(1, 0.5)], criterion="magnitud")
    register_saliency(("hessian",))
    with pytest.raises(RecipeError, match="needs hessian, which is not observed"):
        make_pruner(make_weights(), [(1, 0.5)], criterion="saliency")


@pytest.mark.parametrize("need", ["gradient", "input_norm"])
def test_an_event_before_anything_was_observed_is_refused(need: str) -> None:
    register_saliency((need,))
    pruner = make_pruner(make_weights(), [(0, 0.3), (4, 0.5)], criterion="saliency")
    with pytest.raises(RecipeError, match="'saliency' has observed nothing before the prune event at step 0"):
        pruner.prune(0)
    assert make_pruner(make_weights(), [(0, 0.3), (4, 0.5)]).prune(0) == 0.3  # the magnitude is there at once


def test_a_first_event_may_follow_a_calibration() -> None:
    weights = make_weights()
    pruner = make_pruner(weights, [(0, 0.3), (4, 0.5)], criterion="taylor")
    assert pruner.reads_gradients
    assert not pruner.reads_inputs
    backward(weights, 1)
    pruner.observe_gradients()
    pruner.reset_statistics()
    for seed in (2, 3):
        backward(weights, seed)
        pruner.observe_gradients()
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    mean = {name: sum(noise(weight, seed) for seed in (2, 3)) / 2 for name, weight in weights.items()}
    assert [step for step in range(6) if pruner.is_due(step)] == [0, 4]
    assert pruner.prune(0) == 0.3
    for name, weight in weights.items():
        score = (first[name] * mean[name]).abs().flatten()
        expected = sorted(score.argsort()[: round(0.3 * score.numel())].tolist())
        assert (weight == 0).flatten().nonzero().flatten().tolist() == expected


def noise(weight: Tensor, seed: int) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * seed + len(weight)))


def backward(weights: dict[str, nn.Parameter], seed: int) -> None:
    for weight in weights.values():
        weight.grad = noise(weight, seed)


def test_learned_scores_count_every_step_and_the_first_event_goes_by_magnitude() -> None:
    weights = make_weights()
    pruner = make_pruner(weights, [(0, 0.2), (2, 0.4), (4, 0.6)], criterion="movement", regrowth=True)
    assert pruner.learns
    magnitude = {name: weight.detach().abs().flatten() for name, weight in weights.items()}
    pruner.prune(0)
    for name, weight in weights.items():
        expected = sorted(magnitude[name].argsort()[: zeros_in(weight.numel(), 0.2)].tolist())
        assert (weight == 0).flatten().nonzero().flatten().tolist() == expected
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 5):
        backward(weights, step)
        for name, weight in weights.items():
            scores[name] -= pruner.masks.build_full_weight(name) * noise(weight, step)
        pruner.observe_gradients()
        pruner.prune(step)
        if pruner.is_due(step):
            for name, weight in weights.items():
                count = zeros_in(weight.numel(), pruner.events[step])
                expected = sorted(scores[name].flatten().argsort()[:count].tolist())
                assert (weight == 0).flatten().nonzero().flatten().tolist() == expected


def test_with_regrowth_the_last_event_alone_decides_the_mask() -> None:
    """Without training in between, the pruner can only use the stored values of dead weights."""
    single_event_weights, repeated_event_weights = make_weights(), make_weights()
    signs = iter((-1, -1, -1, -1, 1, 1))  # of both weights at three events

    @plugins.criteria.register("turning")
    def alternating_sign(weight: Tensor, stats: Stats) -> Tensor:
        return next(signs) * weight.abs()

    single_event_pruner = make_pruner(single_event_weights, [(3, 0.5)])
    repeated_event_pruner = make_pruner(
        repeated_event_weights, [(1, 0.5), (2, 0.5), (3, 0.5)], criterion="turning", regrowth=True
    )
    single_event_pruner.prune(3)
    for step in (1, 2, 3):
        repeated_event_pruner.prune(step)
    repeated_event_pruner.finalize()
    assert all(torch.equal(single_event_weights[name], repeated_event_weights[name]) for name in single_event_weights)


def test_zeros_displaced_by_a_floor_are_reported() -> None:
    weights = make_weights()
    with torch.no_grad():
        weights["b"].mul_(1e-3)
    pruner = make_pruner(weights, [(1, 0.5), (2, 0.9)], scope="global", least=0.25)
    pruner.prune(1)
    assert pruner.clamped == {"b": (20, 15)}
    assert pruner.lowered == {}
    pruner.prune(2)
    assert pruner.lowered == {"all matrices": pytest.approx(0.1)}
    pruner.finalize()


def test_a_pruner_without_events_observes_nothing() -> None:
    weights = make_weights()
    pruner = Pruner(Masks(weights), [], Prune(criterion="obert", regrowth=True), 0.0)
    assert not any((pruner.reads_gradients, pruner.reads_inputs, pruner.learns, pruner.is_due(0)))
    backward(weights, 1)
    pruner.observe_gradients()
    assert set(pruner.state_dict()) == {"dead.a", "dead.b"}


def test_a_checkpoint_that_is_too_sparse_is_refused_before_the_work() -> None:
    weights = make_weights()
    with torch.no_grad():
        weights["a"].view(-1)[:20] = 0
    with pytest.raises(ModelError, match="a has 20 zeros of 30 already"):
        make_pruner(weights, [(4, 0.5)])
