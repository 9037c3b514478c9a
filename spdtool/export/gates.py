"""The gates that a checkpoint passes through on its way into a target's files.

    operators   of no domain but those that the target names
    zeros       every zero of the checkpoint's matrices is a zero of the file
    logits      those of the checkpoint, on real rows and on shapes from (1, 1) to the longest, padded on either side
    dev metric  that of the checkpoint, within the budget

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
from transformers import PreTrainedModel

from spdtool import console, data, encoders, evaluation
from spdtool.data import Batch, Encoded
from spdtool.errors import DeviceError, GateError, ModelError, RecipeError
from spdtool.evaluation import Forward
from spdtool.export import parity, targets
from spdtool.export.search import Found, Kept, search
from spdtool.recipe import Recipe
from spdtool.tasks import Task

CONSTANTS = 10  # a twin's scalars, such as the root in a GELU, are rounded too, and are no weights
ROWS_OF_DAMAGE = 64  # of the dev set, on which one layer's rounding is judged


@dataclass(frozen=True)
class Dev:
    """What an export is compared on: the task and its dev sets; without a task, one dev set without rows.

    Attributes:
        train: rows to calibrate on; None where there is no task.
    """

    task: Task | None
    sets: dict[str, Encoded]
    train: Encoded | None = None


@dataclass(frozen=True)
class Change:
    """What an exported file makes of the dev sets: both sides' metrics, flipped predictions, largest logit change.

    Attributes:
        worse: predictions that were right and are not any more; of a regression, all that moved.
    """

    metrics: dict[str, float]
    checkpoint: dict[str, float]
    flipped: int
    rows: int
    difference: float
    worse: int = 0


def dev_sets(checkpoint: Path, recipe: Recipe) -> Dev:
    """The dev sets of the recipe's task and some of its training rows, encoded for the checkpoint.

    Raises:
        DataError, ModelError: data, tokenizer and model do not fit together.
    """
    model = encoders.load(checkpoint)
    task, splits = data.prepare(recipe, encoders.load_tokenizer(checkpoint), encoders.label_names(model))
    dev = {name: rows for name, rows in splits.items() if name.startswith("dev")}
    data.check_lengths(dev, encoders.positions(model))
    data.check_vocabulary(dev, model.config.vocab_size)
    train = splits["train"]
    return Dev(task, dev, train.sample(recipe.export.calibration, recipe.seed))


def export_checkpoint(
    target: Any, checkpoint: Path, folder: Path, dev: Dev, recipe: Recipe, providers: list[str]
) -> dict[str, Any]:
    """Export one checkpoint to `folder`, pass it through the gates, and return what was measured.

    Where a target that can leave parts unrounded breaks the budget, the parts that do so are looked for and left.

    Args:
        dev: encoded for this checkpoint; without rows, only the probes are compared.
        providers: those on which parity is checked, as far as the target runs there; the dev metric is computed on the
            last.

    Raises:
        GateError: operators, zeros, logits or dev metric are not the checkpoint's.
        RecipeError: the target is calibrated on rows of a task, and there is none.
    """
    trial = Trial(target, checkpoint, folder, dev, recipe, _common(providers, targets.providers(target)))
    try:
        return trial.export(())
    except OverBudget as error:
        parts = targets.parts(target, checkpoint, recipe)
        if len(parts) < 2:
            raise
        return _rescue(trial, parts, error)


class OverBudget(GateError):
    """The files are sound, and their roundings cost more of the dev metric than the budget."""


@dataclass(frozen=True)
class Trial:
    """Keeps what every export of one checkpoint by one target is made of."""

    target: Any
    checkpoint: Path
    folder: Path
    dev: Dev
    recipe: Recipe
    providers: list[str]

    def write(self, keep: Kept) -> list[Path]:
        """Export anew, with `keep` unrounded; returns the files that hold the model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        more: dict[str, Any] = {"keep": keep} if keep else {}
        if targets.calibrates(self.target):
            if self.dev.train is None:
                raise RecipeError("this target is calibrated on rows of a task, and none was given", "--task or --data")
            more["rows"] = self.dev.train
        written: list[Path] = self.target.export(self.checkpoint, self.folder, self.recipe, **more)
        return written

    def export(self, keep: Kept) -> dict[str, Any]:
        """Export, hold the files against the checkpoint, and measure them; raises as `export_checkpoint` does."""
        files = self.write(keep)
        model: Any = encoders.load(self.checkpoint)
        zeros = _zeros(model)
        rounds = targets.rounds(self.target)
        targets.check_domains(self.target, files)
        audited = self.target.audit(self.folder)
        parity.check_zeros(audited, zeros, more=self.coarse)
        metrics = self._logits() | _sizes(files, self.folder, zeros, model)
        if self.coarse:
            metrics["rounded_to_zero"] = sum(audited[name][0] - count for name, (count, _) in zeros.items())
        if rounds:
            metrics |= dict(zip(("values", "embeddings"), targets.storage(self.target, self.recipe), strict=True))
        metrics |= targets.facts(self.target, self.folder)
        return metrics | (self._dev(model, metrics) if self.dev.task else {})

    @property
    def coarse(self) -> bool:
        """Whether the arithmetic is rounded too, and weights that round to zero may be more zeros than there were."""
        return getattr(self.target, "exact", None) is not None

    def change(self, model: Any) -> Change:
        """What the files that are written now make of the dev sets, on the last of the providers."""
        provider = self.providers[-1]
        original = evaluation.torch_forward(model.to(provider), provider)
        found = self.target.session(self.folder, provider)
        assert self.dev.task is not None
        return compare(self.dev.task, original, found, self.dev.sets, self.recipe.export.tolerance)

    def budget(self) -> float:
        """The largest change of the dev metric that passes."""
        storage = targets.storage(self.target, self.recipe)
        return self.recipe.export.allowed_change(rounds=targets.rounds(self.target), storage=storage)

    def _logits(self) -> dict[str, Any]:
        """Hold the logits against the checkpoint's.

        Eager attention is compared, which is what is exported: where a row's window holds nothing but padding
        (ModernBERT, padded on the left), torch's own two attentions differ. The dev set is compared with the checkpoint
        as a client loads it.
        """
        section, rounds = self.recipe.export, targets.rounds(self.target)
        same: Any = encoders.load(self.checkpoint, eager=True)
        plain: Any = encoders.load(self.checkpoint, eager=True) if rounds else same
        if rounds:
            _fill(same, self.target, self.folder)
        twin = targets.exact(self.target, self.folder)
        found: dict[str, Any] = {"providers": self.providers}
        largest: list[tuple[float, str]] = []
        for provider in self.providers:
            batches = list(parity.probes(same, self.dev.sets["dev"], section.sentences))
            targets.verify(self.target, self.folder, plain, batches, provider)
            session = self.target.session(self.folder, provider)
            reference = evaluation.torch_forward(same.to(provider), provider)
            tolerance = section.tolerance * (CONSTANTS if twin else 1)
            largest.append(parity.parity(reference, twin or session, batches, tolerance))
            if rounds:
                original = evaluation.torch_forward(plain.to(provider), provider)
                real = (
                    [entry for entry in batches if " dev rows" in entry[0]] if targets.calibrates(self.target) else []
                )
                found |= _moved(original, session, real or batches, section.rounded_tolerance if twin else math.inf)
        difference, where = max(largest)
        return {"largest_difference": difference, "largest_difference_at": where} | found

    def _dev(self, model: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        rounds = targets.rounds(self.target)
        change = self.change(model)
        _refuse_change(change, self.budget(), metrics, rounds=rounds, coarse=self.coarse)
        return _measured(change, metrics, rounds=rounds)


def compare(task: Task, reference: Forward, found: Forward, dev: dict[str, Encoded], tolerance: float) -> Change:
    """Run checkpoint and exported file over every dev set; a regression counts as flipped beyond `tolerance`."""
    before, after = (
        {name: evaluation.predict(forward, rows) for name, rows in dev.items()} for forward in (reference, found)
    )
    flipped, worse, largest = 0, 0, 0.0
    for name, rows in dev.items():
        was, became = (evaluation.decide(task, side[name]) for side in (before, after))
        moved = np.abs(became - was) > (tolerance if task.regression else 0)
        flipped += int(moved.sum())
        worse += int((moved if task.regression else moved & (was == rows.labels)).sum())
        largest = max(largest, float(np.abs(after[name] - before[name]).max()))
    metrics, checkpoint = (evaluation.score_all(task, logits, dev) for logits in (after, before))
    return Change(metrics, checkpoint, flipped, sum(len(rows) for rows in dev.values()), largest, worse)


def exceeds(change: Change, budget: float) -> str | None:
    """The name of the first metric that changed by more than the budget; one prediction alone is never too much.

    On 400 rows one prediction is a quarter of a point, and what flips it may be the last bit of a logit.
    """
    for name, value in change.metrics.items():
        if not math.isfinite(value) or (abs(value - change.checkpoint[name]) > budget and change.worse > 1):
            return name
    return None


def _rescue(trial: Trial, parts: list[str], first: OverBudget) -> dict[str, Any]:
    """Leave in float32 what breaks the budget, if less than everything will do; raises the first error if not."""
    model: Any = encoders.load(trial.checkpoint)
    batches = _some(trial.dev.sets["dev"])
    expected = [evaluation.torch_forward(model, "cpu")(batch) for batch in batches]

    def damage(keep: Kept) -> float:
        trial.write(keep)
        session = trial.target.session(trial.folder, "cpu")
        return float(np.sqrt(np.mean(np.square(np.concatenate([*map(session, batches)]) - np.concatenate(expected)))))

    def passes(keep: Kept) -> bool:
        trial.write(keep)
        return exceeds(trial.change(model), trial.budget()) is None

    found = search(parts, damage, passes, trial.recipe.export.tries)
    return trial.export(_least(found, first)) | {"damage": found.damage, "tries": found.tries}


def _least(found: Found, first: OverBudget) -> Kept:
    worst = sorted(found.damage, key=lambda part: -found.damage[part])
    if found.kept is None:
        raise OverBudget(
            first.message,
            f"no few parts in float32 mend it ({found.tries} tries; the worst are {', '.join(worst[:3])})",
        )
    console.say(f"  {first.message}: {', '.join(found.kept)} left in float32, after {found.tries} tries")
    return found.kept


def _some(rows: Encoded) -> list[Batch]:
    count = min(len(rows), ROWS_OF_DAMAGE)
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))
    return [rows.collate(chosen[start : start + 16]) for start in range(0, len(chosen), 16)]


