"""`spdtool export`: teacher and student as files for a runtime, each held against its checkpoint.

Reads: `teacher` and `finetune`. Writes: `export/teacher` and `export/student`, each a folder that Hugging Face clients
open; those of every further target lie under the target's name. Every file passes three gates: the zeros of each
prunable matrix are the checkpoint's; the logits are, on real rows and on shapes from (1, 1) to the longest; and so is
the metric of the whole dev set. Where a target rounds the weights, its logits are held against the checkpoint with the
rounded weights, and its dev metric, with a wider budget, against the checkpoint itself.

`spdtool export --from CHECKPOINT` does the same to any checkpoint, with no run.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from spdtool import console, data, encoders, evaluation, plugins
from spdtool.data import Encoded
from spdtool.errors import DeviceError, GateError, ModelError, PluginError, SpdError
from spdtool.evaluation import Forward
from spdtool.export import parity, runtime, targets
from spdtool.export.unpack import refuse_occupied
from spdtool.recipe import Recipe
from spdtool.run import Run, replacing
from spdtool.tasks import Task


@dataclass(frozen=True)
class Dev:
    """What an export is compared on: the task and its dev sets; without a task, one dev set without rows."""

    task: Task | None
    sets: dict[str, Encoded]


def export(run: Run) -> dict[str, Any]:
    """Export teacher and student of `run` for each target of the recipe; return the metrics of the exported files.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        UnknownName, DataError, DeviceError: the target, the data or the runtime cannot be used; nothing is written.
        GateError: an exported file is not its checkpoint.
    """
    recipe = run.recipe
    chosen = targets.demanded(recipe.export)
    further, absent = targets.offered(recipe.export)
    providers = runtime.working(recipe.device)
    checkpoints = {"teacher": run.read("teacher"), "student": run.read("finetune")}
    dev = _dev(checkpoints["student"], recipe)
    for name, error in absent.items():
        _leave_out(name, error)
    with run.stage("export") as work:
        for choice in (*chosen, *further):
            metrics = work.metrics.setdefault(choice.name, {}) if choice.prefix else work.metrics
            folder = work.folder / choice.prefix
            try:
                for role in targets.roles(choice.target):
                    with console.busy(f"exporting the {role} ({choice.name}) and holding it against its checkpoint"):
                        metrics[role] = export_checkpoint(
                            choice.target, checkpoints[role], folder / role, dev, recipe, providers
                        )
                    _tell(f"{role} ({choice.name})" if choice.prefix else role, metrics[role])
            except (DeviceError, ModelError, PluginError) as error:
                if not choice.optional:
                    raise
                _leave_out(choice.name, error)
                shutil.rmtree(folder, ignore_errors=True)
                del work.metrics[choice.name]
    return work.metrics


def export_any(checkpoint: Path, name: str, folder: Path, recipe: Recipe, *, with_task: bool) -> dict[str, Any]:
    """Export a checkpoint that belongs to no run to `folder`; return what was measured.

    Args:
        name: of the target.
        with_task: compare on the dev set of the recipe's task too, not only on random tokens.

    Raises:
        UnknownName, PluginError: the target cannot be used.
        ModelError: the checkpoint cannot be read, or is no classifier.
        RunError: `folder` holds something already.
        DataError, DeviceError: the data or the runtime cannot be used.
        GateError: the exported file is not its checkpoint; nothing is left of it.
    """
    target = plugins.targets.get(name)
    refuse_occupied(folder)
    providers = runtime.working(recipe.device)
    if not checkpoint.is_dir():
        raise ModelError(f"there is no folder {checkpoint}", "give a folder with config.json and model.safetensors")
    dev = (
        _dev(checkpoint, recipe) if with_task else Dev(None, {"dev": data.no_rows(encoders.load_tokenizer(checkpoint))})
    )
    shown = f"exporting {checkpoint} ({name}) and holding it against its checkpoint"
    with replacing(folder) as partial, console.busy(shown):
        metrics = export_checkpoint(target, checkpoint, partial, dev, recipe, providers)
    _tell(str(folder), metrics)
    return {"folder": str(folder), "target": name} | metrics


def export_checkpoint(
    target: Any, checkpoint: Path, folder: Path, dev: Dev, recipe: Recipe, providers: list[str]
) -> dict[str, Any]:
    """Export one checkpoint to `folder`, pass it through the gates, and return what was measured.

    The probes are compared with eager attention, which is what is exported: where a row's window holds nothing but
    padding (ModernBERT, padded on the left), torch's own two attentions differ. The dev set is compared with the
    checkpoint as a client loads it.

    Args:
        dev: encoded for this checkpoint; without rows, only the probes are compared.
        providers: those on which parity is checked, as far as the target runs there; the dev metric is computed on the
            last.

    Raises:
        GateError: zeros, logits or dev metric are not the checkpoint's.
    """
    section, rounds = recipe.export, targets.rounds(target)
    providers = _common(providers, targets.providers(target))
    files = target.export(checkpoint, folder, recipe)
    model: Any = encoders.load(checkpoint)
    expected = _zeros(model)
    parity.check_zeros(target.audit(folder), expected)

    largest: dict[str, tuple[float, str]] = {}
    same: Any = encoders.load(checkpoint, eager=True)
    if rounds:
        _fill(same, target, folder)
    for provider in providers:
        reference, found = evaluation.torch_forward(same.to(provider), provider), target.session(folder, provider)
        batches = parity.probes(same, dev.sets["dev"], section.sentences)
        largest[provider] = parity.parity(reference, found, batches, section.tolerance)

    difference, where = max(largest.values())
    zeros, size = (sum(counts) for counts in zip(*expected.values(), strict=True))
    metrics = {
        "largest_difference": difference,
        "largest_difference_at": where,
        "providers": providers,
        "zeros": zeros,
        "size": size,
        "sparsity": zeros / size,
        "files": [str(file.relative_to(folder)) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "positions": parity.positions(model),
    }
    if rounds:
        metrics |= {"values": section.values, "embeddings": section.embeddings}
    if dev.task is not None:
        original = evaluation.torch_forward(model.to(provider), provider)
        change = compare(dev.task, original, found, dev.sets, section.tolerance)
        _refuse_change(change, section.allowed_change(rounds=rounds), recipe, rounds=rounds)
        metrics |= _measured(change, metrics, rounds=rounds)
    elif rounds:
        exact: Any = encoders.load(checkpoint, eager=True)
        original = evaluation.torch_forward(exact.to(provider), provider)
        batches = parity.probes(same, dev.sets["dev"], section.sentences)
        metrics["largest_change"] = parity.parity(original, found, batches, math.inf)[0]
    return metrics


@dataclass(frozen=True)
class Change:
    """What an exported file makes of the dev sets: both sides' metrics, flipped predictions, largest logit change."""

    metrics: dict[str, float]
    checkpoint: dict[str, float]
    flipped: int
    rows: int
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
    return Change(metrics, checkpoint, flipped, sum(len(rows) for rows in dev.values()), largest)


