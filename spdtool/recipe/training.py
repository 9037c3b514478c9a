"""The sections of a recipe that train: one for each training stage, the losses and the grafting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spdtool.recipe.section import Section

# Measured on widths 384 and 768 (docs/results.md); the best rate of Adam falls as one over the width.
RATE_TIMES_WIDTH = 0.384


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training stage on a data set.

    Attributes:
        epochs: passes over the training set, before `max_steps` cuts them short.
        steps: optimiser steps of the whole stage.
        steps_per_epoch: optimiser steps of one pass; the last batch may be smaller.
        reason: phrase for the user that names the fields that decided.
    """

    epochs: float
    steps: int
    steps_per_epoch: int
    reason: str


class Loss(Section):
    """Loss terms of the student. Every term sees real tokens only, unless `mask_padding` is off."""

    logits: float = Field(1.0, ge=0)
    """weight of the loss on the logits"""
    hidden: float = Field(1.0, ge=0)
    """weight of the mean squared error between hidden states, summed over layers"""
    attention: float = Field(0.0, ge=0)
    """weight of the mean squared error between attention maps, summed over layers; above 0: eager attention"""
    relation: float = Field(0.0, ge=0)
    """weight of the divergence between token-to-token relations of hidden states; widths may differ"""
    # As many as BERT_base has attention heads, after MiniLMv2 (Wang et al. 2021, arXiv 2012.15828).
    relation_heads: int = Field(12, ge=1)
    """heads that hidden states are split into before they are related"""
    layer_map: Literal["uniform", "last"] | tuple[int, ...] = "uniform"
    """teacher layer, from 1, that each student layer learns from: spread evenly, the topmost ones, or a list"""
    # The square keeps the gradient's size when the temperature changes (Hinton et al. 2015, arXiv 1503.02531).
    temperature: float = Field(2.0, gt=0)
    """softens both sides of the logit loss, which is multiplied by its square"""
    hardness: float = Field(1.0, ge=0, le=1)
    """weight of the teacher in the logit loss; the gold labels have the remainder (1: teacher only)"""
    regression_hardness: float = Field(1.0, ge=0, le=1)
    """the same for a regression task, where both are squared errors"""
    ranking: Literal["pointwise", "pairwise", "listwise"] = "pairwise"
    """of a reranker: compare scores alone, or also their differences, or their distribution over a query's passages"""
    cosine: float = Field(1.0, ge=0)
    """of embeddings, inside `logits`: weight of one minus the cosine to the teacher's vector"""
    distance: float = Field(0.0, ge=0)
    """of embeddings: weight of the squared distance to the teacher's vector, relative to the squared length of those"""
    similarity: float = Field(1.0, ge=0)
    """of embeddings: weight of the divergence between similarities to the other texts of the batch"""
    # The temperature with which sentence encoders are usually trained: a scale of 20.
    similarity_temperature: float = Field(0.05, gt=0)
    """divides the cosines to the other texts of the batch before their softmax"""
    attention_on: Literal["scores", "probabilities"] = "scores"
    """compare attention before the softmax, or after softmax and dropout, as the published code does"""
    mask_padding: bool = True
    """leave padding out of the hidden-state and attention losses"""
    per_label: bool = False
    """divide the logit loss by the number of labels, not times the temperature's square, as the published code does"""


