"""Removing dead heads and neurons leaves the outputs of every family unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spdtool.models.shrink import find_live_positions, narrow, shrink
from spdtool.models.structures import FAMILIES, find_structures
from tests import toys

# For each layer the dead heads and the number of dead neurons. The second layer loses all of both; the third has 5
# dead neurons, too few to reduce the width.
DEAD = (((1,), 32), ((0, 1), 64), ((), 5))


@torch.no_grad()
def kill(model: Any, dead: Sequence[tuple[Sequence[int], int]]) -> Any:
    """Zero the given heads and numbers of neurons (odd positions first); give every bias nonzero values."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).roll(number))
    for layer, (heads, count) in zip(find_structures(model), dead, strict=True):
        order = torch.cat([torch.arange(1, layer.neurons.count, 2), torch.arange(0, layer.neurons.count, 2)])
        for structures, indices in ((layer.heads, heads), (layer.neurons, order[:count])):
            flags = torch.zeros(structures.count, dtype=torch.bool)
            flags[torch.as_tensor(indices, dtype=torch.long)] = True
            for linear in structures.inputs.values():
                linear.weight[structures.rows(flags, linear)] = 0
                if linear.bias is not None:
                    linear.bias[structures.rows(flags, linear)] = 0
            structures.output.weight[:, structures.columns(flags)] = 0
    return model


def test_outputs_stay_the_same_in_every_family_with_and_without_padding() -> None:
    for family in FAMILIES:
        for eager in (True, False):
            model = kill(toys.classifier(family, eager=eager), DEAD)
            small = shrink(model)
            for rows in (1, 5):  # the first row has no padding
                batch = toys.batch(rows, architecture=family)
                del batch["labels"]
                with torch.no_grad():
                    expected, actual = model(**batch).logits, small(**batch).logits
                message = f"{family}, eager {eager}, {rows} rows"
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=message)
            parameters = dict(small.named_parameters())
            assert small.num_parameters() < model.num_parameters(), family
            assert set(parameters) <= set(dict(model.named_parameters())), family


def test_shrunk_parameters_are_the_full_ones_at_their_live_positions() -> None:
    for family in FAMILIES:
        model = kill(toys.classifier(family), DEAD)
        full, small = dict(model.named_parameters()), dict(shrink(model).named_parameters())
        positions = find_live_positions(model)
        assert positions, family
        for name, weight in full.items():
            if name not in small:  # a layer without heads or neurons
                assert not weight.any(), f"{family}: {name}"
                continue
            if name in positions:
                for index, axis in enumerate(positions[name]):
                    assert axis.size == weight.shape[index], f"{family}: {name}"
                    weight = weight.index_select(index, torch.tensor(axis.live, dtype=torch.long))
            assert torch.equal(weight, small[name]), f"{family}: {name}"


def test_a_narrow_model_of_a_stock_class_computes_the_same_in_every_family() -> None:
    for family in FAMILIES:
        model = kill(toys.classifier(family), (((1,), 32), ((0, 1), 64), ((), 40)))
        small, positions = narrow(model)
        assert type(small) is type(model), family
        widths = [layer.neurons.count for layer in find_structures(small)]
        assert widths == [32, 32, 32], family  # 24 neurons live in the third
        biases = 0 if family == "modernbert" else 3
        assert len(positions) == 6 + biases, family
        batch = toys.batch(architecture=family)
        del batch["labels"]
        with torch.no_grad():
            torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5, msg=family)
        assert narrow(kill(toys.classifier(family), DEAD))[1] == {}, family  # one layer needs its full width


def test_a_dense_model_and_one_of_another_family_are_returned_as_they_are() -> None:
    model = toys.classifier("bert")
    assert shrink(model) is model
    assert find_live_positions(model) == {}
    model = kill(model, DEAD)
    model.config.model_type = "a-new-family"
    assert shrink(model) is model
    assert find_live_positions(model) == {}


def test_few_dead_neurons_leave_the_width_as_it_is() -> None:
    model = kill(toys.classifier("bert"), (((), 5), ((), 0), ((), 31)))
    assert shrink(model) is model
