"""Allocation: exact totals in every scope, floors, and what they displace, against slow plain code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spdtool.pruning.allocation import ALL, allocate, groups, kind
from spdtool.pruning.patterns import zeros_in


def scores(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    """Matrices of these sizes, the later ones with larger scores."""
    draw = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.q": torch.rand(size, generator=draw) * (1 + i) for i, size in enumerate(sizes)}


def plain(given: dict[str, Tensor], total: int, floors: dict[str, int]) -> dict[str, int]:
    """Weight by weight, the lowest score first, from matrices that are above their floor."""
    counts = dict.fromkeys(given, 0)
    for _, name in sorted((float(x), name) for name, score in given.items() for x in score):
        if sum(counts.values()) < total and counts[name] < given[name].numel() - floors[name]:
            counts[name] += 1
    return counts


@pytest.mark.parametrize(
    ("sparsity", "least", "seed"), list(itertools.product((0.1, 0.5, 0.8, 0.93), (0.0, 0.01, 0.05), (0, 1, 2)))
)
def test_a_floor_displaces_zeros_to_the_next_lowest_scores(sparsity: float, least: float, seed: int) -> None:
    given = scores(60, 100, 40, 80, seed=seed)
    floors = {name: max(1, math.ceil(least * score.numel())) for name, score in given.items()}
    made = allocate(given, sparsity, "global", least)
    assert made.counts == plain(given, zeros_in(280, sparsity), floors)
    assert sum(made.counts.values()) == zeros_in(280, sparsity)
    free = plain(given, zeros_in(280, sparsity), dict.fromkeys(given, 0))
    assert made.clamped == {n: (free[n], made.counts[n]) for n in given if made.counts[n] < free[n]}
    assert made.least == {}


def test_some_matrix_is_clamped_in_those_cases() -> None:
    assert allocate(scores(60, 100, 40, 80), 0.8, "global", 0.05).clamped == {
        "layer.0.q": (60, 57),
        "layer.1.q": (98, 95),
    }


def test_a_displaced_matrix_can_reach_its_floor_in_turn() -> None:
    given = {"a": torch.zeros(10), "b": torch.full((10,), 1.0), "c": torch.arange(10) + 2.0}
    made = allocate(given, 20 / 30, "global", 0.3)
    assert made.counts == {"a": 7, "b": 7, "c": 6}
    assert made.clamped == {"a": (10, 7), "b": (10, 7)}


@pytest.mark.parametrize("least", [0.2, 0.5, 0.9])
def test_a_floor_that_leaves_no_room_is_lowered_and_it_says_so(least: float) -> None:
    given = scores(100, 100)
    made = allocate(given, 0.9, "global", least)
    assert sum(made.counts.values()) == 180
    assert made.least == {ALL: pytest.approx(0.1)}
    assert made.counts == {"layer.0.q": 90, "layer.1.q": 90}


def test_the_target_comes_before_one_weight_in_every_matrix() -> None:
    given = {f"m{i}": torch.rand(3) for i in range(10)}
    made = allocate(given, 0.95, "global", 0.1)
    assert sum(made.counts.values()) == zeros_in(30, 0.95) == 28
    assert set(made.least) == {ALL}


def test_the_type_scope_has_the_exact_total_of_each_kind() -> None:
    given = {f"layer.{i}.{part}": torch.rand(11 + i) * (1 + i) for i in range(3) for part in ("q.weight", "k.weight")}
    made = allocate(given, 0.77, "type")
    for part in ("q.weight", "k.weight"):
        assert sum(count for name, count in made.counts.items() if name.endswith(part)) == zeros_in(36, 0.77)
    assert len({made.counts[f"layer.{i}.q.weight"] / (11 + i) for i in range(3)}) > 1


def test_the_matrix_scope_ignores_the_scores_and_the_floor() -> None:
    assert allocate(scores(60, 100), 0.9, "matrix", 0.5).counts == {"layer.0.q": 54, "layer.1.q": 90}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", "bert.encoder.layer.*.attention.self.query.weight"),
        ("layers.0.mlp.2.weight", "layers.*.mlp.2.weight"),
        ("3.weight", "*.weight"),
        ("conv1d.weight", "conv1d.weight"),
    ],
)
def test_a_kind_is_the_name_without_the_number_of_the_layer(name: str, expected: str) -> None:
    assert kind(name) == expected


def test_groups_keep_their_order() -> None:
    names = ["layer.0.q", "layer.0.k", "layer.1.q"]
    assert groups(names, "matrix") == {name: [name] for name in names}
    assert groups(names, "type") == {"layer.*.q": ["layer.0.q", "layer.1.q"], "layer.*.k": ["layer.0.k"]}
    assert groups(names, "global") == {ALL: names}


def test_ties_go_in_the_order_of_the_matrices_on_every_run() -> None:
    given = {name: torch.ones(10) for name in "abc"}
    assert allocate(given, 0.5, "global").counts == {"a": 9, "b": 6, "c": 0}
    assert allocate(given, 0.5, "global").clamped == {"a": (10, 9)}


def test_the_dead_count_wherever_they_are_even_below_the_floor() -> None:
    given = scores(20, 20)
    given["layer.1.q"][:20] = -math.inf
    made = allocate(given, 0.6, "global", 0.3)
    assert made.counts == {"layer.0.q": 4, "layer.1.q": 20}
    assert allocate(given, 0.25, "global").counts == {"layer.0.q": 0, "layer.1.q": 20}


def test_scores_that_are_no_number_go_last() -> None:
    given = {"a": torch.tensor([math.nan, 3.0, math.nan, 4.0]), "b": torch.tensor([1.0, 2.0, 5.0, 6.0])}
    assert allocate(given, 0.5, "global").counts == {"a": 2, "b": 2}
