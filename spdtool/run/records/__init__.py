"""Typed contents of the JSON files of a run: stage.json, run.json, the plan, manifest.json, bench.json, sweep.json.

There is one module for each subject. Whoever writes such a file fills one of these models; whoever
reads one goes by attribute. A field that this version does not know is ignored, one of a wrong type
makes the file unreadable.
"""

from spdtool.run.records.base import (
    Cell,
    DataRecord,
    FileDigest,
    FileRecord,
    LibraryRecord,
    MachineRecord,
    Record,
    Role,
    Scores,
)
from spdtool.run.records.bench import (
    BenchEnvironment,
    BenchFile,
    BenchResult,
    EngineRecord,
    GpuRecord,
    LatencyRecord,
    LedgerEntry,
    MachinePeak,
    ProductTimes,
    Promise,
    Ratio,
    ShapeRounds,
    SpeedFactors,
    Table,
)
from spdtool.run.records.export import ExportedModel, ExportResult, TargetExport, describe_prediction_change
from spdtool.run.records.goal import LayerCosts, ShapeChoice, ShapeProfile
from spdtool.run.records.manifest import BundleManifest, FolderManifest, GoldenExamples, GoldenRow, Padding, Variant
from spdtool.run.records.plan import Plan, ResourceEstimate, StageEstimate, StagePlan, WeightCounts
from spdtool.run.records.quality import (
    Calibration,
    CalibrationPair,
    DifferingRow,
    FinalScores,
    Interval,
    PairedTest,
    Quality,
    ReliabilityBin,
)
from spdtool.run.records.stage import Result, RunRecord, StageRecord
from spdtool.run.records.sweep import StudentRow, SweepRecord, difference
from spdtool.run.records.training import (
    ClassScores,
    Evaluation,
    FitResult,
    IntermediateStudent,
    TrainingResult,
    TrimmedVocabulary,
    ZeroCount,
)

__all__ = [
    "BenchEnvironment",
    "BenchFile",
    "BenchResult",
    "BundleManifest",
    "Calibration",
    "CalibrationPair",
    "Cell",
    "ClassScores",
    "DataRecord",
    "DifferingRow",
    "EngineRecord",
    "Evaluation",
    "ExportResult",
    "ExportedModel",
    "FileDigest",
    "FileRecord",
    "FinalScores",
    "FitResult",
    "FolderManifest",
    "GoldenExamples",
    "GoldenRow",
    "GpuRecord",
    "IntermediateStudent",
    "Interval",
    "LatencyRecord",
    "LayerCosts",
    "LedgerEntry",
    "LibraryRecord",
    "MachinePeak",
    "MachineRecord",
    "Padding",
    "PairedTest",
    "Plan",
    "ProductTimes",
    "Promise",
    "Quality",
    "Ratio",
    "Record",
    "ReliabilityBin",
    "ResourceEstimate",
    "Result",
    "Role",
    "RunRecord",
    "Scores",
    "ShapeChoice",
    "ShapeProfile",
    "ShapeRounds",
    "SpeedFactors",
    "StageEstimate",
    "StagePlan",
    "StageRecord",
    "StudentRow",
    "SweepRecord",
    "Table",
    "TargetExport",
    "TrainingResult",
    "TrimmedVocabulary",
    "Variant",
    "WeightCounts",
    "ZeroCount",
    "describe_prediction_change",
    "difference",
]
