"""The recipe: every number and choice that changes a result, one section per stage, frozen.

A recipe is read from TOML (`spdtool/recipe/*.toml` or your own file), overridden by the flags of the command
line and by `--set section.field=value`, saved as `run.json`, and never changed afterwards. The docstring under
each field is its help text: `spdtool recipes default` prints them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spdtool.recipe import PHASES, STAGES

# Measured on widths 384 and 768 (docs/results.md); the best rate of Adam falls as one over the width.
RATE_TIMES_WIDTH = 0.384
# These may change between two calls on one run folder: they change no weight, or its last bits alone.
MAY_CHANGE = frozenset({"name", "save_minutes", "restarts", "shard", "device", "threads", "log"})
# These decide whether a run goes on, not what a finished stage holds.
ACCEPTED_LATER = frozenset({"teacher.accept"})
# Fields outside the sections that the teacher stage does not read.
STUDENT_FIELDS = frozenset(
    {
        "sparsity",
        "student",
        "teacher_states_gb",
        "teacher_states_share",
        "unlabeled",
        "unlabeled_text",
        "unlabeled_share",
    }
)
# What is asked of the student and only measured in the end; the other fields of `goal` decide its shape.
MEASURED_GOALS = frozenset({"goal.max_drop", "goal.tolerance"})
FIELDS_HINT = "(`spdtool recipes default` lists every field)"
TargetNames = tuple[str, ...] | Literal["installed"]
LIST_TYPES = (tuple[str, ...], TargetNames, tuple[int, ...], tuple[float, ...])

FieldChange = tuple[str, JsonValue, JsonValue]


class Section(BaseModel):
    """A frozen group of fields that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # a learning rate of inf would only fail hours later
    )

    # A stage that starts from another default names it here, so that each field is described once.
    stage_defaults: ClassVar[Mapping[str, float]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_stage_defaults(cls, values: object) -> object:
        # Not a dict: a section that is complete, or a value that pydantic refuses next.
        return {**cls.stage_defaults, **values} if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _read_list(cls, value: object, info: ValidationInfo) -> object:
        """Let a list field also take a single value, or words separated by commas."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if annotation not in LIST_TYPES or (annotation == TargetNames and value == "installed"):
            return value
        if isinstance(value, str):
            words = (word.strip() for word in value.split(","))
            return list(filter(None, words))
        if isinstance(value, int | float):
            return [value]
        return value


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
    """intermediate sparsities at which to save an evaluated student"""
    heads: float | None = Field(None, ge=0, le=1)
    """smaller dense student: share of each layer's attention heads that stays; none: all, if `neurons` is set"""
    neurons: float | None = Field(None, ge=0, le=1)
    """the same of feed-forward neurons, rounded to a multiple of 32"""
    shape: tuple[tuple[int, int], ...] = ()
    """the same layer by layer, in place of `heads` and `neurons`: how many of each stay, [[heads, neurons], ...]"""
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
            f"pattern={self.pattern}": self.pattern != "unstructured",
            "regrowth=true": self.regrowth,
            f"exchanges={self.exchanges}": self.exchanges > 0,
            f"save_at={list(self.save_at)}": bool(self.save_at),
        }
        for setting, is_set in clashes.items():
            if is_set:
                raise ValueError(f"removed heads and neurons do not go with prune.{setting}")
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


Storage = Literal["smallest", "fp32", "fp16", "int8"]
# Allowed change of the dev metric, by the coarsest storage of the exported file.
BUDGETS: Mapping[str, float] = {"fp32": 0.001, "fp16": 0.002, "int8": 0.005}


