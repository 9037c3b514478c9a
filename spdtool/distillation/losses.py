"""The distillation losses: logits, hidden states, attention, relations between tokens.

The loss of a phase is the weighted sum of its terms, with the weights of `recipe.training.Loss`:

    L = logits x L_logits + hidden x L_hidden + attention x L_attention + relation x L_relation

The first three are those of Sparse Progressive Distillation (Huang et al., ACL 2022, arXiv
2110.08190), whose published code weights them 1:1:1; L_hidden and L_attention are TinyBERT's
(arXiv 1909.10351). Padding never counts, unless a recipe asks for it. Layers are compared in turn:
`layer_map.select_layers` brings the teacher's into the order of the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.data.tokens import IGNORED, LABELED
from spdtool.distillation.outputs import ModelOutputs, widen
from spdtool.distillation.projections import Projections, project
from spdtool.recipe.training import Loss

MASKED_SCORE = -1e4  # the model itself masked scores below this (padding, a local attention window)

LogitLoss = Callable[[Tensor, Tensor, Tensor, Loss], Tensor]
"""Compares logits with the teacher's and the gold labels, see `Task.logit_loss`."""

LossTerms = dict[str, Tensor]
"""Name to scalar: the weighted sum under `loss`, and each term of it, unweighted."""


@dataclass(frozen=True)
class LossWeight:
    """Fraction of a global batch in some rows: of its rows, real tokens, pairs of tokens in a row, and labels.

    A term that is a mean over tokens is multiplied by `tokens`, so that the terms of all
    micro-batches add up to that of the batch.
    """

    rows: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0
    labels: float = 1.0


WHOLE_BATCH = LossWeight()
NO_WEIGHT = LossWeight(0.0, 0.0, 0.0, 0.0)


def distillation_loss(
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: dict[str, Tensor],
    loss: Loss,
    *,
    logit_loss: LogitLoss,
    projections: Projections | None = None,
    weight: LossWeight = WHOLE_BATCH,
) -> LossTerms:
    """Compute every term with a weight above 0, unweighted, and `loss`: their weighted sum.

    The terms of all micro-batches of a batch add up to the batch's. Exception: attention maps of
    layers with a local window, whose masked pairs are weighted as if they were compared.

    Args:
        student, teacher: outputs for the batch; the teacher's layers in the order of the student's.
        batch: `attention_mask` [rows, tokens] and `labels`.
        loss: the weights of the terms.
        logit_loss: compares the logits, see `Task.logit_loss`.
        projections: matrices from the student's width to the teacher's; None: the widths are equal.
        weight: fraction of the global batch that these rows hold.

    Returns:
        Name to scalar, under `loss` the sum.
    """
    mask = batch["attention_mask"] if loss.mask_padding else None
    terms: LossTerms = {}
    if loss.logits > 0:
        terms["logits"] = weight.labels * _compare_logits(student.logits, teacher.logits, batch, loss, logit_loss)
    if loss.hidden > 0 or loss.relation > 0:
        assert student.hidden_states is not None
        assert teacher.hidden_states is not None
        if loss.hidden > 0:
            projected = project(student.hidden_states, projections or {})
            terms["hidden"] = weight.tokens * hidden_loss(projected, teacher.hidden_states, mask)
        if loss.relation > 0:
            relations = relation_loss(student.hidden_states, teacher.hidden_states, mask, loss.relation_heads)
            terms["relation"] = weight.tokens * relations
    if loss.attention > 0:
        assert student.attentions is not None
        assert teacher.attentions is not None
        terms["attention"] = weight.pairs * attention_loss(student.attentions, teacher.attentions, mask)
    total = torch.zeros(())  # a scalar of the CPU goes with terms on any device
    for name, term in terms.items():
        total = total + getattr(loss, name) * term
    return {"loss": total} | terms


def _compare_logits(
    student: Tensor, teacher: Tensor, batch: dict[str, Tensor], loss: Loss, logit_loss: LogitLoss
) -> Tensor:
    """Compute the logit loss; rows without a label, where a batch has such, learn from the teacher alone."""
    labels, is_labeled = batch["labels"], batch.get(LABELED)
    # without gold labels all rows learn alike
    if is_labeled is None or loss.hardness == loss.regression_hardness == 1.0:
        return logit_loss(student, teacher, labels, loss)
    teacher_only = loss.model_copy(update={"hardness": 1.0, "regression_hardness": 1.0})
    counts = _count_labels(labels)
    total = torch.zeros((), device=student.device)
    for rows, section in ((is_labeled, loss), (~is_labeled, teacher_only)):
        share = counts[rows].sum() / counts.sum().clamp(min=1)
        if rows.any():  # a mean over no row is no number
            total = total + share * logit_loss(student[rows], teacher[rows], labels[rows], section)
    return total


