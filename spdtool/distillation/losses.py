"""The distillation losses: logits, hidden states, attention. Padding never counts, unless a recipe asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.distillation.observation import Observation
from spdtool.recipe import Loss

OUT_OF_SIGHT = -1e4  # scores below this were masked by the model itself (padding, a local attention window)


def distillation(
    student: Observation, teacher: Observation, batch: dict[str, Tensor], weights: Loss, *, regression: bool
) -> dict[str, Tensor]:
    """Every term with a weight above 0, unweighted, and `loss`: their weighted sum.

    Args:
        batch: `attention_mask` [rows, tokens] and `labels` [rows].
        regression: whether the labels are numbers.
    """
    real = batch["attention_mask"] if weights.mask_padding else None
    terms: dict[str, Tensor] = {}
    if weights.logits > 0:
        match = regression_loss if regression else logit_loss
        terms["logits"] = match(student.logits, teacher.logits, batch["labels"], weights)
    if weights.hidden > 0:
        assert student.hidden is not None
        assert teacher.hidden is not None
        terms["hidden"] = hidden_loss(student.hidden, teacher.hidden, real)
    if weights.attention > 0:
        assert student.attention is not None
        assert teacher.attention is not None
        terms["attention"] = attention_loss(student.attention, teacher.attention, real)
    total = sum((getattr(weights, name) * term for name, term in terms.items()), start=torch.zeros(()))
    return {"loss": total} | terms


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
