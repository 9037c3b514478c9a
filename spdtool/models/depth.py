"""A student with some of its teacher's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from spdtool.errors import ModelError, RecipeError
from spdtool.models.layers import find_layer_stack


def choose_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Turn `prune.layers` into layers of a teacher of `depth`, counted from 1; one number: so many, spread evenly.

    Raises:
        RecipeError: they do not exist, or are not in rising order.
    """
    if len(layers) == 1 and 1 <= layers[0] <= depth:
        count = layers[0]
        # as distillation.layer_map pairs them, so that each layer learns from the one that it was
        return [max(1, round(layer * depth / count)) for layer in range(1, count + 1)]
    if sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] <= depth:
        raise RecipeError(
            f"prune.layers = {list(layers)}: the teacher has the layers 1 to {depth}",
            f"give some of them in rising order, or one number up to {depth}: so many are spread evenly",
        )
    return list(layers)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Build the same model with some of its layers, counted from 1; everything else is the same.

    A model without weights gives one without.

    Raises:
        ModelError: the family cannot be built with these layers.
    """
    stack = find_layer_stack(model)
    numbers = [layer - 1 for layer in layers]
    config = copy.deepcopy(model.config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(stack):  # one entry for each layer
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    device = next(model.parameters()).device
    # the new weights are drawn only to be replaced: no draw of the training may shift
    with torch.random.fork_rng(devices=[]), torch.device(device):
        shallow = type(model)(config)
    if device.type != "meta":
        weights = _select_layers(model, stack, numbers)
        missing, unexpected = shallow.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ModelError(
                f"{config.model_type!r} cannot be built of the layers {list(layers)}: "
                f"{', '.join([*missing, *unexpected][:3])} has no counterpart",
                "keep the first layer: in some families it differs from the others",
            )
    shallow.train(model.training)
    return shallow


def _select_layers(model: PreTrainedModel, stack: nn.ModuleList, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the state dict with the layers `numbers` alone, renumbered."""
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    selected = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            selected[name] = weight
            continue
        number, _, parameter = name.removeprefix(prefix).partition(".")
        if int(number) in numbers:
            selected[f"{prefix}{numbers.index(int(number))}.{parameter}"] = weight
    return selected
