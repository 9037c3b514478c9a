"""Statistics for the criterion: calibration batches change no weight; gradients of the logit term alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.data import tokens as data
from spdtool.errors import RecipeError
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Prune
from spdtool.training.microbatches import LossWeight, Microbatch
from spdtool.training.statistics_collector import StatisticsCollector, calibration_batches, check_statistics


class Model(nn.Module):
    """One linear layer with dropout, so that forward passes in training mode are random."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.dropout(self.linear(rows))


@pytest.fixture
def observed(clean_plugins: None) -> list[Tensor]:
    """Collect the mean gradients that the criterion `watcher` gets, one for each event."""
    means: list[Tensor] = []

    @plugins.criteria.register("watcher", needs=("gradient",))
    def watcher(weight: Tensor, stats: Any) -> Tensor:
        means.append(stats.gradient.clone())
        return weight.abs()

    return means


def make_pruner(model: Model, criterion: str = "watcher", events: Any = ((2, 0.25), (4, 0.5))) -> Pruner:
    layers = {"linear.weight": model.linear}
    masks = Masks({"linear.weight": model.linear.weight})
    return Pruner(masks, events, Prune(criterion=criterion), 0.5, layers)


def microbatches(count: int, weight: float = 1.0) -> list[Microbatch]:
    torch.manual_seed(1)
    mask: Any = torch.ones(2, 5, dtype=torch.long).numpy()
    batches: list[Any] = [{"rows": torch.randn(2, 5, 4), "attention_mask": mask} for _ in range(count)]
    return [Microbatch(batch, LossWeight(weight, weight, weight)) for batch in batches]


def terms(model: Model) -> Callable[[Microbatch], dict[str, Tensor]]:
    def loss(microbatch: Microbatch) -> dict[str, Tensor]:
        out = model(microbatch.batch["rows"]) * microbatch.weight.rows**0.5
        logits, hidden = out.square().mean(), out.abs().sum()
        return {"loss": logits + 10 * hidden, "logits": logits, "hidden": hidden}

    return loss


@pytest.mark.parametrize("loss_term", ["loss", "logits"])
def test_calibration_observes_the_mean_gradient_and_changes_no_weight(observed: list[Tensor], loss_term: str) -> None:
    model, batches = Model(), microbatches(3)
    pruner = make_pruner(model)
    collector = StatisticsCollector(pruner, Prune(calibration=3, saliency=loss_term))
    assert [step for step in range(6) if collector.needs_calibration(step)] == [2, 4]
    assert not any(collector.needs_step(step) for step in range(6)), "training steps are not needed then"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collector.calibrate(model, terms(model), ([batch] for batch in batches))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.linear.weight.grad is None
    assert model.training
    pruner.prune(2)
    model.load_state_dict(before)
    model.eval()
    expected = [torch.autograd.grad(terms(model)(batch)[loss_term], model.linear.weight)[0] for batch in batches]
    assert torch.allclose(observed[0], torch.stack(expected).mean(0))


def test_calibration_drops_what_was_observed_before(observed: list[Tensor]) -> None:
    model = Model()
    pruner = make_pruner(model)
    collector = StatisticsCollector(pruner, Prune(calibration=1))
    (model.linear.weight.sum() * 1e6).backward()
    pruner.observe_gradients()
    model.zero_grad()
    collector.calibrate(model, terms(model), [microbatches(1)])
    pruner.prune(2)
    assert float(observed[0].abs().max()) < 1e5


def test_only_the_logit_term_is_observed_while_the_whole_loss_is_trained(observed: list[Tensor]) -> None:
    model = Model().eval()
    pruner = make_pruner(model)
    collector = StatisticsCollector(pruner, Prune(saliency="logits"))
    assert [step for step in range(6) if collector.needs_step(step)] == [0, 1, 2, 3], "until the last event"
    for microbatch in microbatches(2, weight=0.5):  # one step in two microbatches
        losses = terms(model)(microbatch)
        collector.add_logit_gradients(losses)
        losses["loss"].backward()
    gradient = model.linear.weight.grad
    assert gradient is not None
    gradient_before = gradient.clone()
    collector.observe_step()
    assert torch.equal(gradient, gradient_before), "what is learnt stays as it was"
    pruner.prune(2)
    model.linear.weight.grad = None
    with torch.no_grad():
        model.linear.weight.copy_(pruner.masks.parameters["linear.weight"])
    assert float((observed[0] - gradient_before).abs().max()) > 1.0
    assert float(observed[0].abs().max()) < 10.0


@pytest.mark.parametrize(
    ("criterion", "events", "settings", "match"),
    [
        ("wanda", ((2, 0.5),), {}, "inputs of the layers"),
        ("taylor", ((0, 0.25), (2, 0.5)), {"loss": {"hardness": 0.5}}, "before the first step"),
        ("taylor", ((0, 0.25), (2, 0.5)), {"calibration": 2}, "the student is still its teacher"),
        ("magnitude", ((2, 0.5),), {"saliency": "logits", "loss": {"logits": 0.0}}, "whose weight is 0"),
    ],
)
def test_a_recipe_whose_criterion_would_observe_nothing_is_refused(
    criterion: str, events: Any, settings: Any, match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        check_statistics(Prune(criterion=criterion, **settings), events)
    if "saliency" not in settings:
        check_statistics(Prune(criterion=criterion, calibration=2, loss={"hardness": 0.5}), events)


def test_another_student_than_the_teacher_has_gradients_before_the_first_step() -> None:
    check_statistics(Prune(criterion="taylor", calibration=2), ((0, 0.25), (2, 0.5)), copied=False)


def test_calibration_batches_are_others_at_each_event_and_the_same_when_asked_again(toys: Any) -> None:
    rows = data.tokenize(toys.tokenizer(), toys.rows(32), 32)
    section, recipe = Prune(calibration=6, batch_size=8), Recipe()

    def batches(step: int) -> list[list[int]]:
        return [sorted(batch) for batch in calibration_batches(rows, section, recipe, step)]

    assert len(batches(3)) == 6, "more than an epoch holds"
    assert batches(3) == batches(3)
    assert batches(3) != batches(4)
