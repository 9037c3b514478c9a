"""The distillation losses: logits, hidden states, attention, relations between tokens.

Padding never counts, unless a recipe asks for it. Layers are compared in turn: `layers.taught_by` brings the teacher's
into the order of the student's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.distillation.outputs import Observation
from spdtool.distillation.projections import PREFIX, Projections
from spdtool.recipe.fields import Loss
from spdtool.training.microbatches import WHOLE, Share

OUT_OF_SIGHT = -1e4  # scores below this were masked by the model itself (padding, a local attention window)


def distillation(
    student: Observation,
    teacher: Observation,
    batch: dict[str, Tensor],
    weights: Loss,
    *,
    regression: bool,
    projections: Projections | None = None,
    share: Share = WHOLE,
) -> dict[str, Tensor]:
    """Every term with a weight above 0, unweighted, and `loss`: their weighted sum.

    Each term is this piece's part of the global batch's: the terms of all its pieces add up. One case is only nearly
    so: attention maps of layers that see a local window, whose pairs in sight are counted as if all were.

    Args:
        batch: `attention_mask` [rows, tokens] and `labels` [rows].
        regression: whether the labels are numbers.
        projections: what brings the student's hidden states to the teacher's width; None: they have it.
        share: what part of the global batch these rows are.
    """
    real = batch["attention_mask"] if weights.mask_padding else None
    terms: dict[str, Tensor] = {}
    if weights.logits > 0:
        match = regression_loss if regression else logit_loss
        terms["logits"] = share.rows * match(student.logits, teacher.logits, batch["labels"], weights)
    if weights.hidden > 0 or weights.relation > 0:
        assert student.hidden is not None
        assert teacher.hidden is not None
        if weights.hidden > 0:
            terms["hidden"] = share.tokens * hidden_loss(projected(student.hidden, projections), teacher.hidden, real)
        if weights.relation > 0:
            terms["relation"] = share.tokens * relation_loss(
                student.hidden, teacher.hidden, real, weights.relation_heads
            )
    if weights.attention > 0:
        assert student.attention is not None
        assert teacher.attention is not None
        terms["attention"] = share.pairs * attention_loss(student.attention, teacher.attention, real)
    total = sum((getattr(weights, name) * term for name, term in terms.items()), start=torch.zeros(()))
    return {"loss": total} | terms


def projected(hidden: Sequence[Tensor], projections: Projections | None) -> Sequence[Tensor]:
    """Hidden states, embeddings' output first, each times its projection; as they are without projections."""
    if not projections:
        return hidden
    return [F.linear(state, projections[f"{PREFIX}{index}"]) for index, state in enumerate(hidden)]


def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, weights: Loss) -> Tensor:
    """Kullback-Leibler divergence of the softened distributions, times T squared, mixed with the gold labels.

    Hinton et al. 2015, arXiv 1503.02531. With `per_label` it is the published code's form: cross-entropy averaged over
    labels as well, and no square of the temperature.

    Args:
        student, teacher: logits [rows, labels].
        labels: class indices [rows].
    """
    softened = F.log_softmax(student.float() / weights.temperature, dim=-1)
    target = F.softmax(teacher.float() / weights.temperature, dim=-1)
    if weights.per_label:
        soft = -(target * softened).mean()
    else:
        soft = F.kl_div(softened, target, reduction="batchmean") * weights.temperature**2
    if weights.hardness == 1.0:
        return soft
    return weights.hardness * soft + (1.0 - weights.hardness) * F.cross_entropy(student.float(), labels)


def regression_loss(student: Tensor, teacher: Tensor, labels: Tensor, weights: Loss) -> Tensor:
    """Mean squared error to the teacher's value, mixed with that to the gold value.

    Args:
        student, teacher: logits [rows, 1].
        labels: gold values [rows].
    """
    value = student.float().squeeze(-1)
    share = weights.regression_hardness
    soft = F.mse_loss(value, teacher.float().squeeze(-1))
    return soft if share == 1.0 else share * soft + (1.0 - share) * F.mse_loss(value, labels.float())


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None) -> Tensor:
    """Mean squared error over real tokens and width, summed over layers.

    Args:
        student, teacher: per layer [rows, tokens, width].
        real: attention mask [rows, tokens]; None: every position counts.
    """
    if real is None:
        return torch.stack([F.mse_loss(mine, its) for mine, its in zip(student, teacher, strict=True)]).sum()
    weight = real / real.sum()
    errors = [(mine.float() - its.float()).square().mean(-1) for mine, its in zip(student, teacher, strict=True)]
    return torch.stack([(error * weight).sum() for error in errors]).sum()


def relation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None, pieces: int) -> Tensor:
    """Divergence between the token-to-token relations of hidden states, summed over layers.

    In the spirit of MiniLM (arXiv 2002.10957, 2012.15828), which relates queries, keys and values of one layer; here
    it is the hidden states of every mapped layer, so that no head and no width has to be the same on both sides.

    Args:
        student, teacher: per layer [rows, tokens, width]; the widths may differ.
        real: attention mask [rows, tokens]; None: every position counts.
        pieces: that each width is cut into; must divide both.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        return torch.stack(
            [
                _relation_divergence(_relations(mine, real, pieces), _relations(its, real, pieces), real)
                for mine, its in zip(student, teacher, strict=True)
            ]
        ).sum()


def _relations(hidden: Tensor, real: Tensor | None, pieces: int) -> Tensor:
    """Logarithms of softmax(h h^T / sqrt(d)) over the keys, [rows, pieces, tokens, tokens], for pieces of width d."""
    cut = hidden.float().unflatten(-1, (pieces, -1)).transpose(1, 2)
    scores = cut @ cut.transpose(-1, -2) / cut.shape[-1] ** 0.5
    if real is not None:  # a finite number: minus infinity would make 0 times infinity of a padding key
        scores = scores.masked_fill(real[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _relation_divergence(mine: Tensor, its: Tensor, real: Tensor | None) -> Tensor:
    """Kullback-Leibler divergence from the teacher's relations, averaged over pieces and real queries."""
    each = (its.exp() * (its - mine)).sum(-1).mean(1)
    return each.mean() if real is None else (each * real).sum() / real.sum()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None) -> Tensor:
    """Mean squared error over pairs of real tokens that see each other, and heads, summed over layers.

    Args:
        student, teacher: per layer [rows, heads, tokens, tokens]: scores before the softmax, or probabilities.
        real: attention mask [rows, tokens]; None: every position counts, masked scores as 0.
    """
    losses = []
    for mine, its in zip(student, teacher, strict=True):
        seen = (its > OUT_OF_SIGHT) & (mine > OUT_OF_SIGHT)
        if real is None:
            losses.append(torch.where(seen, mine - its, 0.0).float().square().mean())
            continue
        pairs = real.bool()[:, None, :, None] & real.bool()[:, None, None, :]
        counted = seen & pairs
        error = torch.where(counted, mine - its, 0.0).float().square()
        losses.append(error.sum() / counted.sum().clamp(min=1))
    return torch.stack(losses).sum()
