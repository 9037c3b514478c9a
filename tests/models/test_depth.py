"""Students with some layers of their teacher."""

from __future__ import annotations

import pytest
import torch

from spdtool.errors import ModelError, RecipeError
from spdtool.models.depth import choose_layers, keep_layers
from spdtool.models.layers import find_layer_stack
from tests import toys


def test_the_kept_layers_compute_what_they_computed_in_every_family() -> None:
    for family in toys.ARCHITECTURES:
        model = toys.classifier(family)
        shallow = keep_layers(model, [1, 3])
        assert shallow.config.num_hidden_layers == len(find_layer_stack(shallow)) == 2, family
        stack = find_layer_stack(model)
        for copied, original in zip(find_layer_stack(shallow), (stack[0], stack[2]), strict=True):
            for name, weight in original.state_dict().items():
                assert torch.equal(copied.state_dict()[name], weight), f"{family}: {name}"
        del stack[1]
        batch = toys.batch(architecture=family)
        with torch.no_grad():
            assert torch.equal(shallow(**batch).logits, model(**batch).logits), family


def test_a_layer_that_cannot_come_first_is_refused() -> None:
    with pytest.raises(ModelError, match="attn_norm") as error:
        keep_layers(toys.classifier("modernbert"), [2, 3])
    assert "keep the first layer" in str(error.value.hint)


def test_a_single_number_selects_that_many_evenly_spread_layers() -> None:
    assert choose_layers([3], 6) == [2, 4, 6]
    assert choose_layers([4], 12) == [3, 6, 9, 12]
    assert choose_layers([1, 4], 6) == [1, 4]
    for layers in ([7], [0], [2, 1], [1, 1], [1, 7]):
        with pytest.raises(RecipeError, match="the teacher has the layers 1 to 6"):
            choose_layers(layers, 6)
