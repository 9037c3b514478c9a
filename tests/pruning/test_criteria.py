"""Criteria: one row each, checked against slow plain code and for what every criterion must give."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from spdtool import plugins
from spdtool.pruning.criteria import KNOWN_NEEDS, Stats


def magnitude(weight: list[float], gradient: list[float]) -> list[float]:
    return [abs(w) for w in weight]


PLAIN: dict[str, Callable[[list[float], list[float]], list[float]]] = {"magnitude": magnitude}
BUILTIN = [part.name for part in plugins.criteria.parts() if part.source.startswith("spdtool.")]


def test_every_builtin_criterion_has_its_row() -> None:
    assert sorted(PLAIN) == sorted(BUILTIN)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_slow_plain_code(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 6).to(dtype), torch.randn(4, 6)
    weight[0, :3] = torch.tensor([0.0, -0.0, math.inf])
    stats = Stats(gradient=gradient, gradient_squared=gradient.square())
    before = weight.clone()
    scores = plugins.criteria.get(name)(weight, stats)
    assert scores.shape == weight.shape
    assert scores.flatten().tolist() == pytest.approx(
        PLAIN[name](weight.flatten().tolist(), gradient.flatten().tolist())
    )
    assert torch.equal(weight, before), "a criterion looks and does not touch"


@pytest.mark.parametrize("name", BUILTIN)
def test_a_criterion_needs_only_what_is_observed(name: str) -> None:
    assert set(plugins.criteria.part(name).meta.get("needs", ())) <= set(KNOWN_NEEDS)


def test_a_nan_weight_stays_a_nan_score() -> None:
    assert plugins.criteria.get("magnitude")(torch.tensor([math.nan, -1.0]), Stats()).isnan().tolist() == [True, False]
