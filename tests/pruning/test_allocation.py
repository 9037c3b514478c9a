"""Allocation of zeros: exact totals and floors in every scope, against slow plain code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spdtool.pruning.allocation import ALL, allocate, group_by_scope, matrix_type, zeros_in


def random_scores(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw scores for matrices of these sizes; later matrices get larger scores."""
    draw = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.q": torch.rand(size, generator=draw) * (1 + i) for i, size in enumerate(sizes)}


def plain_allocation(scores: dict[str, Tensor], total: int, floors: dict[str, int]) -> dict[str, int]:
    """Allocate one zero at a time to the lowest score whose matrix is above its floor."""
    counts = dict.fromkeys(scores, 0)
    for _, name in sorted((float(x), name) for name, score in scores.items() for x in score):
        if sum(counts.values()) < total and counts[name] < scores[name].numel() - floors[name]:
            counts[name] += 1
    return counts


def test_the_number_of_zeros_is_rounded_to_the_nearest() -> None:
    sizes, sparsities = (1, 2, 3, 7, 10, 100, 589_824), (0.0, 0.001, 0.3, 0.5, 0.8995, 0.9, 0.999)
    for size, sparsity in itertools.product(sizes, sparsities):
        assert abs(zeros_in(size, sparsity) - size * sparsity) <= 0.5, (size, sparsity)
        assert 0 <= zeros_in(size, sparsity) <= size, (size, sparsity)


def test_a_floor_displaces_zeros_to_the_next_lowest_scores() -> None:
    for sparsity, least, seed in itertools.product((0.1, 0.5, 0.8, 0.93), (0.0, 0.01, 0.05), (0, 1, 2)):
        case = f"sparsity {sparsity}, least {least}, seed {seed}"
        scores = random_scores(60, 100, 40, 80, seed=seed)
        floors = {name: max(1, math.ceil(least * score.numel())) for name, score in scores.items()}
        allocation = allocate(scores, sparsity, "global", least)
        assert allocation.zeros == plain_allocation(scores, zeros_in(280, sparsity), floors), case
        assert sum(allocation.zeros.values()) == zeros_in(280, sparsity), case
        unlimited = plain_allocation(scores, zeros_in(280, sparsity), dict.fromkeys(scores, 0))
        zeros = allocation.zeros
        assert allocation.clamped == {n: (unlimited[n], zeros[n]) for n in scores if zeros[n] < unlimited[n]}, case
        assert allocation.lowered == {}, case


def test_the_floor_clamps_some_matrix_in_the_tested_cases() -> None:
    assert allocate(random_scores(60, 100, 40, 80), 0.8, "global", 0.05).clamped == {
        "layer.0.q": (60, 57),
        "layer.1.q": (98, 95),
    }


def test_a_displaced_matrix_can_reach_its_floor_in_turn() -> None:
    scores = {"a": torch.zeros(10), "b": torch.full((10,), 1.0), "c": torch.arange(10) + 2.0}
    allocation = allocate(scores, 20 / 30, "global", 0.3)
    assert allocation.zeros == {"a": 7, "b": 7, "c": 6}
    assert allocation.clamped == {"a": (10, 7), "b": (10, 7)}


def test_a_floor_too_high_for_the_target_is_lowered_and_reported() -> None:
    for least in (0.2, 0.5, 0.9):
        allocation = allocate(random_scores(100, 100), 0.9, "global", least)
        assert sum(allocation.zeros.values()) == 180, least
        assert allocation.lowered == {ALL: pytest.approx(0.1)}, least
        assert allocation.zeros == {"layer.0.q": 90, "layer.1.q": 90}, least


def test_the_target_takes_precedence_over_one_weight_in_every_matrix() -> None:
    allocation = allocate({f"m{i}": torch.rand(3) for i in range(10)}, 0.95, "global", 0.1)
    assert sum(allocation.zeros.values()) == zeros_in(30, 0.95) == 28
    assert set(allocation.lowered) == {ALL}


def test_the_type_scope_has_the_exact_total_of_each_type() -> None:
    types = ("q.weight", "k.weight")
    zeros = allocate(
        {f"layer.{i}.{name}": torch.rand(11 + i) * (1 + i) for i in range(3) for name in types}, 0.77, "type"
    ).zeros
    for name in types:
        assert sum(count for full_name, count in zeros.items() if full_name.endswith(name)) == zeros_in(36, 0.77)
    assert len({zeros[f"layer.{i}.q.weight"] / (11 + i) for i in range(3)}) > 1


def test_the_matrix_scope_ignores_the_scores_and_the_floor() -> None:
    assert allocate(random_scores(60, 100), 0.9, "matrix", 0.5).zeros == {"layer.0.q": 54, "layer.1.q": 90}


def test_a_type_is_the_name_without_the_number_of_the_layer() -> None:
    for name, expected in {
        "bert.encoder.layer.11.attention.self.query.weight": "bert.encoder.layer.*.attention.self.query.weight",
        "layers.0.mlp.2.weight": "layers.*.mlp.2.weight",
        "3.weight": "*.weight",
        "conv1d.weight": "conv1d.weight",
    }.items():
        assert matrix_type(name) == expected


def test_groups_keep_their_order() -> None:
    names = ["layer.0.q", "layer.0.k", "layer.1.q"]
    assert group_by_scope(names, "matrix") == {name: [name] for name in names}
    assert group_by_scope(names, "type") == {"layer.*.q": ["layer.0.q", "layer.1.q"], "layer.*.k": ["layer.0.k"]}
    assert group_by_scope(names, "global") == {ALL: names}


def test_ties_go_in_the_order_of_the_matrices_on_every_run() -> None:
    allocation = allocate({name: torch.ones(10) for name in "abc"}, 0.5, "global")
    assert allocation.zeros == {"a": 9, "b": 6, "c": 0}
    assert allocation.clamped == {"a": (10, 9)}


def test_already_dead_weights_count_even_below_the_floor() -> None:
    scores = random_scores(20, 20)
    scores["layer.1.q"][:20] = -math.inf
    assert allocate(scores, 0.6, "global", 0.3).zeros == {"layer.0.q": 4, "layer.1.q": 20}
    assert allocate(scores, 0.25, "global").zeros == {"layer.0.q": 0, "layer.1.q": 20}


def test_nan_scores_are_pruned_last() -> None:
    scores = {"a": torch.tensor([math.nan, 3.0, math.nan, 4.0]), "b": torch.tensor([1.0, 2.0, 5.0, 6.0])}
    assert allocate(scores, 0.5, "global").zeros == {"a": 2, "b": 2}
