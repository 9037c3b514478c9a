"""Criteria: one row each, checked against slow plain code and for what every criterion must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.pruning.masks import Masks
from spdtool.pruning.observation import Observation
from spdtool.pruning.statistics import STATISTICS, Settings, Stats

SETTINGS = Settings(block=4, dampening=0.1, penalty=0.5)
OUT, IN = 3, 5


@dataclass
class Seen:
    """A layer's weight, [OUT, IN], its gradient at each step, and the tokens that went into it."""

    weight: Tensor
    gradients: list[Tensor]
    tokens: Tensor


def seen(dtype: torch.dtype = torch.float32) -> Seen:
    """Real gradients, by autograd, of a least-squares loss on five batches of random tokens."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=draw).to(dtype)
    gradients, tokens = [], []
    for _ in range(5):
        leaf = weight.float().clone().requires_grad_(True)
        x, y = torch.randn(7, IN, generator=draw), torch.randn(7, OUT, generator=draw)
        gradients += torch.autograd.grad((x @ leaf.T - y).square().mean(), leaf)
        tokens.append(x)
    return Seen(weight, gradients, torch.cat(tokens))


def stats_of(what: Seen, needs: tuple[str, ...]) -> Stats:
    """The statistics as they are gathered in a run."""
    layer = nn.Linear(IN, OUT, bias=False).to(what.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(what.weight)
    observation = Observation(Masks({"w": layer.weight}), needs, SETTINGS, {"w": layer})
    for gradient in what.gradients:
        layer.weight.grad = gradient.to(what.weight.dtype)
        observation.gradients(1.0)
    with observation.watching(None), torch.no_grad():
        layer(what.tokens.to(what.weight.dtype))
    return observation.stats("w")


def places() -> list[tuple[int, int]]:
    return [(row, column) for row in range(OUT) for column in range(IN)]


def each(score: Callable[[float, list[float]], float]) -> Callable[[Seen], list[float]]:
    """A score of each weight alone, from its value and its gradients."""
    return lambda s: [score(float(s.weight[p]), [float(g[p]) for g in s.gradients]) for p in places()]


def wanda(s: Seen) -> list[float]:
    norms = [math.sqrt(sum(float(t[c]) ** 2 for t in s.tokens) / len(s.tokens)) for c in range(IN)]
    return [abs(float(s.weight[row, column])) * norms[column] for row, column in places()]


def movement_soft(s: Seen) -> list[float]:
    scores, squares = [0.0] * (OUT * IN), 0.0
    for step, gradient in enumerate(s.gradients, start=1):
        change = [float(s.weight[p]) * float(gradient[p]) for p in places()]
        squares += sum(c * c for c in change) / len(change)
        scale = math.sqrt(squares / step)
        for i, c in enumerate(change):
            sigmoid = 1 / (1 + math.exp(-scores[i]))
            scores[i] -= SETTINGS.score_rate * (c / scale + SETTINGS.penalty * sigmoid * (1 - sigmoid))
    return scores


def obert(s: Seen) -> list[float]:
    inverse = [m.inverse() for m in fishers(s)]
    flat = s.weight.double().flatten()
    return [float(flat[i]) ** 2 / (2 * float(inverse[i // 4][i % 4, i % 4])) for i in range(OUT * IN)]


def fishers(s: Seen) -> list[Tensor]:
    """The Fisher matrix of all weights in float64, cut into blocks of 4; the last one is shorter."""
    flats = [g.double().flatten() for g in s.gradients]
    whole = sum((torch.outer(f, f) for f in flats), torch.zeros(OUT * IN, OUT * IN, dtype=torch.float64)) / len(flats)
    damp = SETTINGS.dampening * whole.diagonal().mean()
    blocks = [whole[i : i + 4, i : i + 4] for i in range(0, OUT * IN, 4)]
    return [b + damp * torch.eye(len(b), dtype=torch.float64) for b in blocks]


def gram(s: Seen) -> Tensor:
    whole = sum((torch.outer(t, t) for t in s.tokens.double()), torch.zeros(IN, IN, dtype=torch.float64))
    whole = whole / len(s.tokens)
    return whole + SETTINGS.dampening * whole.diagonal().mean() * torch.eye(IN, dtype=torch.float64)


def layerwise(s: Seen) -> list[float]:
    inverse = gram(s).inverse()
    return [float(s.weight[row, column]) ** 2 / float(inverse[column, column]) for row, column in places()]


PLAIN: dict[str, Callable[[Seen], list[float]]] = {
    "magnitude": each(lambda w, g: abs(w)),
    "taylor": each(lambda w, g: abs(w * sum(g) / len(g))),
    "fisher": each(lambda w, g: w * w * sum(x * x for x in g) / len(g) / 2),
    "movement": each(lambda w, g: -sum(w * x for x in g)),
    "movement-soft": movement_soft,
    "wanda": wanda,
    "obert": obert,
    "layerwise": layerwise,
}


def plain_blocks(s: Seen, alive: Tensor) -> Tensor:
    """Each Fisher block by itself: the survivors move by F_ll^-1 F_ld w_d."""
    flat, live = s.weight.double().flatten(), alive.flatten()
    for number, block in enumerate(fishers(s)):
        members = range(4 * number, 4 * number + len(block))
        flat = move(flat, block, [i for i in members if live[i]], [i for i in members if not live[i]], 4 * number)
    return flat.view(OUT, IN)


def plain_rows(s: Seen, alive: Tensor) -> Tensor:
    """Each row by itself."""
    rows = []
    for row, live in zip(s.weight.double(), alive, strict=True):
        split = [[i for i in range(IN) if bool(live[i]) == side] for side in (True, False)]
        rows.append(move(row, gram(s), *split, 0))
    return torch.stack(rows)


def move(weight: Tensor, curvature: Tensor, live: list[int], dead: list[int], start: int) -> Tensor:
    moved, inside, outside = weight.clone(), [i - start for i in live], [i - start for i in dead]
    moved[live] += curvature[inside][:, inside].inverse() @ curvature[inside][:, outside] @ weight[dead]
    moved[dead] = 0
    return moved


UPDATES: dict[str, Callable[[Seen, Tensor], Tensor]] = {"obert": plain_blocks, "layerwise": plain_rows}
BUILTIN = [part.name for part in plugins.criteria.entries() if part.source.startswith("spdtool.")]
MENDING = [part.name for part in plugins.criteria.entries() if "update" in part.meta]


def test_every_builtin_criterion_has_its_row() -> None:
    assert sorted(PLAIN) == sorted(BUILTIN)
    assert sorted(UPDATES) == sorted(MENDING)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_slow_plain_code(name: str, dtype: torch.dtype) -> None:
    what = seen(dtype)
    stats = stats_of(what, plugins.criteria.entry(name).meta.get("needs", ()))
    before = what.weight.clone()
    scores = plugins.criteria.get(name)(what.weight, stats)
    assert scores.shape == what.weight.shape
    expected = torch.tensor(PLAIN[name](what)).view(OUT, IN)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(scores.float(), expected, **close)
    assert torch.equal(what.weight, before), "a criterion looks and does not touch"


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_survivors_are_those_of_slow_plain_code(name: str, sparsity: float) -> None:
    what = seen()
    stats = stats_of(what, plugins.criteria.entry(name).meta["needs"])
    alive = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) >= sparsity
    before = what.weight.clone()
    mended = plugins.criteria.entry(name).meta["update"](what.weight, alive, stats)
    torch.testing.assert_close(mended, UPDATES[name](what, alive).float(), rtol=1e-3, atol=1e-4)
    assert bool((mended[~alive] == 0).all())
    assert torch.equal(what.weight, before)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_criterion_needs_only_what_is_observed(name: str) -> None:
    assert set(plugins.criteria.entry(name).meta.get("needs", ())) <= set(STATISTICS)


def test_the_magnitude_of_zero_infinity_and_nan() -> None:
    scores = plugins.criteria.get("magnitude")(torch.tensor([0.0, -0.0, -math.inf, math.nan]), Stats())
    assert scores[:3].tolist() == [0.0, 0.0, math.inf]
    assert bool(scores[3].isnan())


@pytest.mark.parametrize("name", ["movement", "movement-soft"])
def test_a_learned_score_is_the_magnitude_before_the_first_step(name: str) -> None:
    assert plugins.criteria.get(name)(torch.tensor([2.0, -3.0]), Stats()).tolist() == [2.0, 3.0]
