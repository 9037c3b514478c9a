"""The recipe: every number and choice that changes a result, one section per stage, frozen.

A recipe is read from TOML (`spdtool/recipes/*.toml`, or a file of yours), overridden by the command line's flags and by
`--set section.field=value`, saved as `run.json`, and never changed afterwards. The docstring under each field is its
help text: `spdtool recipes default` prints them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

RATE_TIMES_WIDTH = 0.384
FREE = frozenset(
    {"name", "save_minutes", "restarts", "shard", "device", "teacher_states_gb"}
)  # they may change between two calls on one run folder
OF_STUDENT = frozenset({"sparsity", "student"})  # fields outside the sections of which the teacher knows nothing
SEE_FIELDS = "(`spdtool recipes default` lists every field)"
PHASES = ("prune", "distill", "finetune")  # of the student
TRAINING = ("teacher", *PHASES)
STAGES = (*TRAINING, "export", "bench")
SEVERAL = (tuple[str, ...], tuple[int, ...], tuple[float, ...])  # types of fields


class Section(BaseModel):
    """A frozen group of fields that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        """A field of several names or numbers also takes a single one, and words between commas."""
        assert info.field_name is not None
        if cls.model_fields[info.field_name].annotation not in SEVERAL:
            return value
        if isinstance(value, str):
            return [word.strip() for word in value.split(",") if word.strip()]
        return [value] if isinstance(value, int | float) else value


class Loss(Section):
    """What the student is trained on. Every term sees real tokens only, unless `mask_padding` is off."""

    logits: float = Field(1.0, ge=0)
    """weight of the loss on the logits"""
    hidden: float = Field(1.0, ge=0)
    """weight of the mean squared error between hidden states, summed over layers"""
    attention: float = Field(0.0, ge=0)
    """weight of the mean squared error between attention maps, summed over layers; above 0, attention runs eagerly"""
    relation: float = Field(0.0, ge=0)
    """weight of the divergence between token-to-token relations of hidden states, summed over layers; any width fits"""
    relation_heads: int = Field(12, ge=1)
    """pieces that hidden states are cut into before they are related"""
    layer_map: Literal["uniform", "last"] | tuple[int, ...] = "uniform"
    """teacher's layer, from 1, that each of the student learns from: spread evenly, the topmost ones, or a list"""
    temperature: float = Field(2.0, gt=0)
    """softens both sides of the logit loss, which is multiplied by its square"""
    hardness: float = Field(1.0, ge=0, le=1)
    """share of the teacher in the logit loss; the gold labels have the rest (1: teacher only)"""
    regression_hardness: float = Field(1.0, ge=0, le=1)
    """the same for a regression task, where both are squared errors"""
    attention_on: Literal["scores", "probabilities"] = "scores"
    """attention before the softmax, or what comes out of softmax and dropout, as the published code takes it"""
    mask_padding: bool = True
    """leave padding out of the hidden-state and attention losses"""
    per_label: bool = False
    """divide the logit loss by the number of labels, without the temperature's square, as the published code does"""


class Grafting(Section):
    """How often a layer of the forward pass is the student's own rather than the teacher's."""

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


