"""Typed contents of the JSON files of a run: stage.json, run.json, the plan, manifest.json, bench.json, sweep.json.

Whoever writes such a file fills a model of this module; whoever reads one goes by attribute. A field that this version
does not know is ignored, one of a wrong type makes the file unreadable.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    computed_field,
    field_validator,
    model_validator,
)

Scores = dict[str, float]
"""Metric to value in [-1, 1]; the headline of the task stands under `score`."""
Cell = str | int | float | None
"""One cell of a table, before it is formatted."""
Role = Literal["teacher", "student"]


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(validate_assignment=True)  # results are filled in while a stage runs


class ZeroCount(NamedTuple):  # a tuple: stage.json has one for each of hundreds of matrices
    """Zeros of one weight matrix, and how many weights it has in all."""

    zeros: int
    size: int


class FileRecord(Record):
    """One file of a finished stage, its path relative to the stage's folder."""

    path: str
    size: int
    sha256: str


class DataRecord(Record):
    """The rows that a stage worked on: number of rows by split, and one digest of texts, labels and order."""

    rows: dict[str, int]
    digest: str


class MachineRecord(Record):
    """Where a stage ran.

    Attributes:
        cpus: that this process may use.
        versions: of the installed packages that influence results.
        training_threads, arithmetic: of a training stage: number of threads, and hash of the last bits of a fixed
            calculation, see `models.arithmetic`.
    """

    python: str
    system: str
    cpus: int | None
    versions: dict[str, str]
    training_threads: int | None = None
    arithmetic: str | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Describe the machine as names and texts."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [("python", self.python), ("system", self.system), ("cpus", str(self.cpus)), ("versions", versions)]


class Evaluation(Record):
    """Scores after an optimiser step; `train` are those on a sample of training rows, where it is scored."""

    step: int
    metrics: Scores
    train: Scores | None = None

    @property
    def score(self) -> float:
        """Headline dev score."""
        return self.metrics["score"]


class IntermediateStudent(Record):
    """A student saved at a sparsity below the target; `folder` is relative to the prune stage."""

    sparsity: float
    step: int
    folder: str
    dev: Scores
    train: Scores | None = None


class FitResult(Record):
    """What the training loop reports.

    Attributes:
        best: evaluation of the weights that were handed over.
        students: see `prune.save_at`.
    """

    steps: int
    epochs: float
    best: Evaluation | None
    evaluations: list[Evaluation]
    students: list[IntermediateStudent]
    examples_per_second: float


class ClassScores(Record):
    """Scores of one class on the dev set; `rows` of it are gold."""

    precision: float
    recall: float
    f1: float
    rows: int


class TrainingResult(Record):
    """Result of teacher, prune, distill or finetune.

    Attributes:
        classes: dev scores of each class, by its name; empty where there are none.
        dev: scores of the saved weights. train: the same on a sample of training rows, where it is scored.
        given: source of a teacher that was not trained here.
        fit: None where nothing was trained.
        sparsity: share of zeros over all prunable matrices; zeros: by name of the weight. Of students only.
    """

    dev: Scores
    train: Scores | None = None
    classes: dict[str, ClassScores] = Field(default_factory=dict)
    given: str | None = None
    fit: FitResult | None = None
    sparsity: float | None = None
    zeros: dict[str, ZeroCount] = Field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Headline dev score."""
        return self.dev.get("score")

    @property
    def train_score(self) -> float | None:
        """Headline score on training rows, where it was measured."""
        return None if self.train is None else self.train.get("score")

    @property
    def steps(self) -> int | None:
        """Optimiser steps, where something was trained."""
        return None if self.fit is None else self.fit.steps

    @property
    def students(self) -> list[IntermediateStudent]:
        """Students that were saved on the way to the target sparsity."""
        return [] if self.fit is None else self.fit.students


class ExportedModel(Record):
    """Files that a target wrote for one checkpoint, and their figures from the gates.

    A target may add figures of its own: they are kept beside these.

    Attributes:
        files: relative to the exported folder, the model first. bytes: their sum.
        zeros, size, sparsity: of the prunable matrices.
        positions: longest input in tokens. providers: those that the files were checked on.
        largest_difference: of the logits, from the checkpoint with the same (rounded) weights; where: see `..._at`.
        largest_change, deviation: of the logits, from the checkpoint itself; of targets that round.
        values, embeddings: storage of rounded weights. rounded_to_zero: weights that became zeros.
        dev, checkpoint_dev: scores of files and checkpoint. flipped, worse: predictions among `rows`, of classes.
        mean_change, rank_correlation: of the numbers that a regression predicts, instead.
        damage, tries: of the search for layers to leave in float32, where one was needed.
        nodes, opset, sparse, fused, kept_fp32, reduce_range: facts of the graph.
    """

    model_config = ConfigDict(extra="allow")  # figures of a plugin's target

    files: list[str]
    bytes: int
    zeros: int
    size: int
    sparsity: float
    positions: int
    providers: list[str] = Field(default_factory=list)
    largest_difference: float = 0.0
    largest_difference_at: str = ""
    largest_change: float | None = None
    deviation: float | None = None
    values: str | None = None
    embeddings: str | None = None
    rounded_to_zero: int | None = None
    dev: Scores | None = None
    checkpoint_dev: Scores | None = None
    flipped: int | None = None
    worse: int | None = None
    mean_change: float | None = None
    rank_correlation: float | None = None
    rows: int | None = None
    damage: dict[str, float] | None = None
    tries: int | None = None
    nodes: int | None = None
    opset: int | None = None
    sparse: int | None = None
    fused: dict[str, int] | None = None
    kept_fp32: list[str] | None = None
    reduce_range: bool | None = None

    @property
    def rounds(self) -> bool:
        """Whether the files hold other weights than the checkpoint."""
        return self.values is not None

    @property
    def score(self) -> float | None:
        """Headline dev score, where a dev set was given."""
        return None if self.dev is None else self.dev["score"]


def describe_prediction_change(
    flipped: int | None, rows: int | None, mean_change: float | None, rank_correlation: float | None
) -> str:
    """Say in a few words how predictions differ from the checkpoint's; empty: nothing was measured."""
    if rank_correlation is not None:
        return f"mean change {mean_change:.1e}, rank correlation {rank_correlation:.6f}"
    if flipped is not None:
        return f"{flipped} of {rows} predictions flipped"
    return ""


