"""What a run will do and cost, before it does it."""

from __future__ import annotations

from pydantic import Field, JsonValue

from spdtool.run.records.base import Record


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
    """Weights of the student: all, those that can be pruned, those that become zero, and matrices without any left.

    Attributes:
        shape_sparsity: share of the prunable weights that a shape removes; None without a shape.
    """

    all: int
    prunable: int
    zeros: int
    emptied: int
    shape_sparsity: float | None = None


class ResourceEstimate(Record):
    """What a run will take, before it is trained.

    Attributes:
        seconds: least and most, of the stages that are not done.
        device: where that was tried.
        disk_bytes: of the run folder in the end. peak_bytes: of its largest state on the way, with snapshots.
        cache_bytes: of the teacher's outputs in the user's cache folder.
        memory_bytes: peak of the training stages in each process, right to about a factor of 1.5.
        processes: in which the training stages run.
        files: target to bytes of the student in that form.
    """

    seconds: tuple[float, float]
    device: str
    disk_bytes: int
    peak_bytes: int
    cache_bytes: int
    memory_bytes: int
    processes: int = 1
    files: dict[str, int]


class Plan(Record):
    """What a recipe will do, before it does it.

    Attributes:
        rows: by split. reading: lines on how they were read. notes: what deserves attention.
        classes: split to rows by class. baseline: dev score of the commonest label (regression: of the mean).
        score: what the dev score is. model: of the student.
        changes: fields whose value is not that of the named recipe, as `(name, value, value there)`.
        goal: what is asked of the student, and what shape is expected.
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
    goal: list[str] = Field(default_factory=list)
    recipe: dict[str, JsonValue] | None = None
