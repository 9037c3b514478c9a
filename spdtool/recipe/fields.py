"""The recipe: every number and choice that changes a result, one section per stage, frozen.

A recipe is read from TOML (`spdtool/recipe/*.toml` or your own file), overridden by the flags of the command
line and by `--set section.field=value`, saved as `run.json`, and never changed afterwards. The docstring under
each field is its help text: `spdtool recipes default` prints them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from spdtool.recipe import PHASES, STAGES
from spdtool.recipe.delivery import Bench, Export, Goal
from spdtool.recipe.section import Section
from spdtool.recipe.training import Distill, Distilled, Finetune, Prune, Teacher

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
FieldChange = tuple[str, JsonValue, JsonValue]


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
    ranking: bool | None = None
    """whether rows are queries with passages to rank; none: if their columns are called query, passage and relevant"""
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
        if self.prune.zeros and not self.removes_structures:
            raise ValueError(
                "prune.zeros lie inside a smaller student: set prune.heads or the like, or `sparsity` instead"
            )
        no_zeros = self.goal.is_set and not self.goal.has_full_width and not self.prune.zeros
        if no_zeros and self.prune.pattern != "unstructured":
            raise ValueError(
                f"prune.pattern = {self.prune.pattern!r} is of zeros: leave it out, add prune.zeros, or ask for "
                "goal.kind=sparse"
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
    def removes_structures(self) -> bool:
        """Whether the student loses whole heads and neurons, which exported graphs leave out."""
        return self.prune.is_structured or (self.goal.is_set and not self.goal.has_full_width)

    @property
    def size_label(self) -> str:
        """How small the student is, for titles: the sparsity, unless it follows from a shape."""
        if self.prune.is_structured:
            inside = f", {self.prune.zeros:.0%} zeros inside" if self.prune.zeros else ""
            return f"fewer heads and neurons{inside}"
        return f"{self.sparsity:.0%} zeros"

    @property
    def pool(self) -> int | None:
        """Batches of a pool of rows that are sorted by length; None without bucketing."""
        return self.pool_batches if self.bucketing else None

    @property
    def copies_teacher(self) -> bool:
        """Whether the student starts as a copy of the whole teacher."""
        return self.student is None and not self.prune.layers

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
