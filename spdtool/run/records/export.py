"""What the export stage records: the files of every target, and the figures of their gates."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from spdtool.run.records.base import FileRecord, Record, Role, Scores
from spdtool.run.records.quality import Quality


class ExportedModel(Record):
    """Files that a target wrote for one checkpoint, and their figures from the gates.

    A target may add figures of its own: they are kept beside these.

    Attributes:
        files: relative to the exported folder, the model first. bytes: their sum.
        zeros, size, sparsity: of the prunable matrices.
        positions: longest input in tokens. providers: those that the files were checked on.
        largest_difference: of the logits, from the checkpoint with the same (rounded) weights;
            where: see `..._at`.
        largest_change, deviation: of the logits, from the checkpoint itself; of targets that round.
        values, embeddings: storage of rounded weights. rounded_to_zero: weights that became zeros.
        dev, checkpoint_dev: scores of files and checkpoint. flipped, worse: predictions among
            `rows`, of classes.
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


class FinishedTarget(Record):
    """What an export in progress records of a target that is exported and checked: see `export.finished`.

    Attributes:
        fingerprint: of all that decides the files and their figures.
        outcome: what was exported, or the reason why a gate refused it.
        files: every file of the target, its path relative to the stage's folder; none where it was refused.
    """

    fingerprint: str
    outcome: TargetExport | str
    files: list[FileRecord]


class ExportResult(Record):
    """Result of the export stage.

    Attributes:
        first: name of the first target, the plain one: its folders have no prefix.
        targets: by name, every target that passed its gates.
        refused: target to the reason why its files were not shipped.
        quality: what was measured of both checkpoints, once.
    """

    first: str
    targets: dict[str, TargetExport] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict)
    quality: Quality = Field(default_factory=Quality)

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
