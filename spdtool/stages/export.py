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

from spdtool import console
from spdtool.data import tokens as data
from spdtool.errors import DeviceError, GateError, ModelError, PluginError, SpdError
from spdtool.export import runtime
from spdtool.export.bundle.unpack import require_empty_folder
from spdtool.export.bundle.write import write_bundle
from spdtool.export.gates import export_and_check
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import DevSets, prepare_dev_sets
from spdtool.export.graph.trace import cached_traces
from spdtool.export.target import ChosenTarget, get_target, optional_targets, required_targets
from spdtool.models.load import load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run, Stage, replacing
from spdtool.run.records import ExportedModel, ExportResult, TargetExport


def export(run: Run) -> ExportResult:
    """Export teacher and student of `run` for each target of the recipe; return the figures of the exported files.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        RunMismatch: the rows have changed since the earlier stages read them.
        UnknownName, DataError, DeviceError: the target, the data or the runtime cannot be used; nothing is written.
        GateError: the first target's file is not its checkpoint, and nothing is written; or that of a further one
            that was demanded is not, and everything else is.
    """
    recipe = run.recipe
    chosen = required_targets(recipe.export)
    further, absent = optional_targets(recipe.export)
    providers = runtime.working_providers(recipe.device)
    checkpoints = {"teacher": run.read("teacher"), "student": run.read("finetune")}
    dev = {role: prepare_dev_sets(path, recipe, run.record_data) for role, path in checkpoints.items()}
    references = {role: Reference(path, dev[role], recipe) for role, path in checkpoints.items()}
    for name, error in absent.items():
        _leave_out(name, error)
    result = ExportResult(first=chosen[0].name)
    with run.stage("export") as work, cached_traces():
        work.result = result
        for choice in (*chosen, *further):
            try:
                result.targets[choice.name] = _export_target(choice, work, references, providers)
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
                result.refused[choice.name] = reason
        lacking = write_bundle(work.folder, checkpoints["student"], recipe, result)
        if lacking:
            console.warn(f"there is no bundle to serve: {lacking}")
    _raise_refused(result, recipe)
    return result


def _untried(choice: ChosenTarget, recipe: Recipe) -> str:
    """What to add to a refusal: how an optional target is not tried again."""
    if not choice.optional:
        return ""
    skipped = ", ".join(f'"{name}"' for name in (*recipe.export.skip, choice.name))
    return f"; it is optional, and --set 'export.skip=[{skipped}]' does without it"


def _raise_refused(result: ExportResult, recipe: Recipe) -> None:
    """Raise GateError if a demanded target of a finished stage was refused, with every reason."""
    refused = {name: reason for name, reason in result.refused.items() if name in recipe.export.targets}
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise GateError(
            f"not shipped: {reasons}",
            "everything else was exported, and the stage is done; `spdtool export --again` tries anew with other --set",
        )


def export_checkpoint(checkpoint: Path, name: str, folder: Path, recipe: Recipe, *, with_task: bool) -> ExportedModel:
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
    target = get_target(name)
    require_empty_folder(folder)
    providers = runtime.working_providers(recipe.device)
    if not checkpoint.is_dir():
        raise ModelError(f"there is no folder {checkpoint}", "give a folder with config.json and model.safetensors")
    dev = (
        prepare_dev_sets(checkpoint, recipe)
        if with_task
        else DevSets(None, {"dev": data.empty_split(load_tokenizer(checkpoint))})
    )
    shown = f"exporting {checkpoint} ({name}) and holding it against its checkpoint"
    with replacing(folder) as partial, console.busy(shown), cached_traces():
        exported = export_and_check(target, Reference(checkpoint, dev, recipe), partial, providers)
    _tell(str(folder), exported)
    return exported


def _export_target(
    choice: ChosenTarget, work: Stage, references: dict[str, Reference], providers: list[str]
) -> TargetExport:
    models = {}
    for role in choice.target.roles:
        folder = work.folder / choice.prefix / role
        with console.busy(f"exporting the {role} ({choice.name}) and holding it against its checkpoint"):
            models[role] = export_and_check(choice.target, references[role], folder, providers)
        _tell(f"{role} ({choice.name})" if choice.prefix else role, models[role])
    return TargetExport(student=models["student"], teacher=models.get("teacher"))


def _remove(choice: ChosenTarget, work: Stage) -> None:
    shutil.rmtree(work.folder / choice.prefix, ignore_errors=True)


def _leave_out(name: str, error: SpdError) -> None:
    console.warn(f"the export to {name} is left out: {error.message}{f' ({error.hint})' if error.hint else ''}")


def _tell(what: str, exported: ExportedModel) -> None:
    line = f"{console.escape(what)}: {console.format_cell(exported.bytes)} bytes, "
    line += f"{exported.sparsity:.2%} zeros as in its checkpoint; "
    if exported.dev is not None and not exported.rounds:
        line += f"dev {console.format_scores(exported.dev)}, {_flips(exported)}; "
    weights = " with the same rounded weights" if exported.rounds else ""
    console.say(f"{line}largest logit difference{weights} {exported.largest_difference:.1e}")
    if exported.fused:
        fused = ", ".join(f"{count} {operator}" for operator, count in exported.fused.items())
        console.say(f"  {exported.nodes} nodes, fused: {fused}")
    if exported.rounds:
        console.say(f"  weights in {exported.values}, embeddings in {exported.embeddings}: {_cost(exported)}")
    if len(exported.files) > 1 and not exported.rounds:
        console.warn(f"{what} is larger than one ONNX file can be: {', '.join(exported.files)}")


def _cost(exported: ExportedModel) -> str:
    """What the rounding costs on the dev set, in words."""
    if exported.dev is None or exported.checkpoint_dev is None:
        change = f"largest logit change on random tokens {exported.largest_change:.1e}"
        return f"{change}; no dev set was given to say what that costs (--task or --data)"
    before, after = exported.checkpoint_dev["score"], exported.dev["score"]
    change = f"largest logit change {exported.largest_change:.1e}"
    return f"dev score {before:.4f} before, {after:.4f} after; {_flips(exported)}; {change}"


def _flips(exported: ExportedModel) -> str:
    return f"{exported.flipped} of {exported.rows} predictions flipped"
