"""Pruning criteria, one row each, against slow plain code and the contract of every criterion."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import RecipeError
from spdtool.pruning import statistics
from spdtool.pruning.masks import Masks
from spdtool.pruning.observer import Observer
from spdtool.pruning.statistics import STATISTICS, Stats
from spdtool.recipe.training import Prune

SECTION = Prune(fisher_block=4, dampening=0.1, penalty=0.5)
OUT, IN = 3, 5


@dataclass
class Layer:
    """A weight [OUT, IN], its gradients [OUT, IN] of each step, and its input tokens [tokens, IN]."""

    weight: Tensor
    gradients: list[Tensor]
    tokens: Tensor


def make_layer(dtype: torch.dtype = torch.float32) -> Layer:
    """Compute the gradients of a least-squares loss on five batches of random tokens."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=draw).to(dtype)
    gradients, tokens = [], []
    for _ in range(5):
        leaf = weight.float().clone().requires_grad_(True)
        x, y = torch.randn(7, IN, generator=draw), torch.randn(7, OUT, generator=draw)
        gradients += torch.autograd.grad((x @ leaf.T - y).square().mean(), leaf)
        tokens.append(x)
    return Layer(weight, gradients, torch.cat(tokens))


def stats_of(layer: Layer, needs: tuple[str, ...]) -> Stats:
    """Gather the statistics of a layer with the observer that a run uses."""
    linear = nn.Linear(IN, OUT, bias=False).to(layer.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
    observer = Observer(Masks({"w": linear.weight}), needs, SECTION, {"w": linear})
    for gradient in layer.gradients:
        linear.weight.grad = gradient.to(layer.weight.dtype)
        observer.add_gradients()
    with observer.observe_inputs(None), torch.no_grad():
        linear(layer.tokens.to(layer.weight.dtype))
    return observer.stats("w")


def positions() -> list[tuple[int, int]]:
    return [(row, column) for row in range(OUT) for column in range(IN)]


def each(score: Callable[[float, list[float]], float]) -> Callable[[Layer], list[float]]:
    """Score each weight by a function of its value and its gradients."""
    return lambda layer: [score(float(layer.weight[p]), [float(g[p]) for g in layer.gradients]) for p in positions()]


def wanda(layer: Layer) -> list[float]:
    norms = [math.sqrt(sum(float(t[c]) ** 2 for t in layer.tokens) / len(layer.tokens)) for c in range(IN)]
    return [abs(float(layer.weight[row, column])) * norms[column] for row, column in positions()]


def movement_soft(layer: Layer) -> list[float]:
    scores, squares = [0.0] * (OUT * IN), 0.0
    for step, gradient in enumerate(layer.gradients, start=1):
        change = [float(layer.weight[p]) * float(gradient[p]) for p in positions()]
        squares += sum(c * c for c in change) / len(change)
        scale = math.sqrt(squares / step)
        for i, c in enumerate(change):
            sigmoid = 1 / (1 + math.exp(-scores[i]))
            scores[i] -= SECTION.score_rate * (c / scale + SECTION.penalty * sigmoid * (1 - sigmoid))
    return scores


def obert(layer: Layer) -> list[float]:
    inverse = [m.inverse() for m in fishers(layer)]
    flat = layer.weight.double().flatten()
    return [float(flat[i]) ** 2 / (2 * float(inverse[i // 4][i % 4, i % 4])) for i in range(OUT * IN)]


def fishers(layer: Layer) -> list[Tensor]:
    """Return the 4 x 4 diagonal blocks of the Fisher matrix in float64; the last one is shorter."""
    flats = [g.double().flatten() for g in layer.gradients]
    fisher = sum((torch.outer(f, f) for f in flats), torch.zeros(OUT * IN, OUT * IN, dtype=torch.float64)) / len(flats)
    damp = SECTION.dampening * fisher.diagonal().mean()
    blocks = [fisher[i : i + 4, i : i + 4] for i in range(0, OUT * IN, 4)]
    return [b + damp * torch.eye(len(b), dtype=torch.float64) for b in blocks]


def gram(layer: Layer) -> Tensor:
    second_moment = sum((torch.outer(t, t) for t in layer.tokens.double()), torch.zeros(IN, IN, dtype=torch.float64))
    second_moment = second_moment / len(layer.tokens)
    return second_moment + SECTION.dampening * second_moment.diagonal().mean() * torch.eye(IN, dtype=torch.float64)


def layerwise(layer: Layer) -> list[float]:
    inverse = gram(layer).inverse()
    return [float(layer.weight[row, column]) ** 2 / float(inverse[column, column]) for row, column in positions()]


# a new criterion is one row here, and one in UPDATES if it updates the survivors
PLAIN: dict[str, Callable[[Layer], list[float]]] = {
    "magnitude": each(lambda w, g: abs(w)),
    "taylor": each(lambda w, g: abs(w * sum(g) / len(g))),
    "fisher": each(lambda w, g: w * w * sum(x * x for x in g) / len(g) / 2),
    "movement": each(lambda w, g: -sum(w * x for x in g)),
    "movement-soft": movement_soft,
    "wanda": wanda,
    "obert": obert,
    "layerwise": layerwise,
}


def plain_blocks(layer: Layer, alive: Tensor) -> Tensor:
    """Update each Fisher block on its own: the survivors move by F_ll^-1 F_ld w_d."""
    flat, live = layer.weight.double().flatten(), alive.flatten()
    for number, block in enumerate(fishers(layer)):
        members = range(4 * number, 4 * number + len(block))
        flat = move(flat, block, [i for i in members if live[i]], [i for i in members if not live[i]], 4 * number)
    return flat.view(OUT, IN)


def plain_rows(layer: Layer, alive: Tensor) -> Tensor:
    """Update each row on its own, with the second moment of the inputs as curvature."""
    rows = []
    for row, live in zip(layer.weight.double(), alive, strict=True):
        split = [[i for i in range(IN) if bool(live[i]) == side] for side in (True, False)]
        rows.append(move(row, gram(layer), *split, 0))
    return torch.stack(rows)


def move(weight: Tensor, curvature: Tensor, live: list[int], dead: list[int], start: int) -> Tensor:
    moved, inside, outside = weight.clone(), [i - start for i in live], [i - start for i in dead]
    moved[live] += curvature[inside][:, inside].inverse() @ curvature[inside][:, outside] @ weight[dead]
    moved[dead] = 0
    return moved


def make_wide_layer() -> Layer:
    """Make a layer of 4 x 8, which divides into blocks of 1x4, 2x4 and 4x4."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randn(40, 8, generator=draw)
    gradients = [torch.randn(4, 8, generator=draw) for _ in range(12)]
    return Layer(torch.randn(4, 8, generator=draw), gradients, tokens)


def cost_of_removal(weight: Tensor, curvature: Tensor, dead: list[int]) -> float:
    """Minimise d^T C d / 2 over the changes d that zero the dead weights, by the normal equations."""
    live = [index for index in range(len(weight)) if index not in dead]
    change = torch.zeros_like(weight)
    change[dead] = -weight[dead]
    change[live] = -curvature[live][:, live].inverse() @ curvature[live][:, dead] @ change[dead]
    return float(change @ curvature @ change) / 2


def plain_block_cost(name: str, layer: Layer, rows: list[int], columns: list[int]) -> float:
    """Sum the cost of removing a block over its outputs, which have independent curvatures."""
    values, norms = layer.weight.double(), layer.tokens.double().square().mean(0).sqrt()
    block = values[rows][:, columns]
    mean_gradient = torch.stack(layer.gradients).double().mean(0)[rows][:, columns]
    if name == "magnitude":
        return float(block.norm())
    if name == "taylor":
        return abs(float((block * mean_gradient).sum()))
    if name == "wanda":
        return float((block * norms[columns]).norm())
    if name == "layerwise":
        # The scores leave out the factor 1/2.
        return sum(2 * cost_of_removal(values[row], gram_of(layer), columns) for row in rows)
    flat = torch.stack(layer.gradients).double().flatten(1)
    fisher = flat.T @ flat / len(flat)
    damp = SECTION.dampening * fisher.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    total = 0.0
    for row in rows:
        own_fisher = fisher[8 * row : 8 * row + 8, 8 * row : 8 * row + 8] + damp
        total += cost_of_removal(values[row], own_fisher, columns)
    return total


def gram_of(layer: Layer) -> Tensor:
    gram = layer.tokens.double().T @ layer.tokens.double() / len(layer.tokens)
    return gram + SECTION.dampening * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_the_score_of_a_block_is_the_cost_of_removing_all_of_it() -> None:
    layer = make_wide_layer()
    section = Prune(fisher_block=8, dampening=SECTION.dampening)
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
    for entry in plugins.criteria.entries():
        if "block_scores" not in entry.meta:
            continue
        observer = Observer(Masks({"w": linear.weight}), entry.meta.get("needs", ()), section, {"w": linear})
        for gradient in layer.gradients:
            linear.weight.grad = gradient
            observer.add_gradients()
        with observer.observe_inputs(None), torch.no_grad():
            linear(layer.tokens)
        for rows, columns in ((1, 4), (2, 4), (4, 4), (2, 2)):
            scores = entry.meta["block_scores"](layer.weight, observer.stats("w"), (rows, columns))
            for i, j in itertools.product(range(4 // rows), range(8 // columns)):
                block_rows = list(range(rows * i, rows * i + rows))
                block_columns = list(range(columns * j, columns * j + columns))
                expected = plain_block_cost(entry.name, layer, block_rows, block_columns)
                assert float(scores[i, j]) == pytest.approx(expected, rel=1e-3), (entry.name, rows, columns, i, j)


def test_a_block_of_weights_must_fit_into_the_blocks_of_the_fisher_matrix() -> None:
    stats = Stats(fisher_blocks=torch.eye(6).expand(4, 6, 6))
    with pytest.raises(RecipeError, match="the pattern has blocks of 4 inputs, which do not divide it") as raised:
        plugins.criteria.entry("obert").meta["block_scores"](torch.randn(3, 8), stats, (1, 4))
    assert raised.value.hint == "--set prune.fisher_block=16"


UPDATES: dict[str, Callable[[Layer, Tensor], Tensor]] = {"obert": plain_blocks, "layerwise": plain_rows}
BUILTIN = [entry.name for entry in plugins.criteria.entries() if entry.source.startswith("spdtool.")]
UPDATING = [entry.name for entry in plugins.criteria.entries() if "update" in entry.meta]


def test_every_builtin_criterion_has_its_row() -> None:
    assert sorted(PLAIN) == sorted(BUILTIN)
    assert sorted(UPDATES) == sorted(UPDATING)


def test_scores_equal_those_of_slow_plain_code() -> None:
    for (name, plain), dtype in itertools.product(PLAIN.items(), (torch.float32, torch.bfloat16)):
        case = f"{name} of {dtype}"
        layer = make_layer(dtype)
        stats = stats_of(layer, plugins.criteria.entry(name).meta.get("needs", ()))
        before = layer.weight.clone()
        scores = plugins.criteria.get(name)(layer.weight, stats)
        assert scores.shape == layer.weight.shape, case
        expected = torch.tensor(plain(layer)).view(OUT, IN)
        rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (0.05, 0.01)
        torch.testing.assert_close(scores.float(), expected, rtol=rtol, atol=atol, msg=lambda m, c=case: f"{c}: {m}")
        assert torch.equal(layer.weight, before), f"{case}: a criterion looks and does not touch"


def test_updated_survivors_equal_those_of_slow_plain_code() -> None:
    for (name, plain), sparsity in itertools.product(UPDATES.items(), (0.0, 0.2, 0.5, 0.8, 1.0)):
        case = f"{name} at {sparsity}"
        layer = make_layer()
        stats = stats_of(layer, plugins.criteria.entry(name).meta["needs"])
        alive = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) >= sparsity
        before = layer.weight.clone()
        updated = plugins.criteria.entry(name).meta["update"](layer.weight, alive, stats)
        expected = plain(layer, alive).float()
        torch.testing.assert_close(updated, expected, rtol=1e-3, atol=1e-4, msg=lambda m, c=case: f"{c}: {m}")
        assert bool((updated[~alive] == 0).all()), case
        assert torch.equal(layer.weight, before), case


def test_every_need_of_a_criterion_is_an_observed_statistic() -> None:
    for name in BUILTIN:
        assert set(plugins.criteria.entry(name).meta.get("needs", ())) <= set(STATISTICS), name


def test_the_magnitude_of_zero_infinity_and_nan() -> None:
    scores = plugins.criteria.get("magnitude")(torch.tensor([0.0, -0.0, -math.inf, math.nan]), Stats())
    assert scores[:3].tolist() == [0.0, 0.0, math.inf]
    assert bool(scores[3].isnan())


def test_a_learned_score_is_the_magnitude_before_the_first_step() -> None:
    for name in ("movement", "movement-soft"):
        assert plugins.criteria.get(name)(torch.tensor([2.0, -3.0]), Stats()).tolist() == [2.0, 3.0], name


def test_the_criteria_of_the_guide_rank_update_and_score_blocks(
    clean_plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path(__file__).parents[2] / "docs/how-to/write-a-criterion.md"
    monkeypatch.setattr(statistics, "STATISTICS", STATISTICS.copy())
    names = {"register_statistic": statistics.register_statistic, "Statistic": statistics.Statistic}
    for source in re.findall(r"^```python\n(.*?)^```", guide.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(source, str(guide), "exec"), names)
    layer = make_layer()
    stats = stats_of(layer, ("gradient_squared",))
    root_mean_square = torch.stack(layer.gradients).square().mean(0).sqrt()
    torch.testing.assert_close(
        plugins.criteria.get("sensitivity")(layer.weight, stats), layer.weight.abs() * root_mean_square
    )
    alive = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) >= 0.5
    updated = plugins.criteria.entry("updated").meta["update"](layer.weight, alive, stats)
    assert bool((updated[~alive] == 0).all())
    torch.testing.assert_close(updated.norm(), layer.weight.norm())
    blocks = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 1.0, -5.0, 4.0]])
    assert plugins.criteria.entry("largest").meta["block_scores"](blocks, stats, (1, 2)).tolist() == [[2, 3], [1, 5]]
    sign = statistics.STATISTICS["gradient_sign"](layer.weight, SECTION)
    assert sign.is_learned
    sign.add_gradient(statistics.WeightGradient(layer.gradients[0], layer.weight))
    assert torch.equal(sign.sum(), layer.gradients[0].sign())
