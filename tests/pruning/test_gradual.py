"""The pruner: events at their steps, and what a criterion observed in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import GateError, ModelError, RecipeError, UnknownName
from spdtool.pruning.criteria import Stats
from spdtool.pruning.gradual import Pruner
from spdtool.pruning.masks import Masks

pytestmark = pytest.mark.usefixtures("clean_plugins")


def held(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {"a": nn.Parameter(torch.randn(6, 5)), "b": nn.Parameter(torch.randn(4, 5))}


def pruner_of(weights: dict[str, nn.Parameter], events: list[tuple[int, float]], **how: Any) -> Pruner:
    options = {"target": events[-1][1], "criterion": "magnitude", "pattern": "unstructured", "scope": "matrix"} | how
    return Pruner(Masks.from_zeros(weights), events, **options)


def test_events_happen_at_their_steps_and_at_no_others() -> None:
    weights = held()
    pruner = pruner_of(weights, [(2, 0.3), (4, 0.5)])
    happened = {step: pruner.step(step) for step in range(7)}
    assert {step: sparsity for step, sparsity in happened.items() if sparsity is not None} == {2: 0.3, 4: 0.5}
    assert [pruner.reached(step) for step in (0, 3, 4, 5)] == [False, False, True, True]
    pruner.seal()
    assert {name: int((weight == 0).sum()) for name, weight in weights.items()} == {"a": 15, "b": 10}


def test_without_events_the_masks_are_only_held() -> None:
    weights = held()
    with torch.no_grad():
        weights["a"].view(-1)[:15] = 0
        weights["b"].view(-1)[:10] = 0
    pruner = pruner_of(weights, [(0, 0.5)])
    pruner = Pruner(pruner.masks, [], target=0.5, criterion="magnitude", pattern="unstructured", scope="matrix")
    assert pruner.reached(0)
    assert [pruner.step(step) for step in range(3)] == [None, None, None]
    pruner.seal()


def test_the_seal_refuses_a_count_that_was_not_reached() -> None:
    pruner = pruner_of(held(), [(2, 0.3), (4, 0.5)])
    pruner.step(2)
    with pytest.raises(GateError, match=r"a has 9 zeros of 30; sparsity 0\.5 asks for 15"):
        pruner.seal()


def test_weights_that_became_nan_are_not_handed_over() -> None:
    weights = held()
    pruner = pruner_of(weights, [(2, 0.5)])
    with torch.no_grad():
        weights["a"].fill_(torch.nan)
    pruner.step(2)
    with pytest.raises(GateError, match="a has 0 zeros"):
        pruner.seal()


def saliency(needs: tuple[str, ...], **meta: Any) -> list[Stats]:
    seen: list[Stats] = []

    def score(weight: Tensor, stats: Stats) -> Tensor:
        seen.append(stats)
        return (weight * (stats.gradient if stats.gradient is not None else 1)).abs()

    plugins.criteria.register("saliency", needs=needs, **meta)(score)
    return seen


def test_a_criterion_sees_the_mean_over_the_steps_since_the_last_event() -> None:
    seen = saliency(("gradient", "gradient_squared"))
    weights = held()
    pruner = pruner_of(weights, [(3, 0.3), (5, 0.5)], criterion="saliency")
    gradients: dict[str, list[Tensor]] = {"a": [], "b": []}
    for step in range(1, 6):
        for name, weight in weights.items():
            weight.grad = torch.randn_like(weight)
            gradients[name].append(weight.grad.clone())
        if step == 2:
            weights["b"].grad = None  # its layer was not in the draw
            gradients["b"][-1] = torch.zeros(4, 5)
        pruner.observe()
        pruner.silence()
        pruner.step(step)
    first, last = seen[:2], seen[2:]
    assert len(last) == 2
    for stats, name in zip(first, ("a", "b"), strict=True):
        torch.testing.assert_close(stats.gradient, torch.stack(gradients[name][:3]).mean(0))
        torch.testing.assert_close(stats.gradient_squared, torch.stack(gradients[name][:3]).square().mean(0))
    for stats, name in zip(last, ("a", "b"), strict=True):
        torch.testing.assert_close(stats.gradient, torch.stack(gradients[name][3:]).mean(0))


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_the_dead_live_only_if_the_criterion_says_so(dense: bool) -> None:
    saliency(("gradient",), dense_gradients=dense)
    weights = held()
    pruner = pruner_of(weights, [(1, 0.5), (2, 0.6)], criterion="saliency")
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    pruner.observe()
    pruner.step(1)
    pruner.silence()
    for name, weight in weights.items():
        assert weight.grad is not None
        assert bool((weight.grad[pruner.masks.dead[name]] != 0).any()) == dense
        assert bool((weight.grad[~pruner.masks.dead[name]] == 1).all())


def test_a_pruner_goes_on_as_if_nothing_had_happened() -> None:
    saliency(("gradient", "gradient_squared"))

    def run(stop: int | None) -> dict[str, Tensor]:
        weights = held()
        pruner = pruner_of(weights, [(3, 0.3), (6, 0.7)], criterion="saliency")
        for step in range(1, 7):
            for index, weight in enumerate(weights.values()):
                draw = torch.Generator().manual_seed(10 * step + index)
                weight.grad = torch.randn(weight.shape, generator=draw)
            pruner.observe()
            pruner.step(step)
            if step == stop:
                state = {key: value.clone() for key, value in pruner.state_dict().items()}
                pruner = pruner_of(weights, [(3, 0.3), (6, 0.7)], criterion="saliency")
                pruner.load_state_dict(state)
        return {name: weight.detach().clone() for name, weight in weights.items()}

    undisturbed = run(None)
    for stop in (1, 2, 3, 4, 5):
        for name, weight in run(stop).items():
            assert torch.equal(weight, undisturbed[name])


def test_unknown_names_and_needs_are_refused() -> None:
    with pytest.raises(UnknownName, match="criterion 'magnitud'"):
        pruner_of(held(), [(1, 0.5)], criterion="magnitud")
    with pytest.raises(UnknownName, match="pattern 'unstructure'"):
        pruner_of(held(), [(1, 0.5)], pattern="unstructure")
    saliency(("hessian",))
    with pytest.raises(RecipeError, match="needs hessian, which is not observed"):
        pruner_of(held(), [(1, 0.5)], criterion="saliency")


def test_a_criterion_that_needs_gradients_cannot_prune_before_the_first_step() -> None:
    saliency(("gradient",))
    with pytest.raises(RecipeError, match="before the first step"):
        pruner_of(held(), [(0, 0.3), (4, 0.5)], criterion="saliency")
    pruner_of(held(), [(0, 0.3), (4, 0.5)])  # the magnitude is there at once


def test_a_checkpoint_that_is_too_sparse_is_refused_before_the_work() -> None:
    weights = held()
    with torch.no_grad():
        weights["a"].view(-1)[:20] = 0
    with pytest.raises(ModelError, match="a has 20 zeros of 30 already"):
        pruner_of(weights, [(4, 0.5)])
