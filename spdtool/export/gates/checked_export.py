"""Export a checkpoint and let the files pass every gate; store less coarsely where the score breaks its budget."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spdtool import console
from spdtool.data.tokens import Batch, Encoded
from spdtool.errors import DeviceError, RecipeError
from spdtool.export.bundle.manifest import digest_files, write_manifest
from spdtool.export.gates.files import check_files, check_manifest
from spdtool.export.gates.folder import check_folder
from spdtool.export.gates.interface import check_interface
from spdtool.export.gates.logits import check_logits
from spdtool.export.gates.operators import check_operators
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import (
    DevComparison,
    ScoreBudgetExceeded,
    allowed_change,
    check_score,
    compare_on_dev_sets,
    metric_over_budget,
)
from spdtool.export.gates.search import SearchResult, search_float32_modules
from spdtool.export.gates.weights import check_weights
from spdtool.export.target import SMALLEST, Rounding, StorageFormats, Target
from spdtool.models.predict import torch_forward
from spdtool.run.records import ExportedModel, FolderManifest, LibraryRecord

DAMAGE_ROWS = 64  # of the dev set: enough to rank layers by the damage of their rounding, and quick
DAMAGE_BATCH = 16  # rows


def export_and_check(target: Target, reference: Reference, folder: Path, providers: list[str]) -> ExportedModel:
    """Export one checkpoint to `folder`, and return what the gates measured.

    Where rounding breaks the budget of the score, the modules that cause it stay in float32, if the
    target allows it.

    Args:
        providers: the ones that work here. Those that the target supports are checked; the last one
            computes the score.

    Raises:
        DeviceError: none of the providers runs the target's files.
        GateError: operators, weights, logits, folder or score differ from the checkpoint's.
        RecipeError: the target is calibrated on rows of a task, and there is no task.
    """
    supported = [name for name in providers if name in target.providers]
    if not supported:
        there, here = ", ".join(target.providers), ", ".join(providers)
        raise DeviceError(f"the target runs on {there}; what works here is {here}")
    *smaller, last = storage_choices(target, reference)
    for formats in smaller:
        try:
            return ExportAttempt(target, reference.with_storage(formats), folder, supported).run()
        except ScoreBudgetExceeded as error:
            console.say(f"  {error.message}: stored less coarsely")
    attempt = ExportAttempt(target, reference.with_storage(last), folder, supported)
    try:
        return attempt.run()
    except ScoreBudgetExceeded as error:
        modules = target.float32_candidates(reference.checkpoint, reference.recipe)
        if len(modules) < 2:  # all of a single one in float32 would be another target
            raise
        return _export_with_float32_modules(attempt, modules, error)


def storage_choices(target: Target, reference: Reference) -> list[StorageFormats]:
    """List the storage formats to try, the smallest first; one, where the recipe says which.

    Without a dev set nothing tells what rounding costs, and the target's default is all.
    """
    section = reference.recipe.export
    asked = StorageFormats(section.values, section.embeddings)
    if not target.packs or reference.dev.task is None or SMALLEST not in asked:
        return [asked]
    choices = []
    for smallest in target.smallest:
        matrices = smallest.matrices if asked.matrices == SMALLEST else asked.matrices
        embeddings = smallest.embeddings if asked.embeddings == SMALLEST else asked.embeddings
        choices.append(StorageFormats(matrices, embeddings))
    return list(dict.fromkeys(choices))


@dataclass(frozen=True)
class ExportAttempt:
    """The export of one checkpoint by one target; it can be repeated with other float32 modules."""

    target: Target
    reference: Reference
    folder: Path
    providers: list[str]

    def write(self, float32_modules: tuple[str, ...] = ()) -> list[Path]:
        """Write the folder anew, its manifest last, and return the files that hold the model."""
        shutil.rmtree(self.folder, ignore_errors=True)  # files of another try must not be left among them
        calibration_rows = self.reference.dev.calibration_rows
        if self.target.calibrates and calibration_rows is None:
            raise RecipeError("this target is calibrated on rows of a task, and none was given", "--task or --data")
        rounding = Rounding(float32_modules, calibration_rows)
        recipe = self.reference.recipe
        files = self.target.export_rounded(self.reference.checkpoint, self.folder, recipe, rounding)
        write_manifest(self.folder, self.describe_folder(files[0]))
        return files

    def describe_folder(self, model: Path) -> FolderManifest:
        """Describe the finished folder, for its manifest."""
        task, library = self.reference.dev.task, self.target.library_record(self.folder)
        formats = self.target.storage_formats(self.reference.recipe)
        return FolderManifest(
            target=self.target.name,
            model=model.relative_to(self.folder).as_posix(),
            library=None if library is None else LibraryRecord.model_validate(library),
            text=None if task is None else list(task.dataset.text),
            kind=None if task is None else task.dataset.kind,
            settings=self.reference.kind_settings(self.providers[-1]) or None,
            values=formats.matrices,
            embeddings=formats.embeddings,
            files=digest_files(self.folder),
        )

    def run(self, float32_modules: tuple[str, ...] = ()) -> ExportedModel:
        """Write the folder and pass it through the gates; raises as `export_and_check`."""
        target, reference, folder = self.target, self.reference, self.folder
        # Before anything is written: this refuses an architecture without prunable layers.
        zero_counts = reference.zero_counts
        files = self.write(float32_modules)

        # From cheap to dear: each gate may assume what the ones before it have shown.
        check_operators(target, files[0])
        if target.opened_by == "onnxruntime":
            check_interface(target, reference, files)
        check_files(target, reference, folder, files)
        check_manifest(target, reference, folder, files, self.providers[-1])
        new_zeros = check_weights(target, reference, folder)
        logits = check_logits(target, reference, folder, self.providers)
        check_folder(target, reference, folder, self.providers[-1])

        zeros = sum(count.zeros for count in zero_counts.values())
        size = sum(count.size for count in zero_counts.values())
        figures: dict[str, object] = {
            "files": [str(file.relative_to(folder)) for file in files],
            "bytes": sum(file.stat().st_size for file in files),
            "zeros": zeros,
            "size": size,
            "sparsity": zeros / size,
            "positions": reference.longest_input,
            "providers": self.providers,
        }
        exported = ExportedModel.model_validate(figures | logits._asdict() | target.properties(folder))
        if target.rounds_arithmetic:
            exported.rounded_to_zero = new_zeros
        if target.rounds_weights:
            exported.values, exported.embeddings = target.storage_formats(reference.recipe)
        if reference.dev.task is not None:
            record_scores(exported, check_score(target, reference, folder, self.providers[-1]))
        return exported


def record_scores(exported: ExportedModel, comparison: DevComparison) -> None:
    """Add what was measured on the dev sets."""
    exported.dev, exported.checkpoint_dev = comparison.file_scores, comparison.checkpoint_scores
    if comparison.number_change:
        exported.mean_change = comparison.number_change["mean_change"]
        exported.rank_correlation = comparison.number_change["rank_correlation"]
    else:
        exported.flipped, exported.worse = comparison.flipped, comparison.worsened
    exported.rows = comparison.rows
    if exported.rounds:  # that rounding moves logits is no fault of the file
        exported.largest_change = comparison.largest_change
    elif comparison.largest_change > exported.largest_difference:
        exported.largest_difference = comparison.largest_change
        exported.largest_difference_at = "the dev set"


def _export_with_float32_modules(
    attempt: ExportAttempt, modules: list[str], over_budget: ScoreBudgetExceeded
) -> ExportedModel:
    """Export with the fewest float32 modules that meet the budget, or raise ScoreBudgetExceeded."""
    reference = attempt.reference
    batches = _damage_batches(reference.dev.splits["dev"])
    checkpoint_forward = torch_forward(reference.load_model(), "cpu")
    expected = np.concatenate([checkpoint_forward(batch) for batch in batches])
    budget = allowed_change(attempt.target, reference.recipe)

    def damage(float32_modules: tuple[str, ...]) -> float:
        attempt.write(float32_modules)
        session = attempt.target.session(attempt.folder, "cpu")
        logits = np.concatenate([session(batch) for batch in batches])
        return float(np.sqrt(np.mean(np.square(logits - expected))))

    def meets_budget(float32_modules: tuple[str, ...]) -> bool:
        attempt.write(float32_modules)
        provider = attempt.providers[-1]
        comparison = compare_on_dev_sets(attempt.target, reference, attempt.folder, provider)
        return metric_over_budget(comparison, budget) is None

    result = search_float32_modules(modules, damage, meets_budget, reference.recipe.export.tries)
    exported = attempt.run(_chosen_modules(result, over_budget))
    exported.damage, exported.tries = result.damage, result.tries
    return exported


def _chosen_modules(result: SearchResult, over_budget: ScoreBudgetExceeded) -> tuple[str, ...]:
    if result.float32_modules is None:
        worst = sorted(result.damage, key=lambda module: -result.damage[module])[:3]
        raise ScoreBudgetExceeded(
            over_budget.message,
            f"no few parts in float32 mend it ({result.tries} tries; the worst are {', '.join(worst)})",
        )
    modules = ", ".join(result.float32_modules)
    console.say(f"  {over_budget.message}: {modules} left in float32, after {result.tries} tries")
    return result.float32_modules


def _damage_batches(rows: Encoded) -> list[Batch]:
    count = min(len(rows), DAMAGE_ROWS)
    # Spread evenly: files are often sorted by their labels.
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))
    batches = []
    for start in range(0, len(chosen), DAMAGE_BATCH):
        batches.append(rows.collate(chosen[start : start + DAMAGE_BATCH]))
    return batches