class Grafting(Section):
    """How often a layer of the forward pass is the student's rather than the teacher's."""

    schedule: str = "constant"
    """constant, constant-then-one, linear, constant-then-linear, constant-then-linear-with-gap"""
    kind: Literal["bernoulli", "blend"] = "bernoulli"
    """draw each layer with the replacing rate, or mix both layers' outputs in that proportion"""
    start: float = Field(1.0, ge=0, le=1)
    """replacing rate at the start of the stage (1: the student alone)"""
    hold: float = Field(0.0, ge=0, le=1)
    """fraction of the stage for which `start` is held"""
    base: float | None = Field(None, ge=0, le=1)
    """rate from which the rise begins after the hold; none: `start`"""
    rise: float = Field(1.0, ge=0, le=1)
    """fraction of the stage over which the rate rises to 1"""
    stand_in_dropout: bool = False
    """run the teacher's layers with dropout when they stand in, as the published code does"""

    @property
    def enabled(self) -> bool:
        """Whether a teacher layer ever stands in: the replacing rate of the schedule is below 1 somewhere."""
        # By the numbers alone, since `--help` and the plan do without torch; `distillation.grafting`
        # has the schedules, and a test compares the two.
        base = self.start if self.base is None else self.base
        is_held = self.start < 1 and self.hold > 0
        if self.schedule == "constant-then-one":
            return is_held
        if self.schedule == "linear":
            return self.start < 1 and self.rise > 0
        if self.schedule == "constant-then-linear":
            return is_held or (self.start < 1 and self.rise > 0)
        if self.schedule == "constant-then-linear-with-gap":
            return is_held or (base < 1 and self.rise > 0 and self.hold < 1)
        return self.start < 1


class Training(Section):
    """Fields of every training stage: length, learning rate, batches."""

    epochs: float | None = Field(None, ge=0)
    """passes over the training set; none: derived from `steps`, `min_epochs` and `max_epochs`"""
    steps: int = Field(2000, ge=1)
    """optimiser steps to aim at when `epochs` is none"""
    min_epochs: float = Field(2, gt=0)
    """fewest epochs, however large the data set"""
    # Else the rows of a small data set would be seen hundreds of times.
    max_epochs: float = Field(10, gt=0)
    """most epochs, however small the data set"""
    max_steps: int | None = Field(None, ge=1)
    """hard limit on optimiser steps, for trials; none: no limit"""
    batch_size: int = Field(32, ge=1)
    """sentences (or pairs) per optimiser step"""
    accumulate: int = Field(1, ge=1)
    """micro-batches per batch and process, to save memory; the result is the same up to rounding"""
    learning_rate: float | None = Field(None, gt=0)
    """peak learning rate of AdamW; none: 0.384 divided by the model's width (1e-3 at 384, 5e-4 at 768)"""
    initial_learning_rate: float = Field(1.0, gt=0, le=1)
    """learning rate at the start of the stage, after the warm-up, as a fraction of the peak"""
    final_learning_rate: float = Field(0.0, ge=0, le=1)
    """learning rate at the end of the stage, as a fraction of the peak"""
    warmup: float = Field(0.06, ge=0, lt=1)
    """fraction of the stage over which the learning rate rises from 0"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay; biases and normalisation have none"""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon"""
    # As BERT is usually fine-tuned.
    clip: float = Field(1.0, ge=0)
    """largest gradient norm; 0: no clipping"""
    clip_over: Literal["trained", "all"] = "trained"
    """parameters that count in that norm; `all` counts frozen and pruned ones, as the published code does"""
    train: Literal["layers", "layers+head", "all"] = "all"
    """parameters of the student that are trained; all others stay the teacher's"""
    dropout: float | None = Field(None, ge=0, lt=1)
    """dropout of the model in training; none: as its configuration says"""
    evaluations: int = Field(1, ge=1)
    """dev evaluations per epoch"""
    scored_train_rows: int = Field(500, ge=0)
    """training rows to score beside the dev set at each evaluation, to show the gap between them; 0: none"""
    keep_best: bool = True
    """save the best evaluated weights (once the target sparsity is reached) rather than the last"""

    def length(self, rows: int) -> TrainingLength:
        """Turn the number of training rows into epochs and optimiser steps."""
        steps_per_epoch = math.ceil(rows / self.batch_size)
        epochs, reason = self._epochs(steps_per_epoch)
        steps = round(epochs * steps_per_epoch)
        if self.max_steps is not None:
            steps = min(steps, self.max_steps)
            reason += f"; at most {self.max_steps} steps"
        return TrainingLength(epochs, steps, steps_per_epoch, reason)

    def _epochs(self, steps_per_epoch: int) -> tuple[float, str]:
        if self.epochs is not None:
            return self.epochs, "as the recipe says"
        wanted = self.steps / steps_per_epoch
        if wanted < self.min_epochs:
            return self.min_epochs, f"min_epochs; {self.steps} steps would be {wanted:.1f}"
        if wanted > self.max_epochs:
            return self.max_epochs, f"max_epochs; {self.steps} steps would be {wanted:.1f}"
        # Whole epochs: the last evaluation then falls on the end of one.
        return float(round(wanted)), f"{self.steps} steps of {self.batch_size} rows"

    def peak(self, width: int) -> float:
        """Return the peak learning rate for a model of `width` (Yang et al. 2022, arXiv 2203.03466)."""
        if self.learning_rate is None:
            return RATE_TIMES_WIDTH / width
        return self.learning_rate


