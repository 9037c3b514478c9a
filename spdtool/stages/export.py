"""`spdtool export`: teacher and student as files for a runtime, each held against its checkpoint.

Reads: `teacher` and `finetune`. Writes: `export/teacher` and `export/student`, each a folder that Hugging Face clients
open; those of a second target lie under the target's name. Every file passes three gates: the zeros of each prunable
matrix are the checkpoint's; the logits are, on real rows and on shapes from (1, 1) to the longest; and so is the metric
of the whole dev set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdtool import console, data, encoders, evaluation
from spdtool.data import Encoded
from spdtool.errors import GateError
from spdtool.evaluation import Forward
from spdtool.export import parity, runtime
from spdtool.plugins import targets
from spdtool.recipe import Recipe
from spdtool.run import Run
from spdtool.tasks import Task


def export(run: Run) -> dict[str, Any]:
    """Export teacher and student of `run` for each target of the recipe; return the metrics of the exported files.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        UnknownName, DataError, DeviceError: the target, the data or the runtime cannot be used; nothing is written.
        GateError: an exported file is not its checkpoint.
    """
    recipe = run.recipe
    chosen = {name: targets.get(name) for name in recipe.export.targets}
    providers = runtime.working(recipe.device)
    checkpoints = {"teacher": run.read("teacher"), "student": run.read("finetune")}
    names = encoders.label_names(encoders.load(checkpoints["student"]))
    task, splits = data.prepare(recipe, encoders.load_tokenizer(checkpoints["student"]), names)
    dev = {name: rows for name, rows in splits.items() if name.startswith("dev")}
    with run.stage("export") as work:
        for number, (name, target) in enumerate(chosen.items()):
            folder = work.folder / name if number else work.folder
            metrics = work.metrics.setdefault(name, {}) if number else work.metrics
            for role, checkpoint in checkpoints.items():
                with console.busy(f"exporting the {role} ({name}) and holding it against its checkpoint"):
                    metrics[role] = export_checkpoint(target, checkpoint, folder / role, task, dev, recipe, providers)
                _tell(role, metrics[role])
    return work.metrics


def export_checkpoint(
    target: Any,
    checkpoint: Path,
    folder: Path,
    task: Task,
    dev: dict[str, Encoded],
    recipe: Recipe,
    providers: list[str],
) -> dict[str, Any]:
    """Export one checkpoint to `folder`, pass it through the gates, and return what was measured.

    The probes are compared with eager attention, which is what is exported: where a row's window holds nothing but
    padding (ModernBERT, padded on the left), torch's own two attentions differ. The dev set is compared with the
    checkpoint as a client loads it.

    Args:
        dev: the dev splits, encoded for this checkpoint.
        providers: those on which parity is checked; the dev metric is computed on the last.

    Raises:
        GateError: zeros, logits or dev metric are not the checkpoint's.
    """
    section = recipe.export
    files = target.export(checkpoint, folder, recipe)
    model: Any = encoders.load(checkpoint)
    expected = encoders.zeros(checkpoint, list(encoders.prunable_linears(model)))
    parity.check_zeros(target.audit(folder), expected)

    largest: dict[str, tuple[float, str]] = {}
    same: Any = encoders.load(checkpoint, eager=True)
    for provider in providers:
        reference, found = evaluation.torch_forward(same.to(provider), provider), target.session(folder, provider)
        batches = parity.probes(same, dev["dev"], section.sentences)
        largest[provider] = parity.parity(reference, found, batches, section.tolerance)

    change = compare(task, evaluation.torch_forward(model.to(provider), provider), found, dev, section.tolerance)
    _refuse_change(change.metrics, change.checkpoint, section.budget)
    zeros, size = (sum(counts) for counts in zip(*expected.values(), strict=True))
    difference, where = max(largest.values())
    return {
        "dev": change.metrics,
        "checkpoint_dev": change.checkpoint,
        "flipped": change.flipped,
        "rows": sum(len(rows) for rows in dev.values()),
        "largest_difference": max(difference, change.difference),
        "largest_difference_at": "the dev set" if change.difference > difference else where,
        "providers": providers,
        "zeros": zeros,
        "size": size,
        "sparsity": zeros / size,
        "files": [str(file.relative_to(folder)) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "positions": parity.positions(model),
    }


@dataclass(frozen=True)
class Change:
    """What an exported file makes of the dev sets: both sides' metrics, flipped predictions, largest logit change."""

    metrics: dict[str, float]
    checkpoint: dict[str, float]
    flipped: int
    difference: float


def compare(task: Task, reference: Forward, found: Forward, dev: dict[str, Encoded], tolerance: float) -> Change:
    """Run checkpoint and exported file over every dev set; a regression counts as flipped beyond `tolerance`."""
    before, after = (
        {name: evaluation.predict(forward, rows) for name, rows in dev.items()} for forward in (reference, found)
    )
    flipped, largest = 0, 0.0
    for name in dev:
        moved = np.abs(evaluation.decide(task, after[name]) - evaluation.decide(task, before[name]))
        flipped += int((moved > tolerance).sum())
        largest = max(largest, float(np.abs(after[name] - before[name]).max()))
    metrics, checkpoint = (evaluation.score_all(task, logits, dev) for logits in (after, before))
    return Change(metrics, checkpoint, flipped, largest)


def _refuse_change(metrics: dict[str, float], checkpoint: dict[str, float], budget: float) -> None:
    for name, value in metrics.items():
        if not abs(value - checkpoint[name]) <= budget:
            raise GateError(
                f"the exported file has {name} {value:.4f} on the dev set; its checkpoint has {checkpoint[name]:.4f}",
                f"export.budget is {budget:g}",
            )


def _tell(role: str, metrics: dict[str, Any]) -> None:
    console.say(
        f"{role}: {console.number(metrics['bytes'])} bytes, {metrics['sparsity']:.2%} zeros as in its checkpoint; "
        f"dev {console.scores(metrics['dev'])}, {metrics['flipped']} of {metrics['rows']} predictions flipped; "
        f"largest logit difference {metrics['largest_difference']:.1e}"
    )
    if len(metrics["files"]) > 1:
        console.warn(f"the {role} is larger than one ONNX file can be: {', '.join(metrics['files'])}")