class Training(Section):
    """What every training stage has: how long, how fast, on how much at a time."""

    epochs: float | None = Field(None, ge=0)
    """passes over the training set; none: derived from `steps`, `min_epochs` and `max_epochs`"""
    steps: int = Field(2000, ge=1)
    """optimiser steps that are aimed at when `epochs` is not given"""
    min_epochs: float = Field(2, gt=0)
    """fewest epochs, however large the data set"""
    max_epochs: float = Field(10, gt=0)
    """most epochs, however small the data set"""
    max_steps: int | None = Field(None, ge=1)
    """hard limit on optimiser steps, for trials; none: no limit"""
    batch_size: int = Field(32, ge=1)
    """sentences (or pairs) per optimiser step"""
    accumulate: int = Field(1, ge=1)
    """pieces into which each process cuts its rows of a batch to save memory; the result is the same up to rounding"""
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
    clip: float = Field(1.0, ge=0)
    """largest gradient norm; 0: no clipping"""
    clip_over: Literal["trained", "all"] = "trained"
    """parameters whose gradients count in that norm; `all` counts frozen and pruned ones, as the published code does"""
    train: Literal["layers", "layers+head", "all"] = "all"
    """which of the student's parameters are trained; the rest stays the teacher's"""
    dropout: float | None = Field(None, ge=0, lt=1)
    """dropout of the model while it is trained; none: as its configuration says"""
    evaluations: int = Field(1, ge=1)
    """dev evaluations per epoch"""
    scored_train_rows: int = Field(500, ge=0)
    """training rows that are scored beside the dev set at each evaluation, to show the gap between them; 0: none"""
    keep_best: bool = True
    """hand over the best evaluated weights (once the target sparsity is reached) rather than the last"""

    def epochs_for(self, rows: int) -> tuple[float, str]:
        """How many epochs `rows` training rows get, and why.

        Returns:
            the number of epochs, and a phrase for the user that names where it comes from.
        """
        if self.epochs is not None:
            return self.epochs, "as the recipe says"
        per_epoch = math.ceil(rows / self.batch_size)
        wanted = self.steps / per_epoch
        if wanted < self.min_epochs:
            return self.min_epochs, f"min_epochs; {self.steps} steps would be {wanted:.1f}"
        if wanted > self.max_epochs:
            return self.max_epochs, f"max_epochs; {self.steps} steps would be {wanted:.1f}"
        return float(round(wanted)), f"{self.steps} steps of {self.batch_size} rows"

    def peak(self, width: int) -> float:
        """The peak learning rate for a model whose hidden states have `width` numbers.

        The best rate of Adam falls as one over the width (Yang et al. 2022, arXiv 2203.03466); see docs/results.md for
        where the constant was measured.
        """
        return RATE_TIMES_WIDTH / width if self.learning_rate is None else self.learning_rate

    def steps_for(self, rows: int) -> int:
        """Optimiser steps of the stage on `rows` training rows."""
        total = round(self.epochs_for(rows)[0] * math.ceil(rows / self.batch_size))
        return total if self.max_steps is None else min(total, self.max_steps)


class Teacher(Training):
    """Fine-tuning of the dense model on the task; skipped when a teacher is given."""

    learning_rate: float | None = Field(5e-5, gt=0)
    """peak learning rate of AdamW; none: 0.384 divided by the model's width"""
    steps: int = Field(1200, ge=1)
    """optimiser steps that are aimed at when `epochs` is not given"""
    min_epochs: float = Field(3, gt=0)
    """fewest epochs, however large the data set"""


class Distilled(Training):
    """A training stage of the student, with the losses that it learns from."""

    loss: Loss = Loss()
    """terms of the loss"""
    grafting: Grafting = Grafting()
    """schedule of the replacing rate"""


class Prune(Distilled):
    """Phase 1: the student is pruned to the target sparsity while grafted and distilled."""

    final_learning_rate: float = Field(0.5, ge=0, le=1)
    """learning rate at the end of the stage, as a fraction of the peak"""

    criterion: str = "magnitude"
    """what makes a weight worth keeping; `spdtool plugins` lists them"""
    pattern: str = "unstructured"
    """which weights may be pruned together; `spdtool plugins` lists them"""
    scope: Literal["matrix", "type", "global"] = "matrix"
    """the target holds in every matrix, over all of one kind (every layer's query matrix), or over all together"""
    least: float = Field(0.01, ge=0, lt=1)
    """share of each matrix that stays alive when the scope is not `matrix`, whatever the scores say"""
    schedule: Literal["cubic", "linear"] = "cubic"
    """path of the sparsity from event to event"""
    events: int = Field(12, ge=1)
    """number of prune events, exactly"""
    first: float | None = Field(None, ge=0, lt=1)
    """sparsity of the first event, before the first step, but at most 0.8 of the target; none: start gently"""
    ramp: float = Field(0.7, gt=0, le=1)
    """fraction of the stage over which the events are spread; the rest is recovery"""
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
    block: int = Field(16, ge=1)
    """weights per block of a blockwise second-order criterion"""
    dampening: float = Field(0.01, gt=0)
    """added to the diagonal of second-order statistics, as a fraction of its mean"""
    penalty: float = Field(1.0, ge=0)
    """weight of the sigmoid penalty under which movement-soft learns its scores"""
    update: bool = True
    """let a criterion that can do so mend the surviving weights at each event"""
    leave: tuple[float, ...] = ()
    """sparsities on the way at which an evaluated student is left in the stage's folder"""
    steps: int = Field(4000, ge=1)
    """optimiser steps that are aimed at when `epochs` is not given"""
    max_epochs: float = Field(20, gt=0)
    """most epochs, however small the data set"""


