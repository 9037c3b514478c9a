"""Masks of heads and neurons and their prune events, without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spdtool.errors import GateError, ModelError, RecipeError
from spdtool.models.layers import find_prunable_layers, find_prunable_weights
from spdtool.models.shrink import shrink
from spdtool.models.structures import FAMILIES, find_structures
from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.structure import (
    LayerShape,
    choose_shape,
    full_shape,
    interpolate_shape,
    shape_sparsity,
)
from spdtool.pruning.structured import StructuredMasks, StructuredPruner
from spdtool.recipe.training import Prune
from spdtool.training.schedules import add_zeros_inside
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


def prune_inside(model: Any, criterion: str, zeros: float = 0.75, shape: Any = SHAPE) -> StructuredMasks:
    """Prune to `shape` in two events, and to zeros in blocks of 1x4 inside of it in two more."""
    pattern = find_pattern("1x4")
    masks = StructuredMasks.from_structures(find_prunable_weights(model), find_structures(model), pattern)
    target = shape_sparsity(masks.layers, shape)
    section = Prune(criterion=criterion, zeros=zeros, pattern="1x4")
    events = [
        (0, target / 3),
        (1, target),
        (2, add_zeros_inside(target, zeros / 2)),
        (3, add_zeros_inside(target, zeros)),
    ]
    pruner = StructuredPruner(masks, events, section, shape, find_prunable_layers(model))
    for step in range(len(events)):
        batch = toys.batch(architecture=model.config.model_type, seed=step)
        with pruner.observe_inputs(batch["attention_mask"]):
            model(**batch).loss.backward()
        pruner.observe_gradients()
        pruner.prune(step)
        assert masks.shape() == shape or step == 0
        model.zero_grad()
    pruner.finalize()
    return masks


def test_zeros_inside_a_shape_lie_in_blocks_of_the_smaller_matrices() -> None:
    pattern = find_pattern("1x4")
    for family in FAMILIES:
        for criterion in ("layerwise", "magnitude", "taylor") if family == "bert" else ("layerwise",):
            model, message = toys.classifier(family, layers=2), f"{family}, {criterion}"
            shape = (LayerShape(1, 32), LayerShape(2, 32))
            masks = prune_inside(model, criterion, shape=shape)
            masks.check_shape(shape, 0.75)
            read = StructuredMasks.from_structures(find_prunable_weights(model), find_structures(model), pattern)
            assert read.shape() == shape, message
            assert all(torch.equal(read.dead[name], dead) for name, dead in masks.dead.items()), message
            # Nothing is stored for what is removed, and three quarters of the other blocks are zero.
            small = shrink(model)
            for layer in find_structures(small):
                for structures in (layer.heads, layer.neurons):
                    for linear in (*structures.inputs.values(), structures.output):
                        is_zero = linear.weight == 0
                        assert torch.equal(pattern.whole_blocks(is_zero), is_zero), message
                        assert float(is_zero.float().mean()) == pytest.approx(0.75, abs=0.01), message
            batch = toys.batch(architecture=family)
            model.eval(), small.eval()
            with torch.no_grad():
                torch.testing.assert_close(small(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)


def test_every_live_row_keeps_a_block_however_many_zeros_are_asked_for() -> None:
    masks = prune_inside(toys.classifier("bert", layers=2), "magnitude", zeros=0.99)
    removed = masks.removed()
    for name, dead in masks.dead.items():
        alive_rows = ~removed[name].all(1)
        assert bool((~dead).any(1)[alive_rows].all()), name
    masks.check_shape(SHAPE, 0.99)
    with pytest.raises(GateError, match="blocks of zeros; the shape and prune.zeros ask for"):
        masks.check_shape(SHAPE, 0.5)


def test_neurons_go_in_whole_blocks_only_if_zeros_follow() -> None:
    for pattern, aligned in (("1x4", True), ("unstructured", False)):
        model = toys.classifier("bert", layers=2, seed=1)
        masks = StructuredMasks.from_structures(
            find_prunable_weights(model), find_structures(model), find_pattern(pattern)
        )
        shape = (LayerShape(2, 32), LayerShape(2, 30))
        target = shape_sparsity(masks.layers, shape)
        section = Prune(criterion="magnitude", pattern=pattern, zeros=0.5)
        pruner = StructuredPruner(masks, [(0, target / 3), (1, target)], section, shape)
        pruner.prune(0)
        for layer in masks.layers:
            groups = masks.live(layer.neurons).view(-1, 4)
            assert torch.equal(groups.all(1), groups.any(1)) is aligned, pattern
        pruner.prune(1)
        assert masks.shape() == shape, pattern  # to the last neuron, even where blocks do not divide them