class TargetExport(Record):
    """What one target exported; a target may leave the teacher out."""

    student: ExportedModel
    teacher: ExportedModel | None = None

    def models(self) -> dict[Role, ExportedModel]:
        """The exported models by role, the teacher first."""
        models: dict[Role, ExportedModel] = {}
        if self.teacher is not None:
            models["teacher"] = self.teacher
        return models | {"student": self.student}


class ExportResult(Record):
    """Result of the export stage.

    Attributes:
        first: name of the first target, the plain one: its folders have no prefix.
        targets: by name, every target that passed its gates.
        refused: target to the reason why its files were not shipped.
    """

    first: str
    targets: dict[str, TargetExport] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict)

    @property
    def student(self) -> ExportedModel:
        """The student as the first target exported it."""
        return self.targets[self.first].student

    @property
    def teacher(self) -> ExportedModel:
        """The teacher as the first target exported it."""
        teacher = self.targets[self.first].teacher
        assert teacher is not None, "the first target exports both: export.target checks it"
        return teacher

    def further(self) -> dict[str, TargetExport]:
        """All targets but the first one."""
        return {name: exported for name, exported in self.targets.items() if name != self.first}


class Ratio(Record):
    """How many times faster: the median over paired rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"


class Table(Record):
    """A table of the report or the terminal."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


class LatencyRecord(Record):
    """One engine at one shape with one number of threads: percentiles in milliseconds, throughput, ratio.

    Attributes:
        shape: as text. real: lengths without padding, empty where there is none.
        min: fastest single batch. ratio: against the dense teacher, in the form `dense`.
    """

    engine: str
    provider: str
    threads: int
    shape: str
    batch: int
    length: int
    real: list[int]
    p50: float
    p90: float
    p95: float
    p99: float
    rows_per_second: float
    min: float
    rounds: int
    ratio: Ratio
    dense: str


class ProductTimes(Record):
    """One matrix times a number of tokens: microseconds and operations a second, dense and sparse, and the bound.

    `ratio`: how many times faster the sparse product is; None without a sparse form. `bound_by`: flops or bandwidth.
    """

    dense_us: float
    dense_flops: float
    sparse_us: float | None
    sparse_flops: float | None
    ratio: float | None
    bound_us: float
    bound_by: str


class LedgerEntry(Record):
    """One pruned matrix in the bench's ledger; `products` by number of tokens."""

    name: str
    layer: str
    rows: int
    columns: int
    nonzeros: int
    density: float
    dense_bytes: int
    sparse_bytes: int | None
    products: dict[int, ProductTimes]


