"""Find the shape of an encoder that loses the least within a budget of milliseconds or bytes.

Each layer has two choices of its own: how many heads remain, and how wide its feed-forward is.
Their losses and their costs add up, so this is a knapsack with one item out of each group, solved
by a dynamic program over the sublayers. It is exact until there are more than `MOST_STATES` sums of
costs; then costs are compared in as many steps. ZipLM (Kurtic et al. 2023, arXiv 2302.04089)
searches in a similar way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdtool.errors import RecipeError
from spdtool.pruning.structure import LayerLosses, LayerShape
from spdtool.run.records import LayerCosts

MOST_STATES = 2000
BALANCES = 16  # halvings of the interval of weights between two budgets


@dataclass(frozen=True)
class Choices:
    """What one sublayer can become: the loss and the cost of each size, float64 [sizes], on the CPU."""

    sizes: tuple[int, ...]
    losses: Tensor
    costs: Tensor


def find_shape(losses: Sequence[LayerLosses], costs: LayerCosts, budget: float) -> tuple[LayerShape, ...]:
    """Find the shape with the least total loss whose total cost is within `budget`.

    Args:
        losses: of each layer.
        costs: of a layer of every shape, and of what is outside of the layers.
        budget: for the whole encoder, in the unit of `costs`.

    Raises:
        RecipeError: even the smallest shape costs more.
    """
    # Heads and neurons of a layer are choices of their own: their costs and losses add up.
    groups = list_choices(losses, costs)
    least = costs.outside + sum(float(group.costs.min()) for group in groups)
    if least > budget:
        raise RecipeError(
            f"no shape costs {budget:.4g} {costs.unit} or less: the smallest costs {least:.4g} {costs.unit}",
            "ask for less",
        )
    sizes = solve_knapsack(groups, budget - costs.outside)
    return tuple(LayerShape(heads, neurons) for heads, neurons in zip(sizes[::2], sizes[1::2], strict=True))


def find_shape_within(
    losses: Sequence[LayerLosses], costs: Sequence[LayerCosts], budgets: Sequence[float]
) -> tuple[LayerShape, ...]:
    """Find a shape with little loss within two budgets at once, such as milliseconds and bytes.

    A shape within both is also within every weighted mean of them. The weight is searched at which
    the shape of least loss within the mean is within each: it loses little, though not always the
    least.

    Raises:
        RecipeError: no such shape was found.
    """
    if len(costs) == 1:
        return find_shape(losses, costs[0], budgets[0])
    assert len(costs) == len(budgets) == 2
    low, high = 0.0, 1.0  # weight of the second budget
    # Either budget alone first: mostly one of them decides.
    for weight in (low, high):
        shape = find_shape(losses, mix_costs(costs, budgets, weight), 1.0)
        if _is_within(shape, costs, budgets):
            return shape
    for _ in range(BALANCES):
        weight = (low + high) / 2
        shape = find_shape(losses, mix_costs(costs, budgets, weight), 1.0)
        if _is_within(shape, costs, budgets):
            return shape
        # The more the second budget weighs, the less of it is spent.
        if cost_of_shape(shape, costs[1]) > budgets[1]:
            low = weight
        else:
            high = weight
    asked = " and ".join(f"{budget:.4g} {cost.unit}" for cost, budget in zip(costs, budgets, strict=True))
    raise RecipeError(f"no shape was found within {asked} at once", "ask for less of one of them")


def mix_costs(costs: Sequence[LayerCosts], budgets: Sequence[float], weight: float) -> LayerCosts:
    """Return the weighted mean of two costs, each as a fraction of its budget; `weight` is the second's."""
    shares = ((1 - weight) / budgets[0], weight / budgets[1])
    widths = sorted({*costs[0].neurons, *costs[1].neurons})
    heads = [
        shares[0] * first + shares[1] * second for first, second in zip(costs[0].heads, costs[1].heads, strict=True)
    ]
    neurons = {width: shares[0] * costs[0].of_width(width) + shares[1] * costs[1].of_width(width) for width in widths}
    outside = shares[0] * costs[0].outside + shares[1] * costs[1].outside
    return LayerCosts(unit="of the budget", heads=heads, neurons=neurons, outside=outside)


