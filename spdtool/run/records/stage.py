"""Contents of stage.json and run.json."""

from __future__ import annotations

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from spdtool.run.records.base import DataRecord, FileRecord, MachineRecord, Record
from spdtool.run.records.bench import BenchResult
from spdtool.run.records.export import ExportResult
from spdtool.run.records.training import TrainingResult

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