class Teacher(Training):
    """Fine-tuning of the dense model on the task; skipped when a teacher is given."""

    # The usual rate of a dense BERT; the student, which has to make up for lost weights, learns faster.
    stage_defaults: ClassVar[Mapping[str, float]] = {
        "learning_rate": 5e-5,
        "steps": 1200,
        "min_epochs": 3,
    }

    accept: bool = False
    """go on with a teacher that scores no better than chance"""


class Distilled(Training):
    """A training stage of the student, distilled from the teacher."""

    loss: Loss = Loss()
    """terms of the loss"""
    grafting: Grafting = Grafting()
    """schedule of the replacing rate"""


SparsityCurve = Literal["cubic", "linear"]


class Prune(Distilled):
    """Phase 1: prune the student to the target sparsity while it is distilled."""

    # The rate falls once over all three phases: here to a half, where phase 2 goes on.
    stage_defaults: ClassVar[Mapping[str, float]] = {
        "final_learning_rate": 0.5,
        "steps": 4000,
        "max_epochs": 20,
    }

    criterion: str = "magnitude"
    """score of a weight: the lowest are pruned; `spdtool plugins` lists the criteria"""
    pattern: str = "unstructured"
    """which weights go together: `unstructured`, blocks such as `1x4` (outputs x inputs), or N:M such as `2:4`"""
    scope: Literal["matrix", "type", "global"] = "matrix"
    """reach the target in every matrix, over all of one kind (all query matrices), or over all together"""
    # An empty matrix would cut the network in two, and no gradient would reach what lies below.
    least: float = Field(0.01, ge=0, lt=1)
    """share of each matrix that stays alive when the scope is not `matrix`, whatever the scores say"""
    # Early, few weights matter; late, every event hurts (Zhu & Gupta 2017, arXiv 1710.01878).
    schedule: SparsityCurve = "cubic"
    """path of the sparsity from event to event"""
    events: int = Field(12, ge=1)
    """number of prune events, exactly"""
    first: float | None = Field(None, ge=0, lt=1)
    """sparsity of the first event, before the first step, limited by `first_limit`; none, or with a shape: gently"""
    first_limit: float = Field(0.8, gt=0, lt=1)
    """largest first event, as a fraction of the target sparsity: the remainder needs events too"""
    ramp: float = Field(0.7, gt=0, le=1)
    """fraction of the stage over which the events are spread; the rest is recovery"""
    # Kurtic et al. 2022, arXiv 2203.07259, rewind to recover after each event.
    rewind: float | None = Field(None, ge=0, le=1)
    """learning rate just before each event, as a fraction of the peak that it jumps back to; none: one decay"""
    regrowth: bool = False
    """pruned weights compete again at each event, with the value that they had when they were pruned"""
    exchanges: int = Field(0, ge=0)
    """further events at the target, at which regrown and pruned weights change places"""
    freeze: float = Field(0.85, gt=0, le=1)
    """fraction of the stage over which the exchanges are spread; then the masks are frozen"""
    calibration: int = Field(0, ge=0)
    """batches whose gradients are taken anew at each event; 0: those of the training steps since the last event"""
    saliency: Literal["loss", "logits"] = "loss"
    """what the criterion's gradients are of: the whole loss, or its logit term alone"""
    # Each block's Fisher matrix is kept and inverted: memory grows with its width, time with the square.
    fisher_block: int = Field(16, ge=1)
    """weights per block of a blockwise second-order criterion"""
    dampening: float = Field(0.01, gt=0)
    """added to the diagonal of second-order statistics, as a fraction of its mean"""
    penalty: float = Field(1.0, ge=0)
    """weight of the sigmoid penalty under which movement-soft learns its scores"""
    score_rate: float = Field(0.01, gt=0)
    """learning rate of the scores of movement-soft, as in the paper's published settings"""
    update: bool = True
    """let a second-order criterion update the surviving weights at each event"""
    save_at: tuple[float, ...] = ()
    """intermediate sparsities at which to save an evaluated student; heads and neurons that are gone count as zeros"""
    heads: float | None = Field(None, ge=0, le=1)
    """smaller dense student: share of each layer's attention heads that stays; none: all, if `neurons` is set"""
    neurons: float | None = Field(None, ge=0, le=1)
    """the same of feed-forward neurons, rounded to a multiple of 32"""
    shape: tuple[tuple[int, int], ...] = ()
    """the same layer by layer, in place of `heads` and `neurons`: how many of each stay, [[heads, neurons], ...]"""
    zeros: float = Field(0.0, ge=0, lt=1)
    """share of zeros, in the pattern, inside the matrices of a smaller student; they come after heads and neurons"""
    layers: tuple[int, ...] = ()
    """teacher layers, from 1, that the student starts with; one number: so many, spread evenly; empty: all"""

    @property
    def is_structured(self) -> bool:
        """Whether whole heads and neurons are removed, in place of single weights."""
        return bool(self.shape) or self.heads is not None or self.neurons is not None

    @model_validator(mode="after")
    def _check_structured(self) -> Prune:
        """Refuse settings of single weights that a shape leaves without a meaning."""
        if not self.is_structured:
            return self
        if self.shape and (self.heads is not None or self.neurons is not None):
            raise ValueError("prune.shape says what stays of each layer: leave prune.heads and prune.neurons out")
        clashes = {
            f"pattern={self.pattern}": self.pattern != "unstructured" and not self.zeros,
            "regrowth=true": self.regrowth,
            f"exchanges={self.exchanges}": self.exchanges > 0,
        }
        for setting, is_set in clashes.items():
            if is_set:
                hint = ": prune.zeros says how many zeros of it are inside" if setting.startswith("pattern") else ""
                raise ValueError(f"removed heads and neurons do not go with prune.{setting}{hint}")
        return self


class Distill(Distilled):
    """Phase 2: distil the pruned student; with grafting, the replacing rate rises to 1."""

    stage_defaults: ClassVar[Mapping[str, float]] = {
        "warmup": 0.0,
        "initial_learning_rate": 0.5,
        "final_learning_rate": 0.25,
    }


class Finetune(Distilled):
    """Phase 3: the student alone, still distilled; the learning rate goes on from phase 2."""

    stage_defaults: ClassVar[Mapping[str, float]] = {"warmup": 0.0, "initial_learning_rate": 0.25}

    quantize: Literal["off", "int8"] = "off"
    """int8: train with weights and activations rounded as int8 products are; the scores include the rounding"""
    quantize_start: float = Field(0.5, ge=0, lt=1)
    """share of the phase's steps after which they are rounded"""
    vocabulary: Literal["all", "data"] = "all"
    """data: the student keeps the tokens that training rows, `vocabulary_texts` and words of their characters need"""
    vocabulary_texts: str | None = None
    """UTF-8 file with a text a line, whose tokens are kept too"""
