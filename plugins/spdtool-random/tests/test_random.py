"""The plugin is found through its entry point, gives reproducible random scores, and prunes a layer."""

import pytest
import torch

from spdtool import plugins
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.statistics import Stats
from spdtool.recipe.training import Prune


def test_the_criterion_is_found_through_the_entry_point():
    entry = plugins.criteria.entry("random")
    assert entry.source == "spdtool-random:random"
    assert entry.meta == {}


def test_scores_are_reproducible_and_do_not_depend_on_the_weights():
    score = plugins.criteria.get("random")
    scores, scores_of_zeros = score(torch.randn(30, 40), Stats()), score(torch.zeros(30, 40), Stats())
    assert torch.equal(scores, scores_of_zeros)
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.05)
    assert len(scores.unique()) > 1100
    assert not torch.equal(scores, score(torch.zeros(40, 30), Stats()).T), "another shape has other scores"


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    plugins.criteria.get("random")(torch.ones(3, 3), Stats())
    assert torch.equal(torch.get_rng_state(), before)


def test_large_and_small_weights_are_pruned_equally_often():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 2000).view(40, 50))
    magnitude = weight.detach().abs()
    pruner = Pruner(Masks({"w": weight}), [(1, 0.3), (2, 0.5)], Prune(criterion="random"), 0.5)
    pruner.prune(1)
    dead_before = weight.detach() == 0
    pruner.prune(2)
    pruner.finalize()
    dead = weight.detach() == 0
    assert bool(dead[dead_before].all())
    assert float(magnitude[dead].mean()) == pytest.approx(0.5, abs=0.05)
