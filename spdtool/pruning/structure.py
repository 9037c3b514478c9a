"""Structured pruning: which heads and neurons of a layer go, what that costs, and how the others make up for it.

The loss is the squared error of the layer's own output. With W the matrix whose columns read the
structures and H the second moment of its inputs, removing the columns S costs 1/2 tr(W_S
[H^-1]_SS^-1 W_S^T), and the best remaining columns are W_R - W_S [H^-1]_SS^-1 [H^-1]_SR (Hassibi &
Stork 1992; of whole structures: Kurtic et al. 2023, ZipLM, arXiv 2302.04089). Structures go one at
a time, the cheapest first, each after the others have made up for those before it. The costs add up
to the loss of the whole removal.

Where the layer has a bias, it makes up for what is removed too: H is then the covariance of the
inputs, and the bias takes over the mean of what the weights lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from spdtool.data.tokens import Batch
from spdtool.errors import RecipeError
from spdtool.models.structures import WIDTH_STEP, LayerStructures, Structures
from spdtool.pruning.observer import RealTokens, make_input_hook
from spdtool.pruning.second_order import factorize
from spdtool.pruning.statistics import InputGram, InputMean
from spdtool.recipe.training import Prune

MOST_DOWNDATES = 96  # of H^-1 for one layer. A wide layer loses several neurons at once: one by one would take minutes


@dataclass(frozen=True)
class LayerShape:
    """Numbers of heads and neurons that a layer keeps."""

    heads: int
    neurons: int


EncoderShape = tuple[LayerShape, ...]
"""The shape of each layer, first to last."""


@dataclass(frozen=True)
class LayerLosses:
    """Half the mean squared error of a layer's outputs for each number of structures that remain.

    Attributes:
        heads: index is the number of remaining heads, from 0 to all (0.0).
        neurons: remaining neurons, a multiple of `WIDTH_STEP` or all (0.0), to the loss.
    """

    heads: list[float]
    neurons: dict[int, float]


@dataclass(frozen=True)
class Removal:
    """Structures in the order in which they go.

    Attributes:
        order: indices of the removed structures, the cheapest first.
        losses: losses[n] is the loss after the first n of `order` are gone.
        weight: the output matrix afterwards; columns of removed structures are exact zeros.
    """

    order: list[int]
    losses: list[float]
    weight: Tensor


def full_shape(layers: Sequence[LayerStructures]) -> EncoderShape:
    """Return the shape of an encoder from which nothing was removed."""
    return tuple(LayerShape(layer.heads.count, layer.neurons.count) for layer in layers)


def choose_shape(section: Prune, full: EncoderShape) -> EncoderShape:
    """Read the shape that a recipe asks for.

    Args:
        full: shape of the encoder before anything is removed.

    Raises:
        RecipeError: it is of another number of layers, or keeps more than there is.
    """
    if not section.shape:
        heads = 1.0 if section.heads is None else section.heads
        neurons = 1.0 if section.neurons is None else section.neurons
        return tuple(
            LayerShape(round(heads * layer.heads), nearest_width(neurons * layer.neurons, layer.neurons))
            for layer in full
        )
    if len(section.shape) != len(full):
        raise RecipeError(
            f"prune.shape has {len(section.shape)} layers; the student has {len(full)}",
            "give [heads, neurons] for each of its layers",
        )
    chosen = []
    for number, ((live_heads, live_neurons), layer) in enumerate(zip(section.shape, full, strict=True), 1):
        if not 0 <= live_heads <= layer.heads or not 0 <= live_neurons <= layer.neurons:
            raise RecipeError(
                f"layer {number} of prune.shape keeps {live_heads} heads and {live_neurons} neurons; "
                f"there are {layer.heads} and {layer.neurons}"
            )
        chosen.append(LayerShape(live_heads, live_neurons))
    return tuple(chosen)


def nearest_width(width: float, neurons: int) -> int:
    """Round a number of neurons to the nearest of `possible_widths(neurons)`."""
    return min(possible_widths(neurons), key=lambda possible: abs(possible - width))


def interpolate_shape(full: EncoderShape, target: EncoderShape, progress: float) -> EncoderShape:
    """Return the shape between two others, each number rounded to the nearest.

    Args:
        progress: from 0, the full shape, to 1, the target.
    """
    shapes = []
    for start, end in zip(full, target, strict=True):
        heads = start.heads - round(progress * (start.heads - end.heads))
        neurons = start.neurons - round(progress * (start.neurons - end.neurons))
        shapes.append(LayerShape(heads, neurons))
    return tuple(shapes)


def shape_sparsity(layers: Sequence[LayerStructures], shape: EncoderShape) -> float:
    """Return the share of the matrices' weights that a shape leaves zero."""
    zeros = size = 0
    for layer, remaining in zip(layers, shape, strict=True):
        for structures, count in ((layer.heads, remaining.heads), (layer.neurons, remaining.neurons)):
            dead_share = (structures.count - count) / structures.count
            for linear in (*structures.inputs.values(), structures.output):
                size += linear.weight.numel()
                zeros += round(dead_share * linear.weight.numel())
    return zeros / size