def _sizes(
    files: list[Path], folder: Path, counts: dict[str, tuple[int, int]], model: PreTrainedModel
) -> dict[str, Any]:
    zeros, size = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return {
        "zeros": zeros,
        "size": size,
        "sparsity": zeros / size,
        "files": [str(file.relative_to(folder)) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "positions": parity.positions(model),
    }


def _moved(expected: Forward, session: Callable[..., Any], batches: Any, tolerance: float) -> dict[str, float]:
    """What roundings do to the logits of the probes; raises GateError beyond the tolerance."""
    share, largest = parity.deviation(expected, session, batches)
    if share > tolerance:
        raise GateError(
            f"fp16 or int8 arithmetic moves the logits by {share:.0%} of their size; the tolerance is {tolerance:.0%}",
            "export.rounded_tolerance sets it; the model has activations or weights far from all others",
        )
    return {"largest_change": largest, "deviation": share}


def _common(working: list[str], supported: tuple[str, ...]) -> list[str]:
    """The working providers that a target's files run on.

    Raises:
        DeviceError: there is none.
    """
    common = [name for name in working if name in supported]
    if not common:
        raise DeviceError(f"the target runs on {', '.join(supported)}; what works here is {', '.join(working)}")
    return common


def _zeros(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """`(zeros, size)` of each prunable matrix of a model as it was loaded."""
    weights = encoders.prunable_linears(model)
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in weights.items()}


def _fill(model: PreTrainedModel, target: Any, folder: Path) -> None:
    """Put the weights that the exported files really hold into the model."""
    try:
        encoders.fill(model, targets.weights(target, folder))
    except ModelError as error:  # the checkpoint is sound: what was made of it is not
        raise GateError(f"the exported file holds other weights than its checkpoint: {error.message}") from None


def _refuse_change(change: Change, budget: float, metrics: dict[str, Any], *, rounds: bool, coarse: bool) -> None:
    name = exceeds(change, budget)
    if name is None:
        return
    hint = f"export.budget is {budget:g}"
    if rounds:
        stored = f"export.values={metrics['values']} and export.embeddings={metrics['embeddings']} round the weights"
        if coarse:
            stored = f"its weights and its arithmetic are {metrics['values']}"
        hint += f"; {stored}: store them more exactly, raise the budget, or take the target out of export.optional"
    raise OverBudget(
        f"the exported file has {name} {change.metrics[name]:.4f} on the dev set; its checkpoint has "
        f"{change.checkpoint[name]:.4f} ({change.flipped} of {change.rows} predictions flipped, "
        f"{change.worse} for the worse)",
        hint,
    )


def _measured(change: Change, metrics: dict[str, Any], *, rounds: bool) -> dict[str, Any]:
    """The part of the metrics that the dev sets give; rounding moves the logits, and that is no fault of the file."""
    found: dict[str, Any] = {
        "dev": change.metrics,
        "checkpoint_dev": change.checkpoint,
        "flipped": change.flipped,
        "worse": change.worse,
        "rows": change.rows,
    }
    if rounds:
        found["largest_change"] = change.difference
    elif change.difference > metrics["largest_difference"]:
        found |= {"largest_difference": change.difference, "largest_difference_at": "the dev set"}
    return found
