"""Masks of heads and neurons and their prune events, without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spdtool.errors import GateError, ModelError, RecipeError
from spdtool.models.layers import find_prunable_layers, find_prunable_weights
from spdtool.models.structures import FAMILIES, find_structures
from spdtool.pruning.structure import (
    LayerShape,
    choose_shape,
    full_shape,
    interpolate_shape,
    shape_sparsity,
)
from spdtool.pruning.structured import StructuredMasks, StructuredPruner
from spdtool.recipe.training import Prune
from tests import toys

SHAPE = (LayerShape(1, 32), LayerShape(2, 0))


def masks_of(model: Any) -> StructuredMasks:
    return StructuredMasks.from_structures(find_prunable_weights(model), find_structures(model))


def prune(model: Any, criterion: str, shape: Any = SHAPE) -> StructuredMasks:
    """Prune to `shape` in two events."""
    masks = masks_of(model)
    target = shape_sparsity(masks.layers, shape)
    section = Prune(criterion=criterion)
    pruner = StructuredPruner(masks, [(0, target / 2), (1, target)], section, shape, find_prunable_layers(model))
    for step in (0, 1):
        batch = toys.batch(architecture=model.config.model_type, seed=step)
        with pruner.observe_inputs(batch["attention_mask"]):
            model(**batch).loss.backward()
        pruner.observe_gradients()
        pruner.prune(step)
        model.zero_grad()
    pruner.finalize()
    return masks


def test_every_criterion_removes_the_shape_in_every_family() -> None:
    for family in FAMILIES:
        for criterion in ("layerwise", "magnitude", "taylor") if family == "bert" else ("layerwise",):
            model = toys.classifier(family, layers=2)
            masks = prune(model, criterion)
            message = f"{family}, {criterion}"
            assert masks.shape() == SHAPE, message
            assert masks.sparsity() == pytest.approx(shape_sparsity(masks.layers, SHAPE)), message
            # a later phase reads them from the zeros alone
            read = masks_of(model)
            assert read.shape() == SHAPE, message
            assert all(torch.equal(read.dead[name], dead) for name, dead in masks.dead.items()), message


def test_the_update_of_the_survivors_lowers_the_output_error() -> None:
    errors = {}
    for update in (True, False):
        model = toys.classifier("bert", layers=2, seed=3)
        masks, section = masks_of(model), Prune(criterion="layerwise", update=update)
        shape = (LayerShape(1, 64), LayerShape(2, 64))
        target = shape_sparsity(masks.layers, shape)
        pruner = StructuredPruner(masks, [(0, target)], section, shape, find_prunable_layers(model))
        captured: dict[str, torch.Tensor] = {}
        output = model.bert.encoder.layer[0].attention.output.dense
        handle = output.register_forward_hook(lambda _, inputs, outputs: captured.update(x=inputs[0], y=outputs))  # noqa: B023
        batch = toys.batch()
        with pruner.observe_inputs(batch["attention_mask"]), torch.no_grad():
            model(**batch)
        handle.remove()
        pruner.prune(0)
        is_token = batch["attention_mask"].bool()
        with torch.no_grad():
            errors[update] = float((output(captured["x"])[is_token] - captured["y"][is_token]).square().mean())
    assert errors[True] < errors[False]


def test_dead_biases_and_their_moments_stay_zero_through_steps_of_the_optimiser() -> None:
    model = toys.classifier("bert", layers=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.constant_(parameter, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**toys.batch()).loss.backward()
    optimizer.step()  # moments that would continue to move a bias
    optimizer.zero_grad()
    masks = masks_of(model)
    masks.attach(optimizer)
    pruner = StructuredPruner(masks, [(0, shape_sparsity(masks.layers, SHAPE))], Prune(criterion="magnitude"), SHAPE)
    pruner.prune(0)
    for seed in range(2):
        model(**toys.batch(seed=seed)).loss.backward()
        pruner.zero_gradients()
        masks.check_dead()
        optimizer.step()
        masks.check_dead()
        optimizer.zero_grad()
    assert masks_of(model).shape() == SHAPE
    with torch.no_grad():
        masks.biases["bert.encoder.layer.1.intermediate.dense.weight"][3] = 0.1
    with pytest.raises(GateError, match="the bias of a removed head or neuron"):
        masks.check_dead()


def test_another_shape_and_stray_zeros_are_refused() -> None:
    model = toys.classifier("bert", layers=2)
    masks = prune(model, "magnitude")
    masks.check_shape(SHAPE)
    with pytest.raises(GateError, match=r"has the shape 1x32 2x0; asked for was 2x32 2x0"):
        masks.check_shape((LayerShape(2, 32), LayerShape(2, 0)))
    with pytest.raises(ModelError, match="does not grow again"):
        StructuredPruner(masks, [], Prune(criterion="magnitude"), full_shape(masks.layers))
    query_weight = masks.parameters["bert.encoder.layer.0.attention.self.query.weight"]
    with torch.no_grad():
        query_weight[(~masks.dead["bert.encoder.layer.0.attention.self.query.weight"]).nonzero()[0].tolist()] = 0
    with pytest.raises(GateError, match=r"query\.weight: not all of its zeros"):
        masks.check_shape(SHAPE)


def test_criteria_of_single_weights_are_refused() -> None:
    masks = masks_of(toys.classifier("bert", layers=2))
    with pytest.raises(RecipeError, match="ranks single weights") as error:
        StructuredPruner(masks, [], Prune(criterion="wanda"), SHAPE)
    assert "prune.criterion=layerwise" in str(error.value.hint)


def test_shapes_come_from_shares_or_layer_by_layer_and_shrink_step_by_step() -> None:
    full = (LayerShape(12, 3072), LayerShape(12, 100))
    assert choose_shape(Prune(heads=0.5), full) == (LayerShape(6, 3072), LayerShape(6, 100))
    assert choose_shape(Prune(neurons=0.26), full) == (LayerShape(12, 800), LayerShape(12, 32))
    assert choose_shape(Prune(shape=((3, 64), (0, 0))), full) == (LayerShape(3, 64), LayerShape(0, 0))
    target = (LayerShape(3, 64), LayerShape(0, 0))
    assert interpolate_shape(full, target, 0.0) == full
    assert interpolate_shape(full, target, 1.0) == target
    assert interpolate_shape(full, target, 0.5) == (LayerShape(8, 1568), LayerShape(6, 50))