def possible_widths(neurons: int) -> list[int]:
    """List the widths that a layer of `neurons` may keep, rising: 0, multiples of `WIDTH_STEP`, all."""
    return [*range(0, neurons, WIDTH_STEP), neurons]


def remove_structures(
    weight: Tensor, gram: Tensor, size: int, count: int, alive: Tensor | None = None, group: int = 1
) -> Removal:
    """Remove structures from a matrix, the cheapest first, and update the remaining columns after each.

    Args:
        weight: [outputs, structures x size].
        gram: second moment of the inputs, dampened: [inputs, inputs].
        size: columns of one structure.
        count: structures to remove.
        alive: structures that are there; None: all. The others must have no weight.
        group: structures that go at once, the cheapest by themselves; their joint cost counts, in equal shares.
    """
    structures = weight.shape[1] // size
    remaining = torch.arange(structures, device=weight.device)
    if alive is not None:
        remaining = remaining[alive]
    columns = _columns(remaining, size)
    # float64: thousands of downdates would leave nothing of float32's digits
    current = weight[:, columns].double()
    inverse = torch.cholesky_inverse(factorize(gram[columns][:, columns].double()))
    order: list[int] = []
    losses = [0.0]
    live = torch.ones(len(remaining), dtype=torch.bool, device=weight.device)
    while len(order) < count:
        batch = min(group, count - len(order))
        costs = _costs(current, inverse, size).masked_fill(~live, torch.inf)
        chosen = costs.topk(batch, largest=False).indices
        removed = _columns(chosen, size)
        cost, loss_before = _remove_columns(current, inverse, removed), losses[-1]
        losses += [loss_before + cost * share / batch for share in range(1, batch + 1)]
        order += remaining[chosen].tolist()
        live[chosen] = False
        if 4 * int(live.sum()) <= 3 * len(remaining):  # the dead quarter costs time, and nothing reads it again
            live_columns = _columns(live.nonzero().flatten(), size)
            current, inverse = current[:, live_columns], inverse[live_columns][:, live_columns]
            remaining, live = remaining[live], live[live]
        else:
            # exact zeros in place of roundings, or a later update would spread them
            current[:, removed] = 0
            inverse[removed] = 0
            inverse[:, removed] = 0
            inverse[removed, removed] = 1
    result = torch.zeros_like(weight)
    live_columns = _columns(live.nonzero().flatten(), size)
    result[:, _columns(remaining[live], size)] = current[:, live_columns].to(weight.dtype)
    return Removal(order, losses, result)