class Export(Section):
    """Teacher and student as files for a runtime, each checked against its checkpoint."""

    targets: tuple[str, ...] = ("onnx",)
    """export targets; `spdtool plugins` lists them"""
    optional: TargetNames = "installed"
    """further targets; a refused one is left out; "installed": every installed one that is exported by default"""
    skip: tuple[str, ...] = ()
    """targets of `optional` to leave out"""
    values: Storage = "smallest"
    """how a target that packs pruned matrices stores them; smallest: int8 or fp16, by the dev set within the budget"""
    embeddings: Storage = "smallest"
    """how a target that packs pruned matrices stores the embeddings; as `values`"""
    # 18 is the first that torch's exporter writes without converting.
    opset: int = Field(18, ge=18)
    """ONNX operator set; from 23 on, attention is one operator of it, which not every runtime has"""
    sparse_initializers: bool = False
    """store matrices of over two thirds zeros as sparse constants: smaller, no faster; OpenVINO refuses them"""
    reduce_range: bool | None = None
    """int8 weights with 7 bits, for CPUs whose products saturate; none: where this CPU has no VNNI"""
    calibration: int = Field(128, ge=1)
    """training rows on which onnx-int8-static sees the ranges of activations"""
    tries: int = Field(24, ge=4)
    """most trial exports that look for the layers to keep in float32 where int8 breaks the budget"""
    # float32 sums in another order differ by less, a wrong graph by far more.
    tolerance: float = Field(1e-4, gt=0)
    """largest difference of a logit between the checkpoint and the exported file"""
    rounded_tolerance: float = Field(0.25, gt=0)
    """the same for fp16 or int8 arithmetic: root mean square, relative to the logits; below it the budget decides"""
    budget: float | None = Field(None, ge=0)
    """largest change of the dev metric, beyond one prediction; none: 0.001, fp16 0.002, int8 0.005"""
    sentences: int = Field(64, ge=1)
    """real dev sentences on which the logits are compared"""
    # Percentile intervals of fewer wobble in their second digit.
    resamples: int = Field(1000, ge=100)
    """resamples of the test rows from which the intervals of the test scores come, drawn by `seed`"""
    confidence: float = Field(0.95, gt=0, lt=1)
    """confidence of these intervals"""
    calibrate: bool = True
    """fit a temperature on the dev rows, by which logits are divided before they become probabilities"""
    bins: int = Field(15, ge=2)
    """intervals of the probability in which it is compared with the share of right answers"""
    differing_rows: int = Field(20, ge=0)
    """most dev rows to show on which student and teacher differ"""

    def allowed_change(self, *, rounds: bool, storage: tuple[str, ...] = ()) -> float:
        """Return the largest change of the dev metric that passes.

        Args:
            rounds: whether the target stores the weights rounded, rather than exactly.
            storage: how it stores them.
        """
        if self.budget is not None:
            return self.budget
        if not rounds:
            return BUDGETS["fp32"]
        return max(BUDGETS[kind] for kind in storage)


class Bench(Section):
    """Student against dense teacher, side by side in one run."""

    batches: tuple[int, ...] = (1, 8)
    """batch sizes"""
    lengths: tuple[int, ...] = (32, 128)
    """sequence lengths in tokens"""
    padded: tuple[tuple[int, int], ...] = ((8, 128),)
    """batch sizes and lengths that are also timed with padding: real lengths vary as they do in the dev set"""
    threads: tuple[int, ...] = (1, 0)
    """numbers of threads, each with rounds of its own; 0: all cores"""
    rounds: int = Field(12, ge=1)
    """most interleaved rounds; each engine is timed once a round"""
    warmup: int = Field(1, ge=0)
    """rounds that are not counted"""
    seconds: float = Field(90.0, ge=0)
    """time for all rounds; fewer are made if they would take longer, but at least six per number of threads"""
    unfused: bool = True
    """also time the dense teacher without onnxruntime's fused operators; the faster of the two is the 1x"""
    int8: bool = True
    """also time the dense teacher in onnxruntime's dynamic int8, unless onnx-int8 was exported"""
    openvino: bool = True
    """also time the dense teacher in OpenVINO's static int8, where openvino and nncf are installed"""
    variants: bool = True
    """also time the further forms that were exported of both (fused, fp16, int8), side by side"""
    torch: bool = True
    """also time the dense teacher in PyTorch, eager"""
    compiled: bool = True
    """and in torch.compile, where there is a compiler; only with `bench.torch`"""
    ledger: bool = True
    """measure the machine's peak and bandwidth, and each pruned matrix alone against them"""