class Distill(Distilled):
    """Phase 2: progressive grafting, the replacing rate rises to 1; the learning rate goes on where phase 1 left it."""

    warmup: float = Field(0.0, ge=0, lt=1)
    """fraction of the stage over which the learning rate rises from 0"""
    initial_learning_rate: float = Field(0.5, gt=0, le=1)
    """learning rate at the start of the stage, after the warm-up, as a fraction of the peak"""
    final_learning_rate: float = Field(0.25, ge=0, le=1)
    """learning rate at the end of the stage, as a fraction of the peak"""


class Finetune(Distilled):
    """Phase 3: the student alone, still distilled; the learning rate goes on where phase 2 left it."""

    warmup: float = Field(0.0, ge=0, lt=1)
    """fraction of the stage over which the learning rate rises from 0"""
    initial_learning_rate: float = Field(0.25, gt=0, le=1)
    """learning rate at the start of the stage, after the warm-up, as a fraction of the peak"""


Storage = Literal["fp32", "fp16", "int8"]
BUDGETS = {"fp32": 0.001, "fp16": 0.002, "int8": 0.005}  # of the dev metric, by the coarsest storage that is used


class Export(Section):
    """Teacher and student as files for a runtime, each checked against its checkpoint."""

    targets: tuple[str, ...] = ("onnx",)
    """export targets; `spdtool plugins` lists them"""
    optional: tuple[str, ...] = ("sparse-cpu", "onnx-ort", "onnx-fp16", "onnx-int8")
    """further targets, exported where their plugin is installed"""
    values: Storage = "fp16"
    """how sparse-cpu stores the pruned matrices"""
    embeddings: Storage = "fp16"
    """how sparse-cpu stores the embeddings"""
    opset: int = Field(18, ge=18)
    """ONNX operator set; from 23 on, attention is one operator of it, which not every runtime has"""
    sparse_initializers: bool = False
    """store matrices with over two thirds of zeros as sparse constants: smaller, no faster; OpenVINO refuses them"""
    reduce_range: bool | None = None
    """int8 weights with 7 bits, for CPUs whose products saturate; none: where this CPU has no VNNI"""
    calibration: int = Field(128, ge=1)
    """training rows on which onnx-int8-static sees the ranges of activations"""
    tries: int = Field(24, ge=4)
    """most trial exports that look for the layers to keep in float32 where int8 breaks the budget"""
    tolerance: float = Field(1e-4, gt=0)
    """largest difference of a logit between the checkpoint and the exported file"""
    rounded_tolerance: float = Field(0.25, gt=0)
    """the same for fp16 or int8 arithmetic: mean square over the logits' own, as a root; the budget decides below it"""
    budget: float | None = Field(None, ge=0)
    """largest change of the dev metric, if more than one prediction makes it; none: 0.001; fp16 0.002, int8 0.005"""
    sentences: int = Field(64, ge=1)
    """real dev sentences on which the logits are compared"""

    def allowed_change(self, *, rounds: bool, storage: tuple[str, ...] = ()) -> float:
        """The largest change of the dev metric that passes.

        Args:
            rounds: whether the target stores the weights rounded, rather than exactly.
            storage: how it does so; empty: as `values` and `embeddings` say.
        """
        if self.budget is not None:
            return self.budget
        return max(BUDGETS[kind] for kind in storage or (self.values, self.embeddings)) if rounds else BUDGETS["fp32"]


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
    """time for all rounds; fewer are made where they would take longer, but at least six with each number of threads"""
    unfused: bool = True
    """also time the dense teacher without onnxruntime's fused operators; the faster of the two is the 1x"""
    int8: bool = True
    """also time the dense teacher in onnxruntime's dynamic int8, unless onnx-int8 was exported"""
    variants: bool = True
    """also time the further forms that were exported of both (fused, fp16, int8), student and teacher side by side"""
    torch: bool = True
    """also time the dense teacher in PyTorch, eager"""
    compiled: bool = True
    """and in torch.compile, where there is a compiler; only with `bench.torch`"""
    ledger: bool = True
    """measure the machine's peak and bandwidth, and each pruned matrix alone against them"""


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
    """whether its labels are numbers to predict rather than classes; none: if all are numbers and not all are whole"""
    model: str = "google-bert/bert-base-uncased"
    """encoder to fine-tune: a folder or a hub name"""
    student: str | None = None
    """what the student starts from: a folder, a hub name, or `pretrained` for `model`; none: a copy of the teacher"""
    given_teacher: str | None = None
    """a fine-tuned model that is used as it is"""
    sparsity: float = Field(0.9, ge=0, lt=1)
    """share of the encoder's weights that are zero in the end"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of everything that is random"""
    max_length: int = Field(128, ge=4)
    """longest input in tokens; longer ones are cut"""
    max_rows: int | None = Field(None, ge=2)
    """use only that many rows of each split, for trials; none: all"""
    bucketing: bool = True
    """batches of rows of like length, padded to their own longest; off: every batch padded to `max_length`"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """autocast of the training stages"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; `cuda` refuses to fall back"""
    shard: bool = False
    """each of several processes keeps a part of student, teacher and AdamW's state (FSDP): for very large encoders"""
    gradient_checkpointing: bool = False
    """recompute layers in the backward pass to save memory"""
    compile: bool = False
    """torch.compile each layer"""
    sparse_products: bool = True
    """let plugins compute the student's linear layers without their zeros, where that is faster"""
    smoke: bool = False
    """a few steps on a random two-layer model: proves that the pipeline runs, and nothing else"""
    save_minutes: float = Field(10.0, ge=0)
    """minutes between resumable states inside an epoch; 0: after every step"""
    restarts: int = Field(0, ge=0)
    """how often `--processes` starts its processes again, from the last snapshot, when one of them is lost"""
    teacher_states_gb: float = Field(4.0, ge=0)
    """disk for the teacher's hidden states of all rows, which saves its forward passes on a CPU; 0: none"""

    teacher: Teacher = Teacher()
    prune: Prune = Prune()
    distill: Distill = Distill()
    finetune: Finetune = Finetune()
    export: Export = Export()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Recipe:
        """Refuse, before anything runs, what sharded weights cannot do."""
        if self.shard:
            phases = {name: getattr(self, name) for name in PHASES}
            wrong = {"precision=fp16": self.precision == "fp16", "compile=true": self.compile}
            wrong |= {f"{name}.grafting.kind=blend": each.grafting.kind == "blend" for name, each in phases.items()}
            wrong |= {f"{name}.clip_over=all": each.clip_over == "all" for name, each in phases.items()}
            wrong["prune.saliency=logits"] = self.prune.saliency == "logits"
            for setting, is_so in wrong.items():
                if is_so:
                    raise ValueError(f"sharded weights do not go with {setting}")
        return self

    def section(self, stage: str) -> Section:
        """The section of `stage`."""
        section = getattr(self, stage)
        assert isinstance(section, Section)
        return section

    def shared(self) -> dict[str, Any]:
        """The fields outside the sections that decide the result on one machine."""
        return self.model_dump(mode="json", exclude={*STAGES, *FREE})

    def titled(self, text: str) -> str:
        """`text` as a title, with the mark that a smoke run carries wherever its numbers are shown."""
        return f"SMOKE RUN, NO RESULT: {text}" if self.smoke else text

    def differences(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """`(dotted name, mine, other's)` of every field that differs."""
        mine, others = dict(flat(self.model_dump(mode="json"))), dict(flat(other.model_dump(mode="json")))
        return [(key, mine[key], others.get(key)) for key in mine if mine[key] != others.get(key)]


def first_use(field: str) -> str:
    """The first stage that a field, by its dotted name, has a part in."""
    section = field.split(".")[0]
    if section in STAGES:
        return section
    return PHASES[0] if field in OF_STUDENT else STAGES[0]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted name, value)` of every leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