def _remove_columns(weight: Tensor, inverse: Tensor, removed: Tensor) -> float:
    """Let all other columns make up for the removed ones S, in place; return the loss.

    W loses W_S [H^-1]_SS^-1 [H^-1]_S, and H^-1 loses [H^-1]_:S [H^-1]_SS^-1 [H^-1]_S, which makes it
    the inverse for the columns that remain. The loss is 1/2 tr(W_S [H^-1]_SS^-1 W_S^T).

    Args:
        weight: W, float64 [outputs, columns].
        inverse: H^-1, float64 [columns, columns].
        removed: S, numbers of columns.
    """
    factor = torch.linalg.cholesky(inverse[removed][:, removed])
    removed_weight = weight[:, removed].T
    solved = torch.cholesky_solve(removed_weight, factor)
    loss = float((removed_weight * solved).sum()) / 2
    weight -= solved.T @ inverse[removed]
    # in place: of a wide layer it has 75 MB
    inverse.addmm_(inverse[:, removed], torch.cholesky_solve(inverse[removed], factor), alpha=-1)
    return loss


def center_gram(gram: Tensor, mean: Tensor) -> Tensor:
    """Turn a second moment [inputs, inputs] into a covariance: the loss where a bias follows the weights."""
    return gram - torch.outer(mean, mean)


def removal_losses(layers: Sequence[LayerStructures], grams: Mapping[str, Tensor]) -> list[LayerLosses]:
    """Compute what every number of remaining heads and every possible width costs each layer.

    Args:
        layers: see `find_structures`.
        grams: name of each output layer to the H of its inputs: see `observe_grams`.
    """
    result = []
    for layer in layers:
        heads = _remove_all(layer.heads, grams).losses[::-1]
        neurons = _remove_all(layer.neurons, grams).losses[::-1]
        widths = {width: neurons[width] for width in possible_widths(layer.neurons.count)}
        result.append(LayerLosses(heads, widths))
    return result


@torch.no_grad()
def observe_grams(
    layers: Sequence[LayerStructures], forward: Callable[[Batch], object], batches: Iterable[Batch], section: Prune
) -> dict[str, Tensor]:
    """Compute the H of the inputs of every output layer, over the real tokens of some batches.

    Args:
        forward: computes a batch with the model that the layers belong to, in eval mode.
        section: its dampening counts.

    Returns:
        Module name to the dampened second moment of the inputs, or covariance with a bias: [inputs, inputs].
    """
    outputs = {}
    for layer in layers:
        for structures in (layer.heads, layer.neurons):
            outputs[structures.output_name] = structures.output
    moments = {name: InputGram(linear.weight, section) for name, linear in outputs.items()}
    means = {name: InputMean(linear.weight, section) for name, linear in outputs.items()}
    for batch in batches:
        attention_mask = torch.as_tensor(batch["attention_mask"])
        with ExitStack() as stack:
            for name, linear in outputs.items():
                hook = make_input_hook([moments[name], means[name]], RealTokens(attention_mask))
                stack.callback(linear.register_forward_pre_hook(hook).remove)
            forward(batch)
    grams = {}
    for name, linear in outputs.items():
        gram = moments[name].read()
        grams[name] = gram if linear.bias is None else center_gram(gram, means[name].mean())
    return grams


def removals_at_once(count: int) -> int:
    """Return how many of `count` structures to remove at once, see `MOST_DOWNDATES`."""
    return max(1, count // MOST_DOWNDATES)


def _remove_all(structures: Structures, grams: Mapping[str, Tensor]) -> Removal:
    """Remove the heads or the neurons of a layer one after the other, until none is left."""
    weight = structures.output.weight.detach()
    gram = grams[structures.output_name]
    return remove_structures(weight, gram, structures.size, structures.count, group=removals_at_once(structures.count))


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Cost of each structure by itself: 1/2 tr(W_S [H^-1]_SS^-1 W_S^T)."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal() / 2
    structures = weight.shape[1] // size
    blocks = inverse.reshape(structures, size, structures, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    vectors = weight.reshape(-1, structures, size).permute(1, 2, 0)  # [structures, size, outputs]
    solved = torch.cholesky_solve(vectors, torch.linalg.cholesky(blocks))
    return (vectors * solved).sum((1, 2)) / 2


def _columns(structures: Tensor, size: int) -> Tensor:
    """Return the columns of structures, given by their indices."""
    offsets = torch.arange(size, device=structures.device)
    return (structures.unsqueeze(1) * size + offsets).flatten()