class MachinePeak(Record):
    """Highest measured operations a second and bytes a second."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.1f} GFLOP/s, {self.bandwidth / 1e9:.1f} GB/s"


class BenchEnvironment(MachineRecord):
    """Where a bench ran; `peaks` by number of threads, where the machine was measured."""

    threads: list[int]
    provider: str
    peaks: dict[int, MachinePeak] = Field(default_factory=dict)  # empty on a GPU, and without a ledger

    def lines(self) -> list[tuple[str, str]]:
        """Describe the environment as names and texts."""
        lines = super().lines()
        lines += [("threads", " and ".join(map(str, self.threads))), ("provider", self.provider)]
        lines += [(f"peak with {count} threads", str(peak)) for count, peak in self.peaks.items()]
        return lines


class ShapeRounds(Record):
    """Milliseconds of every counted round at one shape; `least`: of the fastest single batch."""

    batch: int
    length: int
    real: list[int] | tuple[int, ...]
    ms: list[float]
    least: float


class EngineRecord(Record):
    """One timed engine in bench.json; see `bench.latency.Engine` and `Timing`."""

    name: str
    kind: str
    threads: int
    vocabulary: int
    pad: int
    fused: bool
    compiled: bool
    baseline: bool
    optional: bool
    provider: str
    nodes: dict[str, dict[str, int]] | None
    resident_bytes: int
    peak_bytes: int
    rounds: list[ShapeRounds]


class BenchFile(Record):
    """Contents of bench.json: every round of every engine, the ledger and the machine."""

    environment: BenchEnvironment
    engines: list[EngineRecord]
    ledger: list[LedgerEntry]


class SpeedFactors(Record):
    """Where the speed of a sparse form comes from; the product of the factors is the whole ratio.

    Attributes:
        fusion: what the form's operators give to dense float32 weights.
        padding: what leaving padding out adds; 1 over a grid without padding.
        rounding: what the stored form of the weights adds.
        zeros: what the zeros add. zeros_ratio: the same as a median of paired rounds, with its interval.
    """

    fusion: float
    padding: float
    rounding: float
    zeros: float
    zeros_ratio: Ratio

    @property
    def whole(self) -> float:
        """The product of the factors."""
        return self.fusion * self.padding * self.rounding * self.zeros


class BenchResult(Record):
    """Result of the bench stage.

    Attributes:
        columns, rows: the table that a run ends with. tables: further ones.
        verdict: what was measured, in sentences.
        best: engine of the best form of the student. size: how many times smaller than the teacher its files are.
        speeds: number of threads to how many times faster than the teacher it is.
        caveats: number of threads to why that ratio says little.
        factors: number of threads to where that speed comes from; empty for a plain file, which has only zeros.
        latency: every engine at every shape. ledger: every pruned matrix alone.
    """

    columns: list[str]
    rows: list[list[Cell]]
    tables: list[Table]
    verdict: list[str]
    speeds: dict[int, Ratio]
    caveats: dict[int, str]
    factors: dict[int, SpeedFactors] = Field(default_factory=dict)
    size: float
    best: str
    provider: str
    latency: list[LatencyRecord]
    ledger: list[LedgerEntry]
    environment: BenchEnvironment

    @property
    def threads(self) -> int:
        """Fewest threads that were timed: the headline is theirs."""
        return min(self.speeds)

    @property
    def speed(self) -> Ratio:
        """How many times faster the best form of the student is, with the fewest threads."""
        return self.speeds[self.threads]


Result = TrainingResult | ExportResult | BenchResult


class StageRecord(Record):
    """Contents of stage.json.

    Attributes:
        spdtool: version that wrote it. finished: local time, ISO 8601. seconds: the last session took.
        inputs: stage to the sha256 of its stage.json when it was read.
        data: None where the stage read no rows.
        recipe: shared fields, and the section of the stage.
        result: None where there is nothing to report.
        files: every file of the folder but stage.json.
    """

    stage: str
    smoke: bool = False
    spdtool: str = ""
    finished: str = ""
    seconds: float = 0.0
    inputs: dict[str, str]
    data: DataRecord | None = None
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    machine: MachineRecord | None = None
    files: list[FileRecord]
    result: Result | None = None

    @field_validator("result", mode="before")
    @classmethod
    def _by_stage(cls, value: object, info: ValidationInfo) -> object:
        """Read a result as the type that its stage writes: by their fields alone unions are guessed."""
        if not isinstance(value, dict):
            return value
        stage = info.data.get("stage")  # declared, and so validated, before the result
        if stage == "export":
            return ExportResult.model_validate(value)
        if stage == "bench":
            return BenchResult.model_validate(value)
        return TrainingResult.model_validate(value)


class RunRecord(Record):
    """Contents of run.json.

    Attributes:
        recipe: every field.
        threads: number of threads with which training began; None until then.
    """

    spdtool: str
    smoke: bool
    recipe: dict[str, JsonValue]
    threads: int | None = None


class StageEstimate(Record):
    """Estimated cost of a stage; see `run.forecast.StageCost`."""

    steps: int = 0
    step_seconds: float = 0.0
    events: list[tuple[int, float]] = Field(default_factory=list)
    other_seconds: float = 0.0
    seconds: float = 0.0


class StagePlan(Record):
    """What one stage will do.

    Attributes:
        why: reason for so many epochs.
        epochs, steps, learning_rate: of training stages; the rate is the peak.
        prune_events: number of them. targets: of the export.
        estimate: of the time; None for a stage that is done.
    """

    stage: str
    done: bool
    why: str = ""
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    prune_events: int | None = None
    targets: list[str] = Field(default_factory=list)
    estimate: StageEstimate | None = None


class WeightCounts(Record):
    """Weights of the student: all, those that can be pruned, those that become zero, and matrices without any left."""

    all: int
    prunable: int
    zeros: int
    emptied: int


class ResourceEstimate(Record):
    """What a run will take, before it is trained.

    Attributes:
        seconds: least and most, of the stages that are not done.
        device: where that was tried.
        disk_bytes: of the run folder in the end. peak_bytes: of its largest state on the way, with snapshots.
        cache_bytes: of the teacher's outputs in the user's cache folder.
        memory_bytes: peak of the training stages, right to about a factor of 1.5.
        files: target to bytes of the student in that form.
    """

    seconds: tuple[float, float]
    device: str
    disk_bytes: int
    peak_bytes: int
    cache_bytes: int
    memory_bytes: int
    files: dict[str, int]


class Plan(Record):
    """What a recipe will do, before it does it.

    Attributes:
        rows: by split. reading: lines on how they were read. notes: what deserves attention.
        classes: split to rows by class. baseline: dev score of the commonest label (regression: of the mean).
        score: what the dev score is. model: of the student.
        changes: fields whose value is not that of the named recipe, as `(name, value, value there)`.
        recipe: every field, where the whole plan was asked for.
    """

    run: str
    task: str
    rows: dict[str, int]
    reading: list[str]
    classes: JsonValue
    baseline: float
    score: str
    model: str
    notes: list[str]
    stages: list[StagePlan]
    parameters: WeightCounts
    estimate: ResourceEstimate
    changes: list[tuple[str, JsonValue, JsonValue]]
    recipe: dict[str, JsonValue] | None = None


class FileDigest(Record):
    """Size and sha256 of a file of a bundle."""

    bytes: int
    sha256: str


class LibraryRecord(Record):
    """Library of custom operators that a model needs, and the distribution that builds it."""

    model_config = ConfigDict(extra="allow")  # a plugin may say more of its library

    file: str | None = None
    distribution: str | None = None
    version: str | None = None
    platform: str | None = None


class Variant(Record):
    """One form of the model in a bundle, with what it was measured to cost: see `ExportedModel`."""

    target: str
    file: str
    files: list[str]
    hardware: str = "any"
    library: LibraryRecord | None = None
    bytes: int = 0
    sparsity: float = 0.0
    providers: list[str] = Field(default_factory=list)
    dev: Scores | None = None
    checkpoint_dev: Scores | None = None
    flipped: int | None = None
    mean_change: float | None = None
    rank_correlation: float | None = None
    rows: int | None = None
    largest_difference: float | None = None
    largest_change: float | None = None
    values: str | None = None
    embeddings: str | None = None
    kept_fp32: list[str] | None = None
    tolerance: float = 0.0


class FolderManifest(Record):
    """Contents of manifest.json in a folder of one model (format 1).

    Attributes:
        target: name of the target; empty: the folder does not say.
        model: ONNX file, relative to the folder.
        library: of custom operators; None where the model needs none.
        text: names of the one or two text columns; None: the model was exported without a task.
        values, embeddings: storage of the weights.
        files: by path, all but the model card and the manifest itself.
    """

    format: Literal[1] = 1
    target: str = ""
    model: str = "onnx/model.onnx"
    library: LibraryRecord | None = None
    text: list[str] | None = None
    values: str | None = None
    embeddings: str | None = None
    files: dict[str, FileDigest] = Field(default_factory=dict)

    @field_validator("text")
    @classmethod
    def _name_one_or_two_columns(cls, text: list[str] | None) -> list[str] | None:
        if text is not None and len(text) not in (1, 2):
            raise ValueError("a model has one or two text columns")
        return text


class BundleManifest(Record):
    """Contents of a bundle's manifest.json (format 2).

    Attributes:
        text: names of the one or two text columns; None: an older bundle does not say.
        model: file of the portable variant. prefer: hardware to names of variants, the best first.
        files: by path, all of them.
    """

    format: Literal[2] = 2
    spdtool: str = ""
    task: str = ""
    text: list[str] | None = None
    sparsity: float = 0.0
    smoke: bool = False
    model: str
    prefer: dict[str, list[str]]
    variants: dict[str, Variant]
    files: dict[str, FileDigest]

    @field_validator("text")
    @classmethod
    def _name_one_or_two_columns(cls, text: list[str] | None) -> list[str] | None:
        if text is None or len(text) not in (1, 2):
            raise ValueError("a model has one or two text columns")
        return text

    @model_validator(mode="after")
    def _refer_to_listed_files(self) -> Self:
        """Refuse a manifest whose variants and preferences name what is not there: it may come from a stranger."""
        for variant in self.variants.values():
            if not {variant.file, *variant.files} <= self.files.keys():
                raise ValueError(f"the variant {variant.target!r} has a file that is not listed")
        if self.model not in [variant.file for variant in self.variants.values()]:
            raise ValueError("the portable model is of no variant")
        for names in self.prefer.values():
            if not names or not set(names) <= self.variants.keys():
                raise ValueError("a preference names no variant, or an unknown one")
        return self


class Padding(Record):
    """How a row is padded: on which side, and with which id in each input."""

    side: Literal["left", "right"]
    input_ids: int | None
    token_type_ids: int


class GoldenRow(Record):
    """One dev sentence with its token ids, and the checkpoint's logits in float32."""

    text: str
    pair: str | None
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    logits: list[float]


