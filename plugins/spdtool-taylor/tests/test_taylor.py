"""The plugin is found through its entry point, scores what it says, and prunes a real stage."""

import torch

from spdtool import plugins
from spdtool.pruning.criteria import Stats
from spdtool.pruning.gradual import Pruner
from spdtool.pruning.masks import Masks


def test_it_is_found_through_the_entry_point():
    part = plugins.criteria.part("taylor")
    assert part.source == "spdtool-taylor:taylor"
    assert part.meta["needs"] == ("gradient",)


def test_score_is_the_first_order_change_of_the_loss():
    weight = torch.tensor([[3.0, -0.5], [0.1, 2.0]])
    gradient = torch.tensor([[0.0, 2.0], [-1.0, 0.25]])
    score = plugins.criteria.get("taylor")(weight, Stats(gradient=gradient))
    assert torch.allclose(score, torch.tensor([[0.0, 1.0], [0.1, 0.5]]))


def test_a_large_weight_without_influence_is_pruned_first():
    weight = torch.nn.Parameter(torch.tensor([[5.0, 0.1]]))
    how = {"criterion": "taylor", "pattern": "unstructured", "scope": "matrix"}
    pruner = Pruner(Masks({"w": weight}), [(1, 0.5)], target=0.5, **how)
    (weight * torch.tensor([[0.0, 1.0]])).sum().backward()
    pruner.observe()
    pruner.step(1)
    assert weight.tolist() == [[0.0, torch.tensor(0.1).item()]]