class Goal(Section):
    """What the student must reach; sparsity or shape are then derived, and the bench measures the promise."""

    speedup: float | None = Field(None, gt=1)
    """how many times faster than the dense teacher the student must be, in `goal.runtime`; none: no such goal"""
    max_mb: float | None = Field(None, gt=0)
    """largest size of the student's file in MB (1 MB: 1,000,000 bytes); none: no such goal"""
    max_drop: float | None = Field(None, ge=0, le=100)
    """largest loss of dev score in points (1.0: from 0.90 to 0.89); none: no such goal"""
    kind: Literal["auto", "sparse", "blocks", "small"] = "auto"
    """student that is made: `small` has fewer heads and neurons, `sparse` has zeros and needs a plugin to be faster"""
    runtime: Literal["onnxruntime", "openvino", "cuda", "web"] = "onnxruntime"
    """runtime in which the speed-up is asked for; `cuda` and `web` need a `goal.profile`"""
    profile: str | None = None
    """file with the times of a layer at every shape, from `spdtool bench --profile`; none: measured in the run"""
    batch: int = Field(1, ge=1)
    """batch size at which the speed-up is asked for"""
    length: int | None = Field(None, ge=4)
    """tokens of a row at which the speed-up is asked for; none: `max_length`, or the model's positions"""
    threads: int = Field(1, ge=0)
    """threads with which the speed-up is asked for; 0: all cores"""
    calibration: int = Field(512, ge=1)
    """training rows from whose hidden states the loss of every removal is computed, before a shape is chosen"""
    table: str | None = None
    """sha256 of the table of times or bytes by which `prune.shape` was chosen; a run fills in both"""
    # Two processes of one machine differ by as much.
    tolerance: float = Field(0.05, ge=0, lt=1)
    """fraction by which the measured speed-up may fall short beyond its interval before the promise is broken"""

    @property
    def is_set(self) -> bool:
        """Whether anything is asked for."""
        return self.speedup is not None or self.max_mb is not None or self.max_drop is not None

    @model_validator(mode="after")
    def _check_wishes(self) -> Goal:
        """Refuse wishes that contradict each other."""
        if self.profile is not None and self.speedup is None and self.max_drop is None:
            raise ValueError("goal.profile has times, and no speed-up is asked for: add goal.speedup, or leave it out")
        elsewhere = self.runtime in ("cuda", "web")
        if elsewhere and self.speedup is not None and self.profile is None:
            raise ValueError(
                f"goal.runtime = {self.runtime!r} needs goal.profile, a table of times that was measured there"
            )
        if self.has_full_width:
            if self.runtime != "onnxruntime":
                raise ValueError(f"goal.kind = {self.kind!r} is not faster in {self.runtime}, which skips no zeros")
            if self.profile is not None:
                raise ValueError(
                    "goal.profile has the times of layers with fewer heads and neurons: a sparse student has all"
                )
        return self

    @property
    def has_full_width(self) -> bool:
        """Whether the student keeps every head and neuron, and is fast by its zeros."""
        return self.kind in ("sparse", "blocks")

    @property
    def searches(self) -> bool:
        """Whether several students are tried: how small the student may be depends on its score."""
        return self.max_drop is not None and self.speedup is None and self.table is None

    @property
    def label(self) -> str:
        """What is asked for, for names of folders: such as `3x` or `20MB`."""
        wishes = []
        if self.speedup is not None:
            wishes.append(f"{self.speedup:g}x")
        if self.max_mb is not None:
            wishes.append(f"{self.max_mb:g}MB")
        if self.max_drop is not None:
            wishes.append(f"drop{self.max_drop:g}")
        return "-".join(wishes)

    def describe(self) -> str:
        """Say what is asked for, such as `3x in onnxruntime, at most 20 MB`."""
        wishes = []
        if self.speedup is not None:
            wishes.append(f"{self.speedup:g}x in {self.runtime}")
        if self.max_mb is not None:
            wishes.append(f"at most {self.max_mb:g} MB")
        if self.max_drop is not None:
            wishes.append(f"at most {self.max_drop:g} points of dev score lost")
        return ", ".join(wishes)


