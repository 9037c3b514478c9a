"""Masks: exact counts in either scope, nothing grows back, and nothing that the optimiser keeps survives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spdtool.errors import GateError, ModelError
from spdtool.pruning.masks import Masks, _clear, check_counts
from spdtool.pruning.patterns import unstructured, zeros_in

TINY = torch.finfo(torch.float32).tiny


def weights(*shapes: tuple[int, int], seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {f"w{i}": nn.Parameter(torch.randn(shape) * (i + 1)) for i, shape in enumerate(shapes or ((6, 8), (5, 4)))}


def prune(masks: Masks, sparsity: float, scope: str = "matrix") -> None:
    masks.prune({n: w.detach().abs() for n, w in masks.parameters.items()}, sparsity, unstructured, scope)


def zeros(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in parameters.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_every_matrix_gets_its_own_count(sparsity: float) -> None:
    held = weights()
    masks = Masks(held)
    prune(masks, sparsity)
    assert zeros(held) == {"w0": round(48 * sparsity), "w1": round(20 * sparsity)}
    assert masks.counts() == {"w0": (round(48 * sparsity), 48), "w1": (round(20 * sparsity), 20)}
    masks.check(sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8])
def test_the_global_scope_has_the_exact_total_of_the_lowest_over_all(sparsity: float) -> None:
    held = weights()
    everything = sorted(
        (abs(float(x)), name, i) for name, w in held.items() for i, x in enumerate(w.detach().flatten())
    )
    gone = everything[: round(68 * sparsity)]
    masks = Masks(held)
    prune(masks, sparsity, "global")
    for name, weight in held.items():
        dead = (weight == 0).flatten().nonzero().flatten().tolist()
        assert sorted(dead) == sorted(i for _, owner, i in gone if owner == name)
    masks.check(sparsity, "global")
    assert masks.sparsity() == pytest.approx(round(68 * sparsity) / 68)


def test_no_matrix_is_emptied_by_a_scope_of_several() -> None:
    held = weights((6, 8), (50, 40))
    masks = Masks(held)
    with torch.no_grad():
        held["w0"].mul_(1e-3)
    made = masks.prune({n: w.detach().abs() for n, w in held.items()}, 0.9, unstructured, "global", 0.1)
    assert zeros(held) == {"w0": 43, "w1": zeros_in(2048, 0.9) - 43}
    assert made.clamped == {"w0": (48, 43)}
    masks.check(0.9, "global")


def test_the_type_scope_has_the_exact_total_of_each_kind() -> None:
    torch.manual_seed(0)
    held = {f"layer.{i}.{part}": nn.Parameter(torch.randn(5, 7) * (1 + i)) for i in range(3) for part in "qk"}
    masks = Masks(held)
    prune(masks, 0.77, "type")
    found = zeros(held)
    assert sum(found.values()) == 2 * zeros_in(105, 0.77)
    assert sum(count for name, count in found.items() if name.endswith("q")) == zeros_in(105, 0.77)
    assert found["layer.0.q"] > found["layer.2.q"]
    masks.check(0.77, "type")
    with pytest.raises(GateError, match=r"layer\.\*\.q has 81 zeros of 105; sparsity 0\.5 asks for 52"):
        masks.check(0.5, "type")


@pytest.mark.parametrize("scope", ["matrix", "type", "global"])
def test_the_dead_stay_dead_whatever_their_scores_say(scope: str) -> None:
    held = weights((8, 8), (4, 4))
    masks = Masks(held)
    dead = {name: mask.clone() for name, mask in masks.dead.items()}
    for round_, sparsity in enumerate((0.2, 0.5, 0.5, 0.3, 0.9)):
        torch.manual_seed(round_)
        masks.prune({name: torch.rand_like(w) for name, w in held.items()}, sparsity, unstructured, scope)
        for name, weight in held.items():
            assert bool((masks.dead[name] | ~dead[name]).all()), "a mask grew back"
            assert torch.equal(weight == 0, masks.dead[name])
        dead = {name: mask.clone() for name, mask in masks.dead.items()}
        if sparsity != 0.3:  # less than is dead already changes nothing
            masks.check(sparsity, scope)
    masks.check(0.9, scope)


@pytest.mark.parametrize("scope", ["matrix", "type", "global"])
def test_the_dead_compete_with_the_value_that_they_had(scope: str) -> None:
    held = weights((8, 8), (4, 4))
    first = {name: weight.detach().clone() for name, weight in held.items()}
    masks = Masks(held)
    masks.regrow()
    ever: dict[str, Tensor] = {name: torch.zeros_like(dead) for name, dead in masks.dead.items()}
    for round_, sparsity in enumerate((0.2, 0.5, 0.5, 0.8, 0.8)):
        torch.manual_seed(round_)
        ranks = {name: torch.rand_like(w) for name, w in held.items()}
        masks.prune(ranks, sparsity, unstructured, scope)
        masks.check(sparsity, scope)
        for name, weight in held.items():
            ever[name] |= masks.dead[name]
            assert torch.equal(weight == 0, masks.dead[name])
            assert torch.equal(masks.filled(name), first[name]), "nothing trained: every value is still known"
            assert not bool(masks.kept[name][~masks.dead[name]].any())
    assert any(bool((ever[name] & ~masks.dead[name]).any()) for name in held), "nothing grew again"


def test_what_grows_again_has_its_value_and_no_moments() -> None:
    held = weights((4, 4))
    (weight,) = held.values()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    masks = Masks(held)
    masks.hold(optimizer)
    masks.regrow()
    value = float(weight[0, 0].detach())
    ranks = torch.arange(16.0).view(4, 4)
    for scores in (ranks, -ranks):
        for _ in range(2):
            weight.grad = torch.ones(4, 4)
            optimizer.step()
        before = float(weight[0, 0].detach())
        masks.prune({"w0": scores}, 0.5, unstructured)
    assert before == 0.0, "it was dead"
    assert value - 0.2 == pytest.approx(float(weight[0, 0].detach()), abs=1e-2)
    assert all(float(tensor[0, 0]) == 0.0 for tensor in moments(optimizer, weight))
    masks.silence()
    masks.check_dead()


def test_mended_values_are_taken_by_survivors_alone() -> None:
    held = {"w": nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))}
    masks = Masks(held)
    masks.regrow()
    masks.bury({"w": torch.tensor([[True, False, False, False]])})
    masks.bury({"w": torch.tensor([[False, True, False, False]])}, {"w": torch.full((1, 4), 9.0)})
    assert held["w"].tolist() == [[1.0, 0.0, 9.0, 9.0]]
    assert masks.kept["w"].tolist() == [[0.0, 2.0, 0.0, 0.0]]


def test_equal_weights_still_give_the_exact_count() -> None:
    held = {"w": nn.Parameter(torch.full((10, 10), 0.5))}
    masks = Masks(held)
    for sparsity in (0.33, 0.66, 0.9):
        prune(masks, sparsity)
        masks.check(sparsity)


def test_masks_are_read_from_the_zeros_of_somebody_elses_checkpoint() -> None:
    held = weights((4, 4))
    with torch.no_grad():
        held["w0"][0] = 0.0
        held["w0"][1, 0] = -0.0
    masks = Masks.from_zeros(held)
    assert masks.counts() == {"w0": (5, 16)}
    assert torch.equal(masks.dead["w0"], held["w0"] == 0)


def optimizers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    }


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    return [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]


@pytest.mark.parametrize("kind", optimizers())
def test_weights_and_moments_of_the_dead_are_zero_after_every_step(kind: str) -> None:
    held = weights((8, 8))
    optimizer = optimizers()[kind](list(held.values()))
    masks = Masks(held)
    masks.hold(optimizer)
    (weight,) = held.values()
    for step in range(6):
        weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if step in (1, 3):
            prune(masks, 0.3 * (1 + step // 2))
        optimizer.zero_grad()
        dead = masks.dead["w0"]
        kept = moments(optimizer, weight)
        assert len(kept) >= 1
        for tensor in (weight, *kept):
            assert bool((tensor[dead] == 0).all())
            assert bool((tensor[~dead] != 0).all()), "the living are left alone"
        masks.check_dead()
    assert int(dead.sum()) == zeros_in(64, 0.6)


@pytest.mark.parametrize("kind", optimizers())
def test_the_living_move_as_if_the_dead_had_never_been(kind: str) -> None:
    """The same steps by an optimiser that has only the living weights: bit for bit."""
    held = weights((8, 8))
    masks = Masks(held)
    prune(masks, 0.5)
    (weight,) = held.values()
    alive = ~masks.dead["w0"]
    alone = nn.Parameter(weight.detach()[alive].clone())
    ours, theirs = optimizers()[kind]([weight]), optimizers()[kind]([alone])
    masks.hold(ours)
    for step in range(5):
        weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        alone.grad = weight.grad[alive].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight[alive], alone, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_dead_are_silenced_and_no_others() -> None:
    held = weights((4, 4), (4, 4))
    masks = Masks(held)
    prune(masks, 0.5)
    held["w0"].grad = torch.ones(4, 4)
    masks.silence()  # w1 has none: its layer was not in the draw
    assert torch.equal(held["w0"].grad, (~masks.dead["w0"]).float())
    assert held["w1"].grad is None


def test_a_held_optimizer_can_be_let_go() -> None:
    held = weights((4, 4))
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    masks = Masks(held)
    prune(masks, 0.5)
    masks.hold(optimizer).remove()
    held["w0"].grad = torch.ones(4, 4)
    optimizer.step()
    assert zeros(held) == {"w0": 0}


def test_a_living_weight_that_lands_on_zero_is_kept_alive_by_the_seal() -> None:
    held = weights((4, 4))
    masks = Masks(held)
    prune(masks, 0.5)
    alive = (~masks.dead["w0"]).nonzero()[0].tolist()
    with torch.no_grad():
        held["w0"][alive[0], alive[1]] = 0.0
    with pytest.raises(GateError, match=r"w0 has 9 zeros of 16; sparsity 0\.5 asks for 8"):
        masks.check(0.5)
    others = held["w0"].detach().clone()
    masks.seal()
    masks.check(0.5)
    assert float(held["w0"].detach()[alive[0], alive[1]]) == TINY
    assert int((held["w0"].detach() != others).sum()) == 1
    assert torch.equal(Masks.from_zeros(held).dead["w0"], masks.dead["w0"])


def test_the_seal_survives_a_checkpoint(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.tensor([TINY, 0.0])}, tmp_path / "w.safetensors")
    assert (load_file(tmp_path / "w.safetensors")["w"] == 0).tolist() == [False, True]


@pytest.mark.parametrize("where", ["weight", "gradient", "moment"])
def test_something_alive_among_the_dead_is_named(where: str) -> None:
    held = weights((4, 4))
    optimizer = torch.optim.AdamW(held.values(), lr=0.1)
    masks = Masks(held)
    masks.hold(optimizer)
    prune(masks, 0.5)
    (weight,) = held.values()
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    masks.silence()
    masks.check_dead()
    first = tuple(masks.dead["w0"].nonzero()[0].tolist())
    assert weight.grad is not None
    tensor = {"weight": weight.detach(), "gradient": weight.grad, "moment": optimizer.state[weight]["exp_avg"]}[where]
    tensor[first] = math.nan
    with pytest.raises(GateError, match="w0: a pruned weight, its gradient or one of its moments"):
        masks.check_dead()


def test_too_many_zeros_are_seen_before_the_work() -> None:
    masks = Masks(weights((10, 10), (10, 10)))
    masks.dead["w0"].view(-1)[:60] = True
    masks.check_room(0.6)
    masks.check_room(0.5, "global")
    with pytest.raises(ModelError, match=r"w0 has 60 zeros of 100 already; sparsity 0\.5 asks for 50"):
        masks.check_room(0.5)
    with pytest.raises(ModelError, match="all matrices has 60 zeros of 200 already"):
        masks.check_room(0.2, "global")
    masks.regrow()
    masks.check_room(0.5)


def test_counts_are_checked_in_either_scope() -> None:
    check_counts({"a": (5, 10), "b": (10, 20)}, 0.5)
    check_counts({"a": (0, 10), "b": (15, 20)}, 0.5, "global")
    with pytest.raises(GateError, match="a has 0 zeros of 10"):
        check_counts({"a": (0, 10), "b": (15, 20)}, 0.5)
    with pytest.raises(GateError, match="all matrices has 14 zeros of 30"):
        check_counts({"a": (4, 10), "b": (10, 20)}, 0.5, "global")


def test_masks_come_back_from_their_state() -> None:
    held = weights()
    masks = Masks(held)
    prune(masks, 0.5)
    other = Masks(held)
    other.load_state_dict({name: dead.clone() for name, dead in masks.state_dict().items()})
    assert all(torch.equal(other.dead[name], masks.dead[name]) for name in held)


def test_after_silenced_steps_nothing_is_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the hold makes by working after every step; and it does work where gradients were loud."""
    held, always = weights((8, 8)), weights((8, 8))
    ours, theirs = (torch.optim.AdamW(each.values(), lr=0.1, weight_decay=0.1) for each in (held, always))
    masks, busy = Masks(held), Masks(always)
    for each, optimizer in ((masks, ours), (busy, theirs)):
        prune(each, 0.5)
        each.hold(optimizer)
    worked: list[int] = []
    apply = masks.apply
    monkeypatch.setattr(masks, "apply", lambda: (worked.append(1), apply()))
    for step, loud in enumerate((False, False, False, True, False, False)):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        held["w0"].grad, always["w0"].grad = gradient.clone(), gradient.clone()
        busy.silence()
        if not loud:
            masks.silence()
        before = len(worked)
        ours.step()
        theirs.step()
        busy.apply()
        assert len(worked) - before == (step == 0 or loud)
        assert torch.equal(held["w0"], always["w0"])
        assert bool((held["w0"][masks.dead["w0"]] == 0).all())
        for mine, its in zip(moments(ours, held["w0"]), moments(theirs, always["w0"]), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_dead_are_cleared_to_plain_zeros_whatever_they_were(kind: torch.dtype) -> None:
    tensor = torch.tensor([math.nan, -math.inf, -3.0, 2.0, -0.0, math.nan], dtype=kind)
    dead = torch.tensor([True, True, True, False, False, False])
    _clear(tensor, dead)
    assert tensor[:3].tolist() == [0.0, 0.0, 0.0]
    assert not bool(tensor[:3].signbit().any())
    assert tensor[3] == 2.0
    assert bool(tensor[4].signbit())
    assert bool(tensor[5].isnan())
