"""Masks: exact counts in every scope; pruned weights and their optimiser moments stay zero."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spdtool.errors import GateError, ModelError
from spdtool.pruning.allocation import Allocation, zeros_in
from spdtool.pruning.masks import Masks, check_counts, clear_dead
from spdtool.pruning.patterns import find_pattern, sum_blocks
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.training import Prune

TINY = torch.finfo(torch.float32).tiny
SCOPES = ("matrix", "type", "global")


def make_weights(*shapes: tuple[int, int], seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {f"w{i}": nn.Parameter(torch.randn(shape) * (i + 1)) for i, shape in enumerate(shapes or ((6, 8), (5, 4)))}


def prune_by(
    masks: Masks, scores: Mapping[str, Tensor], sparsity: float, scope: str = "matrix", least: float = 0.0
) -> Allocation:
    dead, allocation = masks.choose(scores, sparsity, scope, least)
    masks.set(dead)
    return allocation


def prune(masks: Masks, sparsity: float, scope: str = "matrix", least: float = 0.0) -> Allocation:
    """Prune by magnitude."""
    scores = {name: weight.detach().abs() for name, weight in masks.parameters.items()}
    return prune_by(masks, scores, sparsity, scope, least)


def zeros(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in parameters.items()}


def test_every_matrix_gets_its_count() -> None:
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.97):
        weights = make_weights()
        masks = Masks(weights)
        prune(masks, sparsity)
        assert zeros(weights) == {"w0": round(48 * sparsity), "w1": round(20 * sparsity)}, sparsity
        assert masks.counts() == {"w0": (round(48 * sparsity), 48), "w1": (round(20 * sparsity), 20)}, sparsity
        masks.check_sparsity(sparsity)


def test_the_global_scope_has_the_exact_total_of_the_lowest_over_all() -> None:
    for sparsity in (0.0, 0.1, 0.5, 0.8):
        weights = make_weights()
        ranked = []
        for name, weight in weights.items():
            ranked += [(abs(float(x)), name, i) for i, x in enumerate(weight.detach().flatten())]
        pruned = sorted(ranked)[: round(68 * sparsity)]
        masks = Masks(weights)
        prune(masks, sparsity, "global")
        for name, weight in weights.items():
            dead = (weight == 0).flatten().nonzero().flatten().tolist()
            assert sorted(dead) == sorted(i for _, matrix, i in pruned if matrix == name), (sparsity, name)
        masks.check_sparsity(sparsity, "global")
        assert masks.sparsity() == pytest.approx(round(68 * sparsity) / 68)


def test_no_matrix_is_emptied_by_a_scope_of_several() -> None:
    weights = make_weights((6, 8), (50, 40))
    masks = Masks(weights)
    with torch.no_grad():
        weights["w0"].mul_(1e-3)
    allocation = prune(masks, 0.9, "global", 0.1)
    assert zeros(weights) == {"w0": 43, "w1": zeros_in(2048, 0.9) - 43}
    assert allocation.clamped == {"w0": (48, 43)}
    masks.check_sparsity(0.9, "global")


def test_the_type_scope_has_the_exact_total_of_each_type() -> None:
    torch.manual_seed(0)
    weights = {f"layer.{i}.{name}": nn.Parameter(torch.randn(5, 7) * (1 + i)) for i in range(3) for name in "qk"}
    masks = Masks(weights)
    prune(masks, 0.77, "type")
    counts = zeros(weights)
    assert sum(counts.values()) == 2 * zeros_in(105, 0.77)
    assert sum(count for name, count in counts.items() if name.endswith("q")) == zeros_in(105, 0.77)
    assert counts["layer.0.q"] > counts["layer.2.q"]
    masks.check_sparsity(0.77, "type")
    with pytest.raises(GateError, match=r"layer\.\*\.q has 81 zeros of 105; sparsity 0\.5 asks for 52"):
        masks.check_sparsity(0.5, "type")


def test_dead_weights_stay_dead_whatever_their_scores() -> None:
    for scope in SCOPES:
        weights = make_weights((8, 8), (4, 4))
        masks = Masks(weights)
        dead = {name: mask.clone() for name, mask in masks.dead.items()}
        for seed, sparsity in enumerate((0.2, 0.5, 0.5, 0.3, 0.9)):
            torch.manual_seed(seed)
            prune_by(masks, {name: torch.rand_like(w) for name, w in weights.items()}, sparsity, scope)
            for name, weight in weights.items():
                assert bool((masks.dead[name] | ~dead[name]).all()), f"{scope}: a mask grew back"
                assert torch.equal(weight == 0, masks.dead[name]), scope
            dead = {name: mask.clone() for name, mask in masks.dead.items()}
            if sparsity != 0.3:  # a lower sparsity than the present one changes nothing
                masks.check_sparsity(sparsity, scope)
        masks.check_sparsity(0.9, scope)


def test_with_regrowth_dead_weights_compete_by_their_last_value() -> None:
    for scope in SCOPES:
        weights = make_weights((8, 8), (4, 4))
        first = {name: weight.detach().clone() for name, weight in weights.items()}
        masks = Masks(weights)
        masks.allow_regrowth()
        ever_dead: dict[str, Tensor] = {name: torch.zeros_like(dead) for name, dead in masks.dead.items()}
        for seed, sparsity in enumerate((0.2, 0.5, 0.5, 0.8, 0.8)):
            torch.manual_seed(seed)
            prune_by(masks, {name: torch.rand_like(w) for name, w in weights.items()}, sparsity, scope)
            masks.check_sparsity(sparsity, scope)
            for name, weight in weights.items():
                ever_dead[name] |= masks.dead[name]
                assert torch.equal(weight == 0, masks.dead[name]), scope
                assert torch.equal(masks.build_full_weight(name), first[name]), (
                    "nothing trained: every value is still known"
                )
                assert not bool(masks.dead_values[name][~masks.dead[name]].any()), scope
        assert any(bool((ever_dead[name] & ~masks.dead[name]).any()) for name in weights), "nothing grew again"


def test_a_regrown_weight_has_its_old_value_and_zero_moments() -> None:
    weights = make_weights((4, 4))
    (weight,) = weights.values()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    masks = Masks(weights)
    masks.attach(optimizer)
    masks.allow_regrowth()
    value = float(weight[0, 0].detach())
    rising = torch.arange(16.0).view(4, 4)
    for scores in (rising, -rising):
        for _ in range(2):
            weight.grad = torch.ones(4, 4)
            optimizer.step()
        before = float(weight[0, 0].detach())
        prune_by(masks, {"w0": scores}, 0.5)
    assert before == 0.0, "it was dead"
    assert value - 0.2 == pytest.approx(float(weight[0, 0].detach()), abs=1e-2)
    assert all(float(tensor[0, 0]) == 0.0 for tensor in moments(optimizer, weight))
    masks.zero_gradients()
    masks.check_dead()


def test_only_survivors_take_updated_values() -> None:
    weights = {"w": nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))}
    masks = Masks(weights)
    masks.allow_regrowth()
    masks.set({"w": torch.tensor([[True, False, False, False]])})
    masks.set({"w": torch.tensor([[False, True, False, False]])}, {"w": torch.full((1, 4), 9.0)})
    assert weights["w"].tolist() == [[1.0, 0.0, 9.0, 9.0]]
    assert masks.dead_values["w"].tolist() == [[0.0, 2.0, 0.0, 0.0]]


def test_equal_weights_still_give_the_exact_count() -> None:
    masks = Masks({"w": nn.Parameter(torch.full((10, 10), 0.5))})
    for sparsity in (0.33, 0.66, 0.9):
        prune(masks, sparsity)
        masks.check_sparsity(sparsity)


def test_masks_are_read_from_the_zeros_of_somebody_elses_checkpoint() -> None:
    weights = make_weights((4, 4))
    with torch.no_grad():
        weights["w0"][0] = 0.0
        weights["w0"][1, 0] = -0.0
    masks = Masks.from_zeros(weights)
    assert masks.counts() == {"w0": (5, 16)}
    assert torch.equal(masks.dead["w0"], weights["w0"] == 0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    return [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]


def test_weights_and_moments_of_the_dead_are_zero_after_every_step() -> None:
    for kind, make_optimizer in OPTIMIZERS.items():
        weights = make_weights((8, 8))
        optimizer = make_optimizer(list(weights.values()))
        masks = Masks(weights)
        masks.attach(optimizer)
        (weight,) = weights.values()
        for step in range(6):
            weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if step in (1, 3):
                prune(masks, 0.3 * (1 + step // 2))
            optimizer.zero_grad()
            dead = masks.dead["w0"]
            stored = moments(optimizer, weight)
            assert len(stored) >= 1, kind
            for tensor in (weight, *stored):
                assert bool((tensor[dead] == 0).all()), kind
                assert bool((tensor[~dead] != 0).all()), f"{kind}: the living are left alone"
            masks.check_dead()
        assert int(dead.sum()) == zeros_in(64, 0.6), kind


def test_live_weights_train_as_if_the_dead_did_not_exist() -> None:
    """The reference optimiser gets the live weights only, and the same gradients."""
    for kind, make_optimizer in OPTIMIZERS.items():
        weights = make_weights((8, 8))
        masks = Masks(weights)
        prune(masks, 0.5)
        (weight,) = weights.values()
        alive = ~masks.dead["w0"]
        living_weights = nn.Parameter(weight.detach()[alive].clone())
        masked_optimizer, reference_optimizer = make_optimizer([weight]), make_optimizer([living_weights])
        masks.attach(masked_optimizer)
        for step in range(5):
            weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            living_weights.grad = weight.grad[alive].clone()
            masked_optimizer.step()
            reference_optimizer.step()
        torch.testing.assert_close(weight[alive], living_weights, rtol=1e-6, atol=1e-7, msg=kind)


def test_gradients_of_the_dead_are_zeroed_and_no_others() -> None:
    weights = make_weights((4, 4), (4, 4))
    masks = Masks(weights)
    prune(masks, 0.5)
    weights["w0"].grad = torch.ones(4, 4)
    masks.zero_gradients()  # w1 has none: its layer was not in the draw
    assert torch.equal(weights["w0"].grad, (~masks.dead["w0"]).float())
    assert weights["w1"].grad is None


def test_masks_can_be_detached_from_an_optimizer() -> None:
    weights = make_weights((4, 4))
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    masks = Masks(weights)
    prune(masks, 0.5)
    masks.attach(optimizer).remove()
    weights["w0"].grad = torch.ones(4, 4)
    optimizer.step()
    assert zeros(weights) == {"w0": 0}


def test_a_live_weight_that_becomes_zero_stays_alive_after_finalizing() -> None:
    weights = make_weights((4, 4))
    masks = Masks(weights)
    prune(masks, 0.5)
    row, column = (~masks.dead["w0"]).nonzero()[0].tolist()
    with torch.no_grad():
        weights["w0"][row, column] = 0.0
    with pytest.raises(GateError, match=r"w0 has 9 zeros of 16; sparsity 0\.5 asks for 8"):
        masks.check_sparsity(0.5)
    before = weights["w0"].detach().clone()
    masks.finalize()
    masks.check_sparsity(0.5)
    assert float(weights["w0"].detach()[row, column]) == TINY
    assert int((weights["w0"].detach() != before).sum()) == 1
    assert torch.equal(Masks.from_zeros(weights).dead["w0"], masks.dead["w0"])


def test_the_smallest_normal_number_survives_a_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([TINY, 0.0])}, tmp_path / "w.safetensors")
    assert (load_file(tmp_path / "w.safetensors")["w"] == 0).tolist() == [False, True]


def test_a_nonzero_among_the_dead_is_reported_by_name() -> None:
    for fault in ("weight", "gradient", "moment"):
        weights = make_weights((4, 4))
        optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
        masks = Masks(weights)
        masks.attach(optimizer)
        prune(masks, 0.5)
        (weight,) = weights.values()
        weight.grad = torch.ones(4, 4)
        optimizer.step()
        masks.zero_gradients()
        masks.check_dead()
        first = tuple(masks.dead["w0"].nonzero()[0].tolist())
        assert weight.grad is not None
        tensors = {"weight": weight.detach(), "gradient": weight.grad, "moment": optimizer.state[weight]["exp_avg"]}
        tensors[fault][first] = math.nan
        with pytest.raises(GateError, match="w0: a pruned weight, its gradient or one of its moments"):
            masks.check_dead()


def test_too_many_zeros_are_refused_before_the_work() -> None:
    masks = Masks(make_weights((10, 10), (10, 10)))
    masks.dead["w0"].view(-1)[:60] = True
    masks.check_reachable(0.6)
    masks.check_reachable(0.5, "global")
    with pytest.raises(ModelError, match=r"w0 has 60 zeros of 100 already; sparsity 0\.5 asks for 50"):
        masks.check_reachable(0.5)
    with pytest.raises(ModelError, match="all matrices has 60 zeros of 200 already"):
        masks.check_reachable(0.2, "global")
    masks.allow_regrowth()
    masks.check_reachable(0.5)


def test_counts_are_checked_in_every_scope() -> None:
    check_counts({"a": (5, 10), "b": (10, 20)}, 0.5)
    check_counts({"a": (0, 10), "b": (15, 20)}, 0.5, "global")
    with pytest.raises(GateError, match="a has 0 zeros of 10"):
        check_counts({"a": (0, 10), "b": (15, 20)}, 0.5)
    with pytest.raises(GateError, match="all matrices has 14 zeros of 30"):
        check_counts({"a": (4, 10), "b": (10, 20)}, 0.5, "global")


def test_masks_are_restored_from_their_state() -> None:
    weights = make_weights()
    masks = Masks(weights)
    prune(masks, 0.5)
    restored = Masks(weights)
    restored.load_state_dict({name: dead.clone() for name, dead in masks.state_dict().items()})
    assert all(torch.equal(restored.dead[name], masks.dead[name]) for name in weights)


def test_masks_are_not_reapplied_after_steps_with_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights equal, to the bit, those of masks applied after every step."""
    weights, other_weights = make_weights((8, 8)), make_weights((8, 8))
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.1)
    reference_optimizer = torch.optim.AdamW(other_weights.values(), lr=0.1, weight_decay=0.1)
    masks, always_applied = Masks(weights), Masks(other_weights)
    for each_masks, each_optimizer in ((masks, optimizer), (always_applied, reference_optimizer)):
        prune(each_masks, 0.5)
        each_masks.attach(each_optimizer)
    calls: list[int] = []
    apply = masks.apply
    monkeypatch.setattr(masks, "apply", lambda: (calls.append(1), apply()))
    for step, keeps_gradients in enumerate((False, False, False, True, False, False)):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        weights["w0"].grad, other_weights["w0"].grad = gradient.clone(), gradient.clone()
        always_applied.zero_gradients()
        if not keeps_gradients:
            masks.zero_gradients()
        before = len(calls)
        optimizer.step()
        reference_optimizer.step()
        always_applied.apply()
        assert len(calls) - before == (step == 0 or keeps_gradients)
        assert torch.equal(weights["w0"], other_weights["w0"])
        assert bool((weights["w0"][masks.dead["w0"]] == 0).all())
        for moment, reference_moment in zip(
            moments(optimizer, weights["w0"]), moments(reference_optimizer, other_weights["w0"]), strict=True
        ):
            assert torch.equal(moment, reference_moment)


