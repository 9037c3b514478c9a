"""`spdtool export`: teacher and student as files for a runtime, each held against its checkpoint.

Reads: `teacher` and `finetune`. Writes: `export/teacher` and `export/student`, each a folder that Hugging Face clients
open; those of every further target lie under the target's name. Every file passes three gates: the zeros of each
prunable matrix are the checkpoint's; the logits are, on real rows and on shapes from (1, 1) to the longest; and so is
the metric of the whole dev set. Where a target rounds the weights, its logits are held against the checkpoint with the
rounded weights, and its dev metric, with a wider budget, against the checkpoint itself: see `gates.py`.

A target beside the first one whose files a gate refuses is not shipped, and that is said. The others are, the stage
counts as done, and the reason is kept in stage.json under `refused`. One that was demanded (`export.targets`) makes the
command end with exit code 3; one that nobody asked for (`export.optional`) does not.

`spdtool export --from CHECKPOINT` does the same to any checkpoint, with no run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from spdtool import console, plugins
from spdtool.data import tokens as data
from spdtool.errors import DeviceError, GateError, ModelError, PluginError, SpdError
from spdtool.export import runtime
from spdtool.export import target as targets
from spdtool.export.bundle import write as assembly
from spdtool.export.bundle.unpack import refuse_occupied
from spdtool.export.gates import export_checkpoint
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import Dev, dev_sets
from spdtool.export.graph import trace as onnx
from spdtool.export.target import Chosen
from spdtool.models.load import load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run, Work, replacing

REFUSED = "refused"  # in the metrics: target to the reason


def export(run: Run) -> dict[str, Any]:
    """Export teacher and student of `run` for each target of the recipe; return the metrics of the exported files.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        RunMismatch: the rows have changed since the earlier stages read them.
        UnknownName, DataError, DeviceError: the target, the data or the runtime cannot be used; nothing is written.
        GateError: the first target's file is not its checkpoint, and nothing is written; or that of a further one
            that was demanded is not, and everything else is.
    """
    recipe = run.recipe
    chosen = targets.demanded(recipe.export)
    further, absent = targets.offered(recipe.export)
    providers = runtime.working(recipe.device)
    checkpoints = {"teacher": run.read("teacher"), "student": run.read("finetune")}
    dev = {role: dev_sets(path, recipe, run.note_data) for role, path in checkpoints.items()}
    references = {role: Reference(path, dev[role], recipe) for role, path in checkpoints.items()}
    for name, error in absent.items():
        _leave_out(name, error)
    with run.stage("export") as work, onnx.remembering():
        for choice in (*chosen, *further):
            try:
                _export_target(choice, work, references, providers)
            except (DeviceError, ModelError, PluginError) as error:
                if not choice.optional:
                    raise
                _leave_out(choice.name, error)
                _remove(choice, work)
            except GateError as error:
                if not choice.prefix:
                    raise
                reason = f"{error.message}{f' ({error.hint})' if error.hint else ''}"
                console.warn(f"{choice.name} is not shipped: {reason}{_untried(choice, recipe)}")
                _remove(choice, work)
                work.metrics.setdefault(REFUSED, {})[choice.name] = reason
        lacking = assembly.assemble(work.folder, checkpoints["student"], recipe, work.metrics)
        if lacking:
            console.warn(f"there is no bundle to serve: {lacking}")
    _raise_refused(work.metrics, recipe)
    return work.metrics


def _untried(choice: Chosen, recipe: Recipe) -> str:
    """What to add to a refusal: how an optional target is not tried again."""
    if not choice.optional:
        return ""
    others = ", ".join(f'"{name}"' for name in recipe.export.optional if name != choice.name)
    return f"; it is optional, and --set 'export.optional=[{others}]' does without it"


def _raise_refused(metrics: dict[str, Any], recipe: Recipe) -> None:
    """Raise GateError if a demanded target of a finished stage was refused, with every reason."""
    refused = {name: reason for name, reason in metrics.get(REFUSED, {}).items() if name in recipe.export.targets}
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise GateError(
            f"not shipped: {reasons}",
            "everything else was exported, and the stage is done; `spdtool export --again` tries anew with other --set",
        )


def export_any(checkpoint: Path, name: str, folder: Path, recipe: Recipe, *, with_task: bool) -> dict[str, Any]:
    """Export a checkpoint that belongs to no run to `folder`; return what was measured.

    Args:
        name: of the target.
        with_task: compare on the dev set of the recipe's task too, not only on random tokens.

    Raises:
        UnknownName, PluginError: the target cannot be used.
        ModelError: the checkpoint cannot be read, or is no classifier.
        RunError: `folder` holds something already.
        RecipeError: the target is calibrated on rows of a task, and there is none.
        DataError, DeviceError: the data or the runtime cannot be used.
        GateError: the exported file is not its checkpoint; nothing is left of it.
    """
    target = plugins.targets.get(name)
    refuse_occupied(folder)
    providers = runtime.working(recipe.device)
    if not checkpoint.is_dir():
        raise ModelError(f"there is no folder {checkpoint}", "give a folder with config.json and model.safetensors")
    dev = (
        dev_sets(checkpoint, recipe) if with_task else Dev(None, {"dev": data.empty_split(load_tokenizer(checkpoint))})
    )
    shown = f"exporting {checkpoint} ({name}) and holding it against its checkpoint"
    with replacing(folder) as partial, console.busy(shown), onnx.remembering():
        metrics = export_checkpoint(target, Reference(checkpoint, dev, recipe), partial, providers)
    _tell(str(folder), metrics)
    return {"folder": str(folder), "target": name} | metrics


def _export_target(choice: Chosen, work: Work, references: dict[str, Reference], providers: list[str]) -> None:
    metrics = work.metrics.setdefault(choice.name, {}) if choice.prefix else work.metrics
    for role in targets.roles(choice.target):
        folder = work.folder / choice.prefix / role
        with console.busy(f"exporting the {role} ({choice.name}) and holding it against its checkpoint"):
            metrics[role] = export_checkpoint(choice.target, references[role], folder, providers)
        _tell(f"{role} ({choice.name})" if choice.prefix else role, metrics[role])


def _remove(choice: Chosen, work: Work) -> None:
    shutil.rmtree(work.folder / choice.prefix, ignore_errors=True)
    del work.metrics[choice.name]


def _leave_out(name: str, error: SpdError) -> None:
    console.warn(f"the export to {name} is left out: {error.message}{f' ({error.hint})' if error.hint else ''}")


def _tell(what: str, metrics: dict[str, Any]) -> None:
    rounds = "values" in metrics
    line = f"{console.escape(what)}: {console.format_cell(metrics['bytes'])} bytes, "
    line += f"{metrics['sparsity']:.2%} zeros as in its checkpoint; "
    if "dev" in metrics and not rounds:
        line += f"dev {console.format_scores(metrics['dev'])}, {_flips(metrics)}; "
    weights = " with the same rounded weights" if rounds else ""
    console.say(f"{line}largest logit difference{weights} {metrics['largest_difference']:.1e}")
    if metrics.get("fused"):
        console.say(
            f"  {metrics['nodes']} nodes, fused: {', '.join(f'{n} {op}' for op, n in metrics['fused'].items())}"
        )
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
