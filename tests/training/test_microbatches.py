"""A batch in pieces: every row once, equal work for each process, and losses that add up to the batch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spdtool.data import tokens as data
from spdtool.distillation.losses import distillation_loss
from spdtool.distillation.outputs import compute_outputs
from spdtool.models.predict import to_device
from spdtool.recipe.fields import Loss
from spdtool.tasks.classification import Classification
from spdtool.training.microbatches import NO_WEIGHT, WHOLE_BATCH, MicrobatchSplitter, deal_rows


@pytest.fixture(scope="module")
def rows() -> data.Encoded:
    import toys

    return data.tokenize(toys.tokenizer(), toys.rows(40, pairs=True, longest=25), 64)


def cuts(processes: int, **how: Any) -> list[MicrobatchSplitter]:
    return [MicrobatchSplitter(rank=rank, ranks=processes, **how) for rank in range(processes)]


def test_one_process_with_one_piece_gets_the_batch_as_it_is(rows: data.Encoded) -> None:
    batch = np.array([7, 3, 30])
    (piece,) = MicrobatchSplitter().split(rows, batch)
    assert piece.weight is WHOLE_BATCH
    for name, column in rows.collate(batch).items():
        assert np.array_equal(piece.batch[name], column), name


def test_every_row_goes_to_one_rank_and_the_costs_are_alike(rows: data.Encoded) -> None:
    batch = np.random.default_rng(0).permutation(40)[:20]
    for ranks in (2, 3, 7, 20):
        dealt = deal_rows(batch, rows.lengths[batch], ranks)
        assert sorted(np.concatenate(dealt)) == sorted(batch), ranks
        counts = [len(numbers) for numbers in dealt]
        assert max(counts) - min(counts) <= 1, ranks
    two = [rows.lengths[numbers].sum() for numbers in deal_rows(batch, rows.lengths[batch], 2)]
    assert max(two) / min(two) < 1.1


def test_a_process_without_rows_gets_one_that_counts_for_nothing(rows: data.Encoded) -> None:
    shares = [[piece.weight for piece in cut.split(rows, np.array([5]))] for cut in cuts(3)]
    assert shares == [[WHOLE_BATCH], [NO_WEIGHT], [NO_WEIGHT]]


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (3, 2), (12, 1)])
def test_the_terms_of_the_pieces_add_up_to_those_of_the_batch(
    rows: data.Encoded, toys: Any, processes: int, parts: int, mask_padding: bool
) -> None:
    weights = Loss(attention=1, relation=1, relation_heads=2, hardness=0.4, mask_padding=mask_padding)
    student, teacher = (toys.bert(2, seed=seed, attn_implementation="eager") for seed in (0, 1))
    batch = np.arange(10)

    def terms(cut: MicrobatchSplitter) -> list[dict[str, torch.Tensor]]:
        made = []
        for piece in cut.split(rows, batch):
            given = to_device(piece.batch, "cpu")
            seen = [
                compute_outputs(model, given, hidden_states=True, attention="scores") for model in (student, teacher)
            ]
            made.append(
                distillation_loss(*seen, given, weights, logit_loss=Classification.logit_loss, weight=piece.weight)
            )
        return made

    (whole,) = terms(MicrobatchSplitter(pad_alike=not mask_padding))
    pieces = [found for cut in cuts(processes, accumulate=parts, pad_alike=not mask_padding) for found in terms(cut)]
    assert len(pieces) > 1
    assert whole.keys() == {"loss", "logits", "hidden", "relation", "attention"}
    for name, term in whole.items():
        assert float(sum(found[name].detach() for found in pieces)) == pytest.approx(float(term.detach()), rel=1e-4)
