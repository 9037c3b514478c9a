"""Captured outputs of one forward pass; `test_architectures.py` covers all families."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spdtool.distillation.outputs import SoftmaxInputs, compute_outputs
from spdtool.models.layers import install_capture_hooks


@pytest.fixture
def model(toys: ModuleType) -> Any:
    classifier = toys.classifier("bert")
    install_capture_hooks(classifier)
    return classifier


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: column for name, column in batch.items() if name != "labels"}


def test_only_the_requested_outputs_are_returned(model: Any, toys: ModuleType) -> None:
    for hidden_states, attention in itertools.product((False, True), (None, "scores", "probabilities")):
        case = (hidden_states, attention)
        outputs = compute_outputs(model, toys.batch(), hidden_states=hidden_states, attention=attention)
        assert torch.equal(outputs.logits, model(**inputs(toys.batch())).logits), case
        assert (outputs.hidden_states is not None) == hidden_states, case
        assert (outputs.attentions is not None) == (attention is not None), case
        if outputs.hidden_states is not None:
            assert [tuple(state.shape) for state in outputs.hidden_states] == [(5, 11, 32)] * 4, case
            assert all(torch.isfinite(state).all() for state in outputs.hidden_states), case
        if outputs.attentions is not None:
            assert [tuple(scores.shape) for scores in outputs.attentions] == [(5, 2, 11, 11)] * 3, case


def test_the_labels_do_not_reach_the_model(model: Any, toys: ModuleType) -> None:
    batch = toys.batch()
    batch["labels"] = torch.full((5,), 99)  # the model's own loss would fail on it
    assert compute_outputs(model, batch).logits.shape == (5, 2)


def test_scores_are_before_dropout_and_probabilities_after(toys: ModuleType) -> None:
    model = toys.classifier("bert", attention_probs_dropout_prob=0.5)
    install_capture_hooks(model)
    model.train()
    torch.manual_seed(0)
    scores = compute_outputs(model, toys.batch(), attention="scores").attentions
    torch.manual_seed(0)
    probabilities = compute_outputs(model, toys.batch(), attention="probabilities").attentions
    assert scores is not None
    assert probabilities is not None
    for raw, dropped in zip(scores, probabilities, strict=True):
        zero = dropped[0] == 0  # row 0 has no padding
        assert 0.3 < float(zero.float().mean()) < 0.7
        torch.testing.assert_close(dropped[0][~zero], 2 * raw[0].softmax(-1)[~zero])


def test_gradients_flow_through_captured_outputs(model: Any, toys: ModuleType) -> None:
    outputs = compute_outputs(model, toys.batch(), hidden_states=True, attention="scores")
    assert outputs.attentions is not None
    outputs.attentions[-1][0].square().sum().backward()
    query = model.bert.encoder.layer[-1].attention.self.query.weight
    assert query.grad is not None
    assert bool((query.grad != 0).any())


def test_only_softmaxes_over_token_pairs_are_captured_once_each() -> None:
    square = torch.randn(2, 3, 4, 4)
    with SoftmaxInputs() as mode:
        results = [
            F.softmax(square, dim=-1),
            torch.softmax(square + 1, -1),
            (square + 2).softmax(dim=-1),
            nn.Softmax(dim=-1)(square + 3),
        ]
        F.softmax(torch.randn(2, 3), dim=-1)
        F.softmax(torch.randn(2, 3, 4, 5), dim=-1)
        F.log_softmax(square, dim=-1)
    assert len(mode.scores) == 4
    for offset, (scores, result) in enumerate(zip(mode.scores, results, strict=True)):
        torch.testing.assert_close(scores, square + offset)
        torch.testing.assert_close(result, (square + offset).softmax(-1))
    F.softmax(square, dim=-1)
    assert len(mode.scores) == 4, "nothing is watched outside the block"