def test_dead_weights_become_positive_zeros_whatever_their_value() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor([math.nan, -math.inf, -3.0, 2.0, -0.0, math.nan], dtype=dtype)
        clear_dead(tensor, torch.tensor([True, True, True, False, False, False]))
        assert tensor[:3].tolist() == [0.0, 0.0, 0.0], dtype
        assert not bool(tensor[:3].signbit().any()), dtype
        assert tensor[3] == 2.0, dtype
        assert bool(tensor[4].signbit()), dtype
        assert bool(tensor[5].isnan()), dtype


def test_blocks_are_pruned_whole_in_every_scope() -> None:
    for name, scope, sparsity in itertools.product(("1x4", "4x4", "2x8", "8x1"), SCOPES, (0.0, 0.3, 0.5, 0.9)):
        case = f"{name}, {scope}, {sparsity}"
        pattern = find_pattern(name)
        weights = make_weights((8, 16), (24, 8))
        masks = Masks(weights, pattern)
        prune(masks, sparsity, scope)
        for weight in weights.values():
            dead_weights = sum_blocks((weight == 0).float(), pattern.block)
            assert set(dead_weights.flatten().tolist()) <= {0.0, float(pattern.block_size)}, case
        total = sum(zeros(weights).values())
        if scope == "global":
            assert total == zeros_in(320, sparsity, pattern.block_size), case
        else:
            assert total == sum(zeros_in(size, sparsity, pattern.block_size) for size in (128, 192)), case
        masks.check_sparsity(sparsity, scope)
        masks.finalize()
        reread = Masks.from_zeros(weights, pattern)
        for name, dead in masks.dead.items():
            assert torch.equal(reread.dead[name], dead), case