class Recipe(Section):
    """Everything that decides a run."""

    name: str = "default"
    """recipe that the defaults come from"""
    task: str = "demo"
    """task name; `spdtool tasks` lists them"""
    data: str | None = None
    """file or folder to read instead of the hub"""
    text: tuple[str, ...] = ()
    """one or two text columns of a local file"""
    label: str | None = None
    """label column of a local file"""
    regression: bool | None = None
    """whether its labels are numbers to predict, not classes; none: if all are numbers and not all are whole"""
    multilabel: bool | None = None
    """whether a row may have several labels; none: if the rows hold lists, or several labels of a labels.txt"""
    model: str = "google-bert/bert-base-uncased"
    """encoder to fine-tune: a folder or a hub name"""
    student: str | None = None
    """start of the student: a folder, a hub name, or `pretrained` for `model`; none: a copy of the teacher"""
    given_teacher: str | None = None
    """a fine-tuned model that is used as it is"""
    sparsity: float = Field(0.9, ge=0, lt=1)
    """fraction of the encoder's weights that are zero in the end"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of everything that is random"""
    metric: str | None = None
    """metric of the task that is the dev score and picks the best checkpoint; none: the mean of all its metrics"""
    max_length: int = Field(128, ge=4)
    """longest input in tokens; longer ones are cut, or read in windows where every word counts"""
    window_stride: int = Field(32, ge=0)
    """tokens that neighbouring windows of a long text share, where a kind of task reads it in windows"""
    max_rows: int | None = Field(None, ge=2)
    """use only that many rows of each split, for trials; none: all"""
    dev_share: float = Field(0.1, gt=0, lt=1)
    """fraction of a local file's rows that becomes the dev set where there is none"""
    pairs: str | None = None
    """of embeddings: file or folder of rated pairs of texts, on which the dev score is measured"""
    neighbour_texts: int = Field(2000, ge=2)
    """of embeddings: most texts that are not trained on, whose nearest neighbours are compared with the teacher's"""
    negatives: int = Field(8, ge=1)
    """of a reranker with qrels: passages to draw at random for a query that has relevant ones only"""
    test_share: float = Field(0.0, ge=0, lt=1)
    """fraction of the training rows of each class that becomes the test set where there is none; 0: no test set"""
    unlabeled: str | None = None
    """file of texts without labels, which the teacher labels and the student learns from too"""
    unlabeled_text: tuple[str, ...] = ()
    """text columns of that file; none: those of the training rows"""
    # Half and half: the gold rows are still seen as often as without.
    unlabeled_share: float = Field(0.5, gt=0, lt=1)
    """share of the rows of an epoch that have no label, taken in turn from the file; at most all of them"""
    bucketing: bool = True
    """batch rows of similar length, padded to the longest of the batch; off: pad every batch to `max_length`"""
    # Larger pools pad less and shuffle less.
    pool_batches: int = Field(50, ge=1)
    """rows are sorted by length inside random pools of this many batches, when bucketing"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """autocast of the training stages; auto: bf16 on a GPU that has it, else fp32; stage.json says what was used"""
    tf32: bool = False
    """on a GPU, multiply float32 matrices in TF32, which keeps 11 of 24 bits; never in statistics and prune events"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; `cuda` refuses to fall back"""
    threads: int = Field(0, ge=0)
    """threads of a training process, which change the last bits; 0: as many as the run began with"""
    shard: bool = False
    """shard student, teacher and AdamW's state over the processes (FSDP): for very large encoders"""
    gradient_checkpointing: bool = False
    """recompute layers in the backward pass to save memory"""
    compile: bool = False
    """torch.compile each layer"""
    cuda_graph: Literal["auto", "off"] = "auto"
    """on a GPU, launch each step as one CUDA graph where every step is the same; pads to multiples of 8 tokens"""
    deterministic: bool = False
    """take only operations whose sums have a fixed order; slower on a GPU, and refused where there is none"""
    sparse_products: bool = True
    """let plugins compute the student's linear layers without their zeros, where that is faster"""
    smoke: bool = False
    """a few steps on a small random model: proves that the pipeline runs, and nothing else"""
    save_minutes: float = Field(10.0, ge=0)
    """minutes between resumable states inside an epoch; 0: after every step"""
    restarts: int = Field(0, ge=0)
    """how often `--processes` starts its processes again, from the last snapshot, when one of them is lost"""
    log: tuple[str, ...] = ()
    """trackers of accelerate that also get the training log, such as tensorboard; its files go to logs/ of the run"""
    teacher_states_gb: float = Field(4.0, ge=0)
    """disk for the teacher's hidden states of all rows, which saves its forward passes on a CPU; 0: none"""
    # The rest is for AdamW, activations and graphs.
    teacher_states_share: float = Field(0.4, ge=0, lt=1)
    """share of a GPU's free memory that may hold the same in bf16; 0: the teacher looks at each batch"""

    teacher: Teacher = Teacher()
    prune: Prune = Prune()
    distill: Distill = Distill()
    finetune: Finetune = Finetune()
    export: Export = Export()
    bench: Bench = Bench()
    goal: Goal = Goal()

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        """Refuse, before anything runs, settings that do not go together."""
        if self.student is not None and self.prune.layers:
            raise ValueError("prune.layers chooses layers of the teacher: leave it out, or `student`")
        if self.goal.is_set and self.goal.table is None and self.prune.is_structured:
            raise ValueError(
                "a goal chooses the shape: leave prune.shape, prune.heads and prune.neurons out, or the goal"
            )
        if self.goal.is_set and not self.goal.has_full_width and self.prune.pattern != "unstructured":
            raise ValueError(
                f"prune.pattern = {self.prune.pattern!r} is of zeros: leave it out, or ask for goal.kind=sparse"
            )
        if self.goal.is_set and self.goal.kind == "blocks" and self.prune.pattern == "unstructured":
            raise ValueError("goal.kind = 'blocks' needs a pattern of blocks: leave prune.pattern out for 1x4")
        if not self.shard:
            return self
        if self.prune.is_structured:
            raise ValueError("sharded weights do not go with prune.shape, prune.heads and prune.neurons")
        clashes = {"precision=fp16": self.precision == "fp16", "compile=true": self.compile}
        for phase, section in self.phases.items():
            clashes[f"{phase}.grafting.kind=blend"] = section.grafting.kind == "blend"
            clashes[f"{phase}.clip_over=all"] = section.clip_over == "all"
        clashes["prune.saliency=logits"] = self.prune.saliency == "logits"
        clashes["finetune.quantize=int8"] = self.finetune.quantize == "int8"
        clashes["finetune.vocabulary=data"] = self.finetune.vocabulary == "data"
        for setting, is_set in clashes.items():
            if is_set:
                raise ValueError(f"sharded weights do not go with {setting}")
        return self

    def section(self, stage: str) -> Section:
        """Return the section of `stage`."""
        section = getattr(self, stage)
        assert isinstance(section, Section)
        return section

    @property
    def phases(self) -> dict[str, Distilled]:
        """Sections of the student's phases, in their order."""
        return {"prune": self.prune, "distill": self.distill, "finetune": self.finetune}

    @property
    def grafted_phases(self) -> tuple[str, ...]:
        """Phases in which teacher layers stand in for the student's."""
        return tuple(name for name, phase in self.phases.items() if phase.grafting.enabled)

    @property
    def size_label(self) -> str:
        """How small the student is, for titles: the sparsity, unless it follows from a shape."""
        if self.prune.is_structured:
            return "fewer heads and neurons"
        return f"{self.sparsity:.0%} zeros"

    @property
    def pool(self) -> int | None:
        """Batches of a pool of rows that are sorted by length; None without bucketing."""
        return self.pool_batches if self.bucketing else None

    def without_unlabeled(self) -> Recipe:
        """Return the recipe of a stage that reads no texts without labels."""
        return self if self.unlabeled is None else self.model_copy(update={"unlabeled": None})

    def unlabeled_per_epoch(self, labeled: int, unlabeled: int) -> int:
        """Return how many rows without labels an epoch of the student has beside the labelled ones."""
        share = self.unlabeled_share
        return min(unlabeled, max(1, round(labeled * share / (1 - share)))) if unlabeled else 0

    def shared_fields(self) -> dict[str, JsonValue]:
        """Return the fields outside the sections that decide the result on one machine."""
        return self.model_dump(mode="json", exclude={*STAGES, *MAY_CHANGE})

    def mark_smoke(self, title: str) -> str:
        """Return `title`, with a warning in front of it if this is a smoke run."""
        return f"SMOKE RUN, NO RESULT: {title}" if self.smoke else title

    def diff(self, other: Recipe) -> list[FieldChange]:
        """List `(dotted name, value here, value in other)` of every field that differs."""
        theirs = other.values()
        changes = []
        for name, value in self.values().items():
            if value != theirs.get(name):
                changes.append((name, value, theirs.get(name)))
        return changes

    def values(self) -> dict[str, JsonValue]:
        """Return every value by its dotted name, as it stands in JSON."""
        return flatten(self.model_dump(mode="json"))


def first_stage_using(field: str) -> str:
    """Return the first stage that reads `field`, a dotted name."""
    section = field.split(".")[0]
    if section in STAGES:
        return section
    if field in MEASURED_GOALS:
        return STAGES[-1]
    if section == "goal":
        return PHASES[0]
    return PHASES[0] if field in STUDENT_FIELDS else STAGES[0]


def flatten(tree: Mapping[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    """Return the leaves of nested dicts by their dotted names."""
    leaves: dict[str, JsonValue] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