def _dev(checkpoint: Path, recipe: Recipe) -> Dev:
    """The dev sets of the recipe's task, encoded for the checkpoint.

    Raises:
        DataError, ModelError: data, tokenizer and model do not fit together.
    """
    model = encoders.load(checkpoint)
    task, splits = data.prepare(recipe, encoders.load_tokenizer(checkpoint), encoders.label_names(model))
    dev = {name: rows for name, rows in splits.items() if name.startswith("dev")}
    data.check_lengths(dev, encoders.positions(model))
    data.check_vocabulary(dev, model.config.vocab_size)
    return Dev(task, dev)


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


def _refuse_change(change: Change, budget: float, recipe: Recipe, *, rounds: bool) -> None:
    for name, value in change.metrics.items():
        if not abs(value - change.checkpoint[name]) <= budget:
            hint = f"export.budget is {budget:g}"
            if rounds:
                section = recipe.export
                hint += (
                    f"; export.values={section.values} and export.embeddings={section.embeddings} round the weights: "
                )
                hint += "store them more exactly, raise the budget, or take the target out of export.optional"
            raise GateError(
                f"the exported file has {name} {value:.4f} on the dev set; its checkpoint has "
                f"{change.checkpoint[name]:.4f} ({change.flipped} of {change.rows} predictions flipped)",
                hint,
            )


def _measured(change: Change, metrics: dict[str, Any], *, rounds: bool) -> dict[str, Any]:
    """The part of the metrics that the dev sets give; rounding moves the logits, and that is no fault of the file."""
    found: dict[str, Any] = {
        "dev": change.metrics,
        "checkpoint_dev": change.checkpoint,
        "flipped": change.flipped,
        "rows": change.rows,
    }
    if rounds:
        found["largest_change"] = change.difference
    elif change.difference > metrics["largest_difference"]:
        found |= {"largest_difference": change.difference, "largest_difference_at": "the dev set"}
    return found


def _leave_out(name: str, error: SpdError) -> None:
    console.warn(f"the export to {name} is left out: {error.message}{f' ({error.hint})' if error.hint else ''}")


def _tell(what: str, metrics: dict[str, Any]) -> None:
    rounds = "values" in metrics
    line = f"{console.plain(what)}: {console.number(metrics['bytes'])} bytes, "
    line += f"{metrics['sparsity']:.2%} zeros as in its checkpoint; "
    if "dev" in metrics and not rounds:
        line += f"dev {console.scores(metrics['dev'])}, {_flips(metrics)}; "
    weights = " with the same rounded weights" if rounds else ""
    console.say(f"{line}largest logit difference{weights} {metrics['largest_difference']:.1e}")
    if rounds:
        console.say(f"  weights in {metrics['values']}, embeddings in {metrics['embeddings']}: {_cost(metrics)}")
    if len(metrics["files"]) > 1 and not rounds:
        console.warn(f"{what} is larger than one ONNX file can be: {', '.join(metrics['files'])}")


def _cost(metrics: dict[str, Any]) -> str:
    """What the rounding costs on the dev set, in words."""
    if "dev" not in metrics:
        change = f"largest logit change on random tokens {metrics['largest_change']:.1e}"
        return f"{change}; no dev set was given to say what that costs (--task or --data)"
    before, after = (f"{metrics[side]['score']:.4f}" for side in ("checkpoint_dev", "dev"))
    change = f"largest logit change {metrics['largest_change']:.1e}"
    return f"dev score {before} before, {after} after; {_flips(metrics)}; {change}"


def _flips(metrics: dict[str, Any]) -> str:
    return f"{metrics['flipped']} of {metrics['rows']} predictions flipped"
