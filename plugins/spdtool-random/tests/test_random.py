"""The plugin is found through its entry point, scores what it says, and prunes a layer."""

import pytest
import torch

from spdtool import plugins
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.statistics import Stats
from spdtool.recipe.fields import Prune


def test_it_is_found_through_the_entry_point():
    part = plugins.criteria.entry("random")
    assert part.source == "spdtool-random:random"
    assert part.meta == {}


def test_scores_are_the_same_each_time_and_know_nothing_of_the_weights():
    score = plugins.criteria.get("random")
    one, other = score(torch.randn(30, 40), Stats()), score(torch.zeros(30, 40), Stats())
    assert torch.equal(one, other)
    assert float(one.mean()) == pytest.approx(0.5, abs=0.05)
    assert len(one.unique()) > 1100
    assert not torch.equal(one, score(torch.zeros(40, 30), Stats()).T), "another shape has other scores"


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    plugins.criteria.get("random")(torch.ones(3, 3), Stats())
    assert torch.equal(torch.get_rng_state(), before)


def test_large_weights_go_as_readily_as_small_ones():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 2000).view(40, 50))
    magnitude = weight.detach().abs()
    pruner = Pruner(Masks({"w": weight}), [(1, 0.3), (2, 0.5)], Prune(criterion="random"), 0.5)
    pruner.prune(1)
    first = weight.detach() == 0
    pruner.prune(2)
    pruner.finalize()
    gone = weight.detach() == 0
    assert bool(gone[first].all())
    assert float(magnitude[gone].mean()) == pytest.approx(0.5, abs=0.05)