def test_a_single_zero_in_a_live_block_is_not_counted() -> None:
    weights = make_weights((4, 8))
    with torch.no_grad():
        weights["w0"][0, 0] = 0
        weights["w0"][1, :4] = 0
    masks = Masks.from_zeros(weights, find_pattern("1x4"))
    assert masks.counts() == {"w0": (4, 32)}
    with pytest.raises(GateError, match="w0: not all of its zeros are in whole blocks of 1x4"):
        masks.check_sparsity(4 / 32)
    masks.finalize()
    assert weights["w0"][0, 0].item() == TINY
    masks.check_sparsity(4 / 32)
    with pytest.raises(GateError, match=r"w0 has 4 zeros of 32; sparsity 0\.5 asks for 16"):
        masks.check_sparsity(0.5)


def test_a_matrix_that_the_pattern_does_not_divide_is_refused() -> None:
    for name, shape in (("1x4", (4, 6)), ("4x4", (6, 8)), ("2:4", (4, 6)), ("1x4", (8,))):
        with pytest.raises(ModelError, match=rf"w has the shape .*, which the pattern {name} does not divide"):
            Masks({"w": nn.Parameter(torch.randn(shape))}, find_pattern(name))


def test_n_of_m_has_its_zeros_in_every_group() -> None:
    for name, alive, group in (("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)):
        weights = make_weights((6, 16))
        masks = Masks(weights, find_pattern(name))
        for sparsity in (0.2, 0.4, 1 - alive / group):
            prune(masks, sparsity)
            masks.check_sparsity(sparsity)
            in_group = (weights["w0"] != 0).unflatten(1, (-1, group)).sum(-1)
            assert int(in_group.min()) >= alive, (name, sparsity)
        assert int(in_group.max()) == alive, name


def test_groups_with_too_many_dead_weights_are_refused_before_training() -> None:
    weights = make_weights((4, 8))
    with torch.no_grad():
        weights["w0"][2, :3] = 0
    masks = Masks.from_zeros(weights, find_pattern("2:4"))
    with pytest.raises(ModelError, match="w0 has more than 2 zeros in some 4 neighbouring inputs"):
        masks.check_reachable(0.5)
    masks.allow_regrowth()
    masks.check_reachable(0.5)


def test_gradients_zeroed_together_are_those_zeroed_one_by_one() -> None:
    outcomes = []
    for together in (False, True):
        weights = make_weights()
        masks = Masks(weights)
        masks.zeroes_together = together
        for sparsity in (0.3, 0.7):
            prune(masks, sparsity)
            for seed, weight in enumerate(weights.values()):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weights["w1"].grad = None  # its layer was left out of the step
            masks.zero_gradients()
            outcomes.append(weights["w0"].grad)
            masks.check_dead()
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[3])


class Reads(TorchFunctionMode):
    """Counts what a GPU would be waited for."""

    COUNTED = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.COUNTED
        return func(*args, **(kwargs or {}))


def test_checks_wait_once_however_many_matrices_there_are() -> None:
    for matrices in (1, 5):
        weights = make_weights(*[(6, 8)] * matrices)
        masks = Masks(weights)
        prune(masks, 0.5)
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        with Reads() as reads:
            masks.check_dead()
        assert reads.count == 1, matrices
        pruner = Pruner(masks, [(1, 0.75)], Prune(), 0.75)
        with Reads() as reads:
            pruner.prune(1)
        assert reads.count == 1, matrices
    with torch.no_grad():
        weights["w3"].view(-1)[masks.dead["w3"].view(-1)] = 1.0
    with pytest.raises(GateError, match="w3: a pruned weight"):
        masks.check_dead()
