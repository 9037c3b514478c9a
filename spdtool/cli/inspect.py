"""Contents of a run folder, as `spdtool inspect` shows them: stages, lineage, and the sparsity of every layer."""

from __future__ import annotations

from spdtool.recipe import STAGES
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import RECORD, Run
from spdtool.run.records import ExportResult, FinalScores, Record, StageRecord, TrainingResult


class InspectedStage(Record):
    """One stage; `state` is missing, in progress, or done with the first digits of its hash."""

    stage: str
    state: str
    made_from: str | None = None
    seconds: float | None = None
    steps: int | None = None
    dev_score: float | None = None
    sparsity: float | None = None


class InspectedMatrix(Record):
    """Zeros of one weight matrix."""

    weight: str
    zeros: int
    size: int
    sparsity: float


class Inspection(Record):
    """Contents of a run folder.

    Attributes:
        sparsest, layers: the last stage that counted zeros, and the zeros.
        test: of teacher and student; None before the export, or without test rows.
    """

    run: str
    smoke: bool
    recipe: str
    stages: list[InspectedStage]
    sparsest: str | None
    layers: list[InspectedMatrix]
    test: FinalScores | None = None


def inspect_run(run: Run) -> Inspection:
    """Read all stage records, and check them against the files.

    Raises:
        Corrupt: a file of a finished stage was altered or cut short.
    """
    inspection = Inspection(
        run=str(run.path), smoke=run.recipe.smoke, recipe=run.recipe.name, stages=[], sparsest=None, layers=[]
    )
    for stage in STAGES:
        if not run.done(stage):
            state = "in progress" if run.begun(stage) else "missing"
            inspection.stages.append(InspectedStage(stage=stage, state=state))
            continue
        run.use_input(stage)  # compares every file with its sha256
        record = run.record(stage)
        line = InspectedStage(
            stage=stage,
            state=f"done {sha256(run.path / stage / RECORD)[:8]}",
            made_from=_describe_inputs(record),
            seconds=record.seconds,
        )
        result = record.result
        if isinstance(result, TrainingResult):
            line.steps, line.dev_score, line.sparsity = result.steps, result.score, result.sparsity
            if result.zeros:
                inspection.sparsest = stage
                inspection.layers = _list_matrices(result)
        if isinstance(result, ExportResult):
            inspection.test = result.quality.final
        inspection.stages.append(line)
    return inspection


def _describe_inputs(record: StageRecord) -> str:
    """Name what a stage was made from: earlier stages, or else the rows, each with its hash."""
    digests = record.inputs
    if not digests and record.data is not None:
        digests = {"rows": record.data.digest}
    return ", ".join(f"{name} {digest[:8]}" for name, digest in digests.items())


def _list_matrices(result: TrainingResult) -> list[InspectedMatrix]:
    matrices = []
    for name, count in result.zeros.items():
        sparsity = count.zeros / count.size
        matrices.append(InspectedMatrix(weight=name, zeros=count.zeros, size=count.size, sparsity=sparsity))
    return matrices