class GoldenExamples(Record):
    """Contents of golden.json: the checkpoint's logits, by which a bundle is tested anywhere.

    Attributes:
        max_length: in tokens; longer texts are truncated.
        labels: by class index.
        rows: computed one by one, without padding.
    """

    format: Literal[1]
    max_length: int
    padding: Padding
    labels: list[str]
    rows: list[GoldenRow]


class StudentRow(Record):
    """A student in a comparison of runs: its sparsity, scores and cost. What was not measured is None.

    Attributes:
        run: folder of the run, or of an intermediate student.
        target_sparsity: of the run, for an intermediate student; None for a final one.
        teacher, student: dev scores. teacher_train, student_train: on training rows.
        nonzeros, weights: over all prunable matrices.
        seconds: of the student's phases.
        bytes, speed: of its best exported form. teacher_bytes: of the dense teacher. Only where there is a bench.
        error: why the run failed or was stopped.
        students: intermediate students of the run.
    """

    task: str
    recipe: str
    sparsity: float
    seed: int
    run: str
    status: Literal["done", "unfinished", "failed", "stopped"] = "unfinished"  # stopped: by median stopping
    error: str | None = None
    smoke: bool = False
    teacher: float | None = None
    student: float | None = None
    teacher_train: float | None = None
    student_train: float | None = None
    nonzeros: int | None = None
    weights: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    teacher_bytes: int | None = None
    speed: float | None = None
    target_sparsity: float | None = None
    students: list[StudentRow] = Field(default_factory=list)

    @property
    def label(self) -> str:
        """The recipe as tables name it."""
        if self.target_sparsity is None:
            return self.recipe
        return f"{self.recipe}, on the way to {self.target_sparsity:g}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def retention(self) -> float | None:
        """Dev score of the student over that of the teacher; None where the teacher has learnt nothing."""
        if self.student is None or self.teacher is None or self.teacher <= 0:  # correlations may be negative
            return None
        return self.student / self.teacher

    @computed_field  # type: ignore[prop-decorator]
    @property
    def teacher_gap(self) -> float | None:
        """Train score minus dev score of the teacher: how far it overfits."""
        return difference(self.teacher_train, self.teacher)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def student_gap(self) -> float | None:
        """Train score minus dev score of the student."""
        return difference(self.student_train, self.student)


class SweepRecord(Record):
    """Contents of sweep.json: one row for each trial."""

    spdtool: str
    rows: list[StudentRow]


def difference(minuend: float | None, subtrahend: float | None) -> float | None:
    """`minuend - subtrahend`, or None unless both are known."""
    if minuend is None or subtrahend is None:
        return None
    return minuend - subtrahend
