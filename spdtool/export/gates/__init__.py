"""The gates that a checkpoint passes through on its way into a target's files.

    operators   of no domain but those that the target names
    zeros       every zero of the checkpoint's matrices is a zero of the file
    logits      those of the checkpoint, on real rows and on shapes from (1, 1) to the longest, padded on either side
    dev metric  that of the checkpoint, within the budget: see `change.py`

What a target stores rounded is held against the checkpoint with the rounded weights, which proves the arithmetic; where
the arithmetic is coarse as well, its exact twin is. The dev metric is always held against the checkpoint itself.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from transformers import PreTrainedModel

from spdtool import console
from spdtool.data.tokens import Batch, Encoded
from spdtool.errors import DeviceError, GateError, ModelError, RecipeError
from spdtool.export.gates.batches import is_dev_batch
from spdtool.export.gates.logits import compare_logits, measure_deviation
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import (
    DevComparison,
    ScoreBudgetExceeded,
    check_budget,
    compare_predictions,
    measured,
    metric_over_budget,
)
from spdtool.export.gates.search import Found, Kept, search
from spdtool.export.gates.weights import check_zeros
from spdtool.export.graph.fuse import operator_domains
from spdtool.export.target import Rounding, Target
from spdtool.models import predict as evaluation
from spdtool.models.load import fill_weights
from spdtool.models.predict import Forward
from spdtool.run.records import ExportedModel

CONSTANTS = 10  # the float32 copy's scalars, such as the root in a GELU, are rounded too, and are no weights
ROWS_OF_DAMAGE = 64  # of the dev set, on which one layer's rounding is judged


def export_and_check(target: Target, reference: Reference, folder: Path, providers: list[str]) -> ExportedModel:
    """Export one checkpoint to `folder`, pass it through the gates, and return what was measured.

    Where a target that can leave parts unrounded breaks the budget, the parts that do so are looked for and left.

    Args:
        providers: those on which parity is checked, as far as the target runs there; the dev metric is computed on the
            last.

    Raises:
        GateError: operators, zeros, logits or dev metric are not the checkpoint's.
        RecipeError: the target is calibrated on rows of a task, and there is none.
    """
    attempt = ExportAttempt(target, reference, folder, _common(providers, target.providers))
    try:
        return attempt.export(())
    except ScoreBudgetExceeded as error:
        parts = target.float32_candidates(reference.checkpoint, reference.recipe)
        if len(parts) < 2:
            raise
        return _rescue(attempt, parts, error)


@dataclass(frozen=True)
class ExportAttempt:
    """Keeps what every export of one checkpoint by one target is made of."""

    target: Target
    reference: Reference
    folder: Path
    providers: list[str]

    def write(self, keep: Kept) -> list[Path]:
        """Export anew, with `keep` unrounded; returns the files that hold the model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.target.calibrates and self.reference.dev.train is None:
            raise RecipeError("this target is calibrated on rows of a task, and none was given", "--task or --data")
        rounding = Rounding(keep, self.reference.dev.train)
        found = self.reference
        return self.target.export_rounded(found.checkpoint, self.folder, found.recipe, rounding)

    def export(self, keep: Kept) -> ExportedModel:
        """Export, hold the files against the checkpoint, and measure them; raises as `export_and_check` does."""
        zeros = self.reference.zeros  # first: it refuses an architecture that is not supported
        files = self.write(keep)
        rounds = self.target.rounds_weights
        _check_domains(self.target, files[0])
        audited = self.target.count_zeros(self.folder)
        check_zeros(audited, zeros, more=self.coarse)
        metrics = self._logits() | _sizes(files, self.folder, zeros)
        metrics["positions"] = self.reference.positions
        if self.coarse:
            metrics["rounded_to_zero"] = sum(audited[name][0] - count for name, (count, _) in zeros.items())
        if rounds:
            storage = self.target.storage_formats(self.reference.recipe)
            metrics |= dict(zip(("values", "embeddings"), storage, strict=True))
        metrics |= self.target.properties(self.folder)
        metrics |= self._dev(metrics) if self.reference.dev.task else {}
        return ExportedModel.model_validate(metrics)

    @property
    def coarse(self) -> bool:
        """Whether the arithmetic is rounded too, and weights that round to zero may be more zeros than there were."""
        return self.target.rounds_arithmetic

    def change(self) -> DevComparison:
        """What the files that are written now make of the dev sets, on the last of the providers."""
        provider, dev = self.providers[-1], self.reference.dev
        found = dev.predict(self.target.session(self.folder, provider))
        assert dev.task is not None
        tolerance = self.reference.recipe.export.tolerance
        return compare_predictions(dev.task, self.reference.on_dev(provider), found, dev.sets, tolerance)

    def budget(self) -> float:
        """The largest change of the dev metric that passes."""
        recipe = self.reference.recipe
        storage = self.target.storage_formats(recipe)
        return recipe.export.allowed_change(rounds=self.target.rounds_weights, storage=storage)

    def _logits(self) -> dict[str, Any]:
        """Hold the logits against the checkpoint's, on each provider."""
        section, batches = self.reference.recipe.export, self.reference.probes
        rounds = self.target.rounds_weights
        twin = self.target.float32_form(self.folder) if self.coarse else None
        same: Any = _filled(self.reference.model(eager=True), self.target, self.folder) if rounds else None
        found: dict[str, Any] = {"providers": self.providers}
        largest: list[tuple[float, str]] = []
        for provider in self.providers:
            self.target.verify(self.folder, self.reference.checkpoint, batches, provider)
            session, original = self.target.session(self.folder, provider), self.reference.on_probes(provider)
            expected = evaluation.torch_forward(same.to(provider), provider) if same else original
            tolerance = section.tolerance * (CONSTANTS if twin else 1)
            largest.append(compare_logits(expected, twin or session, batches, tolerance))
            if rounds:
                seen = self._calibrated_for() if self.target.calibrates else []
                found |= _moved(original, session, seen or batches, section.rounded_tolerance if twin else math.inf)
        difference, where = max(largest)
        return {"largest_difference": difference, "largest_difference_at": where} | found

    def _calibrated_for(self) -> list[tuple[str, Batch]]:
        """Probes like the rows of the calibration, whose ranges say nothing of random tokens and of padding up front.

        The exact twin is held on all of them.
        """
        rows = self.reference.dev.sets["dev"]
        return [(name, batch) for name, batch in self.reference.probes if is_dev_batch(name, left=rows.pad_left)]

    def _dev(self, metrics: dict[str, Any]) -> dict[str, Any]:
        rounds, change = self.target.rounds_weights, self.change()
        check_budget(change, self.budget(), metrics, rounds=rounds, coarse=self.coarse)
        return measured(change, metrics, rounds=rounds)