def smallest_cost(losses: Sequence[LayerLosses], costs: LayerCosts) -> float:
    """Return the cost of the cheapest shape."""
    return costs.outside + sum(float(group.costs.min()) for group in list_choices(losses, costs))


def cost_of_shape(shape: Sequence[LayerShape], costs: LayerCosts) -> float:
    """Return the cost of an encoder of that shape."""
    return costs.outside + sum(costs.heads[layer.heads] + costs.of_width(layer.neurons) for layer in shape)


def loss_of_shape(shape: Sequence[LayerShape], losses: Sequence[LayerLosses]) -> float:
    """Return the sum of the losses of a shape."""
    pairs = zip(shape, losses, strict=True)
    return sum(layer_losses.heads[layer.heads] + layer_losses.neurons[layer.neurons] for layer, layer_losses in pairs)


def list_choices(losses: Sequence[LayerLosses], costs: LayerCosts) -> list[Choices]:
    """List the choices of every sublayer: heads of layer 0, neurons of layer 0, heads of layer 1 and so on."""
    groups = []
    for layer in losses:
        heads = tuple(range(len(layer.heads)))
        groups.append(Choices(heads, _vector(layer.heads), _vector(costs.heads[count] for count in heads)))
        widths = tuple(sorted(layer.neurons))
        width_losses = _vector(layer.neurons[width] for width in widths)
        groups.append(Choices(widths, width_losses, _vector(costs.of_width(width) for width in widths)))
    return groups


def solve_knapsack(groups: Sequence[Choices], budget: float) -> list[int]:
    """Choose one size of every group: least total loss with a total cost within `budget`, which some choice meets.

    A state is a sum of costs and of losses; only those stay that no other one beats in both.
    """
    cheapest = [float(group.costs.min()) for group in groups]
    # The last bits of two sums of the same numbers differ.
    limit = budget + 1e-9 * abs(budget)
    spent, lost = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for number, group in enumerate(groups):
        costs, losses = (spent[:, None] + group.costs).flatten(), (lost[:, None] + group.losses).flatten()
        states = (costs + sum(cheapest[number + 1 :]) <= limit).nonzero().flatten()
        states = _select_states(states, costs, losses)
        spent, lost = costs[states], losses[states]
        steps.append((states // len(group.sizes), states % len(group.sizes)))
    state, sizes = int(lost.argmin()), []
    for group, (parents, chosen) in zip(reversed(groups), reversed(steps), strict=True):
        sizes.append(group.sizes[int(chosen[state])])
        state = int(parents[state])
    return sizes[::-1]


def _select_states(states: Tensor, costs: Tensor, losses: Tensor) -> Tensor:
    """Select the states that no other one beats in cost and loss; of very many, the best of each step of the cost."""
    # Two stable sorts: by cost, and of equal costs by loss.
    states = states[losses[states].argsort(stable=True)]
    states = states[costs[states].argsort(stable=True)]
    ordered = losses[states]
    best_before = torch.cat([ordered.new_tensor([torch.inf]), ordered.cummin(0).values[:-1]])
    states = states[ordered < best_before]
    if len(states) <= MOST_STATES:
        return states
    spread = costs[states] - costs[states[0]]
    steps = (spread / spread[-1] * MOST_STATES).long()
    # Losses fall along the states: the last of a step has the least.
    is_last = torch.cat([steps[1:] != steps[:-1], steps.new_ones(1, dtype=torch.bool)])
    return states[is_last]


def _vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _is_within(shape: Sequence[LayerShape], costs: Sequence[LayerCosts], budgets: Sequence[float]) -> bool:
    pairs = zip(costs, budgets, strict=True)
    return all(cost_of_shape(shape, cost) <= budget * (1 + 1e-9) for cost, budget in pairs)
