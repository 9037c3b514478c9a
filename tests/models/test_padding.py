"""PaddingMask stores whether a batch is padded; every family computes the same with it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.models import predict as evaluation
from spdtool.models.layers import install_capture_hooks
from spdtool.models.padding import PaddingMask

FAMILIES = ("bert", "roberta", "distilbert", "electra", "xlm-roberta", "mpnet", "deberta-v2", "modernbert")


def mask(*lengths: int) -> np.ndarray:
    return (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize(("lengths", "unpadded"), [((3, 3), True), ((3, 2), False)])
def test_all_answers_from_the_known_padding_and_the_class_survives_a_cast(lengths: Any, unpadded: bool) -> None:
    batch = evaluation.to_device({"attention_mask": mask(*lengths), "labels": np.zeros(2)}, "cpu")
    for form in (batch["attention_mask"], batch["attention_mask"].to(torch.bool), batch["attention_mask"].bool()):
        assert bool(form.all()) is bool(torch.all(form)) is unpadded
        assert isinstance(form, PaddingMask)
    assert torch.equal(batch["attention_mask"], torch.from_numpy(mask(*lengths)))
    assert type(batch["labels"]) is torch.Tensor


def test_results_computed_from_the_mask_are_ordinary_tensors() -> None:
    padding_mask = PaddingMask.of(torch.from_numpy(mask(3, 2)), unpadded=False)
    for result in (
        padding_mask == 1,
        padding_mask[:, None],
        padding_mask.sum(),
        torch.stack([padding_mask, padding_mask]),
        padding_mask * torch.ones(2, 3),
    ):
        assert type(result) is torch.Tensor
    assert padding_mask.all(dim=1).tolist() == [True, False], "another question, answered by the numbers"


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_computes_the_same_with_a_padding_mask(toys: ModuleType, architecture: str, eager: bool) -> None:
    model = toys.classifier(architecture, eager=eager)
    install_capture_hooks(model)
    assert set(toys.ARCHITECTURES) == set(FAMILIES)
    for length in (7, 1):  # one token: no row has padding
        plain = toys.batch(3, 7, architecture=architecture)
        plain = {name: column[:, :length] if column.dim() == 2 else column for name, column in plain.items()}
        plain.pop("labels")
        with_padding_mask = evaluation.to_device({name: column.numpy() for name, column in plain.items()}, "cpu")
        assert bool(with_padding_mask["attention_mask"].all()) == (length == 1)
        with torch.no_grad():
            masked_outputs, plain_outputs = (
                model(**batch, output_hidden_states=True) for batch in (with_padding_mask, plain)
            )
        assert type(masked_outputs.logits) is torch.Tensor
        assert torch.equal(masked_outputs.logits, plain_outputs.logits)
        assert all(
            torch.equal(actual, expected)
            for actual, expected in zip(masked_outputs.hidden_states, plain_outputs.hidden_states, strict=True)
        )