def _rescue(attempt: ExportAttempt, parts: list[str], first: ScoreBudgetExceeded) -> ExportedModel:
    """Leave in float32 what breaks the budget, if less than everything will do; raises the first error if not."""
    batches = _some(attempt.reference.dev.sets["dev"])
    original = evaluation.torch_forward(attempt.reference.model(), "cpu")
    expected = [original(batch) for batch in batches]

    def damage(keep: Kept) -> float:
        attempt.write(keep)
        session = attempt.target.session(attempt.folder, "cpu")
        return float(np.sqrt(np.mean(np.square(np.concatenate([*map(session, batches)]) - np.concatenate(expected)))))

    def passes(keep: Kept) -> bool:
        attempt.write(keep)
        return metric_over_budget(attempt.change(), attempt.budget()) is None

    found = search(parts, damage, passes, attempt.reference.recipe.export.tries)
    exported = attempt.export(_least(found, first))
    exported.damage, exported.tries = found.damage, found.tries
    return exported


def _least(found: Found, first: ScoreBudgetExceeded) -> Kept:
    worst = sorted(found.damage, key=lambda part: -found.damage[part])
    if found.kept is None:
        raise ScoreBudgetExceeded(
            first.message,
            f"no few parts in float32 mend it ({found.tries} tries; the worst are {', '.join(worst[:3])})",
        )
    console.say(f"  {first.message}: {', '.join(found.kept)} left in float32, after {found.tries} tries")
    return found.kept


def _some(rows: Encoded) -> list[Batch]:
    count = min(len(rows), ROWS_OF_DAMAGE)
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))
    return [rows.collate(chosen[start : start + 16]) for start in range(0, len(chosen), 16)]


def _sizes(files: list[Path], folder: Path, counts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    zeros, size = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return {
        "zeros": zeros,
        "size": size,
        "sparsity": zeros / size,
        "files": [str(file.relative_to(folder)) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }


def _moved(expected: Forward, session: Callable[..., Any], batches: Any, tolerance: float) -> dict[str, float]:
    """What roundings do to the logits of the probes; raises GateError beyond the tolerance."""
    share, largest = measure_deviation(expected, session, batches)
    if share > tolerance:
        raise GateError(
            f"fp16 or int8 arithmetic moves the logits by {share:.0%} of their size; the tolerance is {tolerance:.0%}",
            "export.rounded_tolerance sets it; the model has activations or weights far from all others",
        )
    return {"largest_change": largest, "deviation": share}


def _check_domains(target: Target, file: Path) -> None:
    """Raise GateError if the file has operators of a domain that the target does not name."""
    if target.operator_domains is None:
        return
    foreign = operator_domains(onnx.load(file, load_external_data=False)) - set(target.operator_domains)
    if foreign:
        raise GateError(f"{file.name} has operators of the domain {', '.join(sorted(foreign))}")


def _common(working: list[str], supported: tuple[str, ...]) -> list[str]:
    """The working providers that a target's files run on.

    Raises:
        DeviceError: there is none.
    """
    common = [name for name in working if name in supported]
    if not common:
        raise DeviceError(f"the target runs on {', '.join(supported)}; what works here is {', '.join(working)}")
    return common


def _filled(model: PreTrainedModel, target: Target, folder: Path) -> PreTrainedModel:
    """The model with the weights that the exported files really hold."""
    try:
        fill_weights(model, target.stored_weights(folder))
    except ModelError as error:  # the checkpoint is sound: what was made of it is not
        raise GateError(f"the exported file holds other weights than its checkpoint: {error.message}") from None
    return model