def _count_labels(labels: Tensor) -> Tensor:
    """Count the labels of each row over which a loss is averaged, float [rows]: those that are not IGNORED."""
    if labels.is_floating_point():  # -100 is a number there
        return torch.ones(len(labels), device=labels.device)
    return (labels != IGNORED).reshape(len(labels), -1).sum(1).float()


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Compute the mean squared error over real tokens and width, summed over layers.

    L_hidden = sum over layers l of MSE(h_l of the student, h_l of the teacher); the embeddings'
    output is layer 0 (TinyBERT, arXiv 1909.10351).

    Args:
        student, teacher: per layer [rows, tokens, width].
        mask: attention mask [rows, tokens]; None: every position counts.
    """
    losses = []
    # divided once for all layers, and without asking the device how many tokens there are
    token_weights = None if mask is None else mask / mask.sum()
    if _can_stack(student, teacher):
        error = (torch.stack(list(student)).float() - torch.stack(list(teacher)).float()).square().mean(-1)
        return error.mean((1, 2)).sum() if token_weights is None else (error * token_weights).sum()
    for student_state, teacher_state in zip(student, teacher, strict=True):
        if token_weights is None:
            losses.append(F.mse_loss(widen(student_state), widen(teacher_state)))
        else:
            # differences of half-precision states would lose most of their digits
            error = (student_state.float() - teacher_state.float()).square().mean(-1)
            losses.append((error * token_weights).sum())
    return torch.stack(losses).sum()


def _can_stack(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> bool:
    """Whether to compare all layers in one operation: a GPU waits for its launches, a CPU for its memory.

    Without autocast on a CPU the order of the sums stays that of layer by layer.
    """
    if student[0].device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return False
    same_shape = len({state.shape for state in (*student, *teacher)}) == 1
    return same_shape and len({state.dtype for state in student}) == len({state.dtype for state in teacher}) == 1


def relation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None, heads: int) -> Tensor:
    """Compute the divergence of token-to-token relations of hidden states, summed over layers.

    In the spirit of MiniLM (arXiv 2002.10957, 2012.15828), which relates queries, keys and values
    of one layer; here it is the hidden states of every mapped layer, so that neither heads nor
    widths have to match.

    Args:
        student, teacher: per layer [rows, tokens, width]; the widths may differ.
        mask: attention mask [rows, tokens]; None: every position counts.
        heads: number of slices of each width; must divide both.
    """
    losses = []
    # half precision has too few digits for the scores
    with torch.autocast(student[0].device.type, enabled=False):
        for student_state, teacher_state in zip(student, teacher, strict=True):
            log_student, log_teacher = (_log_relations(state, mask, heads) for state in (student_state, teacher_state))
            divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(1)
            losses.append(divergence.mean() if mask is None else (divergence * mask).sum() / mask.sum())
        return torch.stack(losses).sum()


def _log_relations(hidden_state: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Compute log softmax(h h^T / sqrt(d)), [rows, heads, tokens, tokens], for slices of width d."""
    heads_last = hidden_state.float().unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
    slices = heads_last.transpose(1, 2)
    scores = slices @ slices.transpose(-1, -2) / slices.shape[-1] ** 0.5
    if mask is not None:  # a finite number: minus infinity would make 0 times infinity of a padding key
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Compute the mean squared error over visible pairs of real tokens, summed over layers.

    L_attention = sum over layers l of MSE(A_l of the student, A_l of the teacher), averaged over
    heads too (TinyBERT, arXiv 1909.10351).

    Args:
        student, teacher: per layer [rows, heads, tokens, tokens]: scores before the softmax, or
            probabilities.
        mask: attention mask [rows, tokens]; None: every position counts, masked scores as 0.
    """
    losses = []
    for student_map, teacher_map in zip(student, teacher, strict=True):
        visible = (teacher_map > MASKED_SCORE) & (student_map > MASKED_SCORE)
        if mask is None:
            losses.append(torch.where(visible, widen(student_map) - widen(teacher_map), 0.0).float().square().mean())
            continue
        real_pairs = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
        counted = visible & real_pairs
        # `where` before the square: the difference of two masked scores may be infinite or NaN
        error = torch.where(counted, widen(student_map) - widen(teacher_map), 0.0).float().square()
        # a micro-batch of weight zero may have no pair at all
        losses.append(error.sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).sum()
