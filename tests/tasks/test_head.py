"""Heads: found by the class that config.json names, and their outputs as one tensor."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from spdtool import plugins
from spdtool.tasks.head import SEQUENCE_CLASSIFIER, Head, find_head, head_of_config, head_of_model
from spdtool.tasks.task import Task

SPAN = Head("AutoModelForQuestionAnswering", "ForSpans", "a finder", ("start", "end"), "every token", per_token=True)


def test_a_head_is_found_by_the_end_of_a_class_name(toys: ModuleType, clean_plugins: None) -> None:
    @plugins.task_kinds.register("toy-spans")
    class ToySpans(Task):
        head = SPAN

    assert find_head(["BertForSpans"]) == SPAN
    assert find_head(["BertForSequenceClassification"]) == SEQUENCE_CLASSIFIER
    for nameless in ({}, {"architectures": None}, {"architectures": ["BertForMaskedLM"]}, {"architectures": [7]}):
        assert head_of_config(nameless) == SEQUENCE_CLASSIFIER, nameless
    assert find_head(["BertForMaskedLM"]) is None
    assert head_of_model(toys.bert()) == head_of_model(torch.nn.Linear(1, 1)) == SEQUENCE_CLASSIFIER


def test_several_outputs_are_stacked_and_those_of_padding_are_zero() -> None:
    start, end = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = torch.stack([start, end], dim=-1) * mask[..., None]
    collected = SPAN.collect(SimpleNamespace(start=start, end=end), {"attention_mask": mask})
    assert torch.equal(collected, expected)
    arrays = SPAN.collect_arrays([start.numpy(), end.numpy()], {"attention_mask": mask.numpy()})
    np.testing.assert_array_equal(arrays, expected.numpy())


def test_the_logits_of_a_row_are_handed_on_as_they_are() -> None:
    logits = torch.rand(2, 3)
    assert SEQUENCE_CLASSIFIER.collect(SimpleNamespace(logits=logits), {}) is logits
    assert SEQUENCE_CLASSIFIER.collect_arrays([logits.numpy()], {}) is not None
