"""Micro-batches: every row once, equal work for each process, and losses that add up to those of the batch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.distillation.losses import distillation_loss
from spdtool.distillation.outputs import compute_outputs
from spdtool.models.predict import to_device
from spdtool.recipe.training import Loss
from spdtool.tasks.classification import Classification
from spdtool.training.microbatches import NO_WEIGHT, WHOLE_BATCH, MicrobatchSplitter, deal_rows


@pytest.fixture(scope="module")
def rows() -> data.Encoded:
    import toys

    return data.tokenize(toys.tokenizer(), toys.rows(40, pairs=True, longest=25), 64)


def make_splitters(processes: int, **options: Any) -> list[MicrobatchSplitter]:
    return [MicrobatchSplitter(rank=rank, ranks=processes, **options) for rank in range(processes)]


def test_one_process_without_accumulation_gets_the_batch_unchanged(rows: data.Encoded) -> None:
    batch = np.array([7, 3, 30])
    (micro_batch,) = MicrobatchSplitter().split(rows, batch)
    assert micro_batch.weight is WHOLE_BATCH
    for name, column in rows.collate(batch).items():
        assert np.array_equal(micro_batch.batch[name], column), name


def test_every_row_goes_to_one_rank_with_balanced_cost(rows: data.Encoded) -> None:
    batch = np.random.default_rng(0).permutation(40)[:20]
    for ranks in (2, 3, 7, 20):
        rows_by_rank = deal_rows(batch, rows.lengths[batch], ranks)
        assert sorted(np.concatenate(rows_by_rank)) == sorted(batch), ranks
        counts = [len(numbers) for numbers in rows_by_rank]
        assert max(counts) - min(counts) <= 1, ranks
    costs = [rows.lengths[numbers].sum() for numbers in deal_rows(batch, rows.lengths[batch], 2)]
    assert max(costs) / min(costs) < 1.1


def test_a_rank_without_rows_gets_a_row_of_weight_zero(rows: data.Encoded) -> None:
    shares = [
        [micro_batch.weight for micro_batch in splitter.split(rows, np.array([5]))] for splitter in make_splitters(3)
    ]
    assert shares == [[WHOLE_BATCH], [NO_WEIGHT], [NO_WEIGHT]]


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 3), (2, 1), (3, 2), (12, 1)])
def test_the_losses_of_micro_batches_add_up_to_those_of_the_batch(
    rows: data.Encoded, toys: ModuleType, processes: int, accumulate: int, mask_padding: bool
) -> None:
    weights = Loss(attention=1, relation=1, relation_heads=2, hardness=0.4, mask_padding=mask_padding)
    student, teacher = (toys.bert(2, seed=seed, attn_implementation="eager") for seed in (0, 1))
    batch = np.arange(10)

    def terms(splitter: MicrobatchSplitter) -> list[dict[str, torch.Tensor]]:
        losses = []
        for micro_batch in splitter.split(rows, batch):
            tensors = to_device(micro_batch.batch, "cpu")
            outputs = [
                compute_outputs(model, tensors, hidden_states=True, attention="scores") for model in (student, teacher)
            ]
            losses.append(
                distillation_loss(
                    *outputs, tensors, weights, logit_loss=Classification.logit_loss, weight=micro_batch.weight
                )
            )
        return losses

    (whole_terms,) = terms(MicrobatchSplitter(pad_alike=not mask_padding))
    all_terms = [
        part_terms
        for splitter in make_splitters(processes, accumulate=accumulate, pad_alike=not mask_padding)
        for part_terms in terms(splitter)
    ]
    assert len(all_terms) > 1
    assert whole_terms.keys() == {"loss", "logits", "hidden", "relation", "attention"}
    for name, term in whole_terms.items():
        assert float(sum(part_terms[name].detach() for part_terms in all_terms)) == pytest.approx(
            float(term.detach()), rel=1e-4
        )
