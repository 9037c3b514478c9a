"""`spdtool export`: write teacher and student as files for a runtime, each checked by the gates.

Reads: `teacher` and `finetune`. Writes: `export/teacher` and `export/student`, each a folder that
Hugging Face clients open; the same under `export/NAME` for every further target; and
`export/bundle`, the servable folder. Every file passes the gates on weights, logits and score: see
`export.gates`. Test rows are scored here, once.

A further target whose files a gate refuses is not shipped. The others are, the stage counts as
done, and stage.json keeps the reason under `refused`. If the target was required
(`export.targets`), the command ends with exit code 3; if it was optional (`export.optional`), with
a warning.

Each target is committed to the stage's hidden folder when it is finished. After a kill, a full disk
or an error the same command takes it over: see `export.finished`.

`spdtool export --from CHECKPOINT` does the same to any checkpoint, without a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from spdtool import console
from spdtool.data import tokens as data
from spdtool.errors import DeviceError, GateError, ModelError, PluginError, SpdError
from spdtool.export import onnx_session
from spdtool.export.bundle.unpack import require_empty_folder
from spdtool.export.bundle.write import write_bundle
from spdtool.export.finished import FinishedTargets, target_folders
from spdtool.export.gates.bundle import check_bundle
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.reference import DevSets, Reference, prepare_dev_sets
from spdtool.export.graph.trace import cached_traces
from spdtool.export.quality import measure_quality
from spdtool.export.refusals import raise_if_refused
from spdtool.export.target import ChosenTarget, get_target, optional_targets, required_targets
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_tokenizer
from spdtool.pruning.recognise import recognise_zeros
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run
from spdtool.run.records import ExportedModel, ExportResult, Role, TargetExport, describe_prediction_change
from spdtool.run.storage import replacing


def export(run: Run) -> ExportResult:
    """Export teacher and student of `run` for each target of the recipe.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        RunMismatch: the rows have changed since the earlier stages read them.
        UnknownName, DataError, DeviceError: the target, the data or the runtime cannot be used.
        GateError: the first target's file differs from its checkpoint, and the stage is not done; or a
            further required target's does, and everything else is written.
        Stopped: by Ctrl-C, and some targets are finished.
    """
    recipe = run.recipe
    required = required_targets(recipe.export)
    optional, unusable = optional_targets(recipe)
    providers = onnx_session.working_providers(recipe.device)
    # Both stages are read before any rows: the rows must be those of either.
    checkpoints: dict[Role, Path] = {"teacher": run.use_input("teacher"), "student": run.use_input("finetune")}
    teacher_dev = prepare_dev_sets(checkpoints["teacher"], recipe, run.record_data)
    student_dev = prepare_dev_sets(checkpoints["student"], recipe, run.record_data, teacher_dev)
    references: dict[Role, Reference] = {
        "teacher": Reference(checkpoints["teacher"], teacher_dev, recipe),
        "student": Reference(checkpoints["student"], student_dev, recipe),
    }
    for name, error in unusable.items():
        _warn_left_out(name, error)

    result = ExportResult(first=required[0].name)
    finished = FinishedTargets(run, [*required, *optional], providers)
    # Tracing takes most of an export, and most targets begin with the same graph.
    with finished.reported(), run.stage("export", finished.restore) as stage, cached_traces():
        stage.result = result
        _export_targets(finished, references, stage.folder, providers, result)
        _compare_bytes(result)
        with console.busy("measuring probabilities and, where there are any, test rows"):
            result.quality = measure_quality(references, recipe, providers[-1])
        if result.quality.final is not None:
            for name, text in result.quality.final.lines():
                console.say(console.escape(f"{name}: {text}"))
        obstacle = write_bundle(stage.folder, checkpoints["student"], recipe, result)
        if obstacle:
            console.warn(f"there is no bundle to serve: {obstacle}")
        else:
            check_bundle(stage.folder, result)
    # After the stage was committed: what passed the gates is there, whatever was refused.
    raise_if_refused(result, run)
    return result


def export_checkpoint(checkpoint: Path, name: str, folder: Path, recipe: Recipe, *, with_task: bool) -> ExportedModel:
    """Export a checkpoint that belongs to no run to `folder`.

    Args:
        name: of the target.
        with_task: compare on the dev set of the recipe's task too, not only on random tokens.

    Raises:
        UnknownName, PluginError: the target cannot be used.
        ModelError: the checkpoint cannot be read, or is no classifier.
        RunError: `folder` holds something already.
        RecipeError: the target is calibrated on rows of a task, and there is none.
        DataError, DeviceError: the data or the runtime cannot be used.
        GateError: the exported file differs from its checkpoint; nothing is written.
    """
    target = get_target(name)
    require_empty_folder(folder)
    providers = onnx_session.working_providers(recipe.device)
    if not checkpoint.is_dir():
        raise ModelError(f"there is no folder {checkpoint}", "give a folder with config.json and model.safetensors")
    if with_task:
        dev = prepare_dev_sets(checkpoint, recipe)
    else:
        # Without rows only the logits of random tokens are compared.
        dev = DevSets(None, {"dev": data.empty_split(load_tokenizer(checkpoint))})

    status = f"exporting {checkpoint} ({name}) and holding it against its checkpoint"
    reference = Reference(checkpoint, dev, recipe)
    with replacing(folder) as partial, console.busy(status), cached_traces():
        exported = export_and_check(target, reference, partial, providers)
    _print_exported(str(folder), exported)
    zeros = recognise_zeros(find_prunable_weights(reference.model).values())
    if zeros is not None:
        console.say(f"  zeros of the checkpoint: {zeros}")
    return exported


def _export_targets(
    finished: FinishedTargets,
    references: Mapping[Role, Reference],
    stage_folder: Path,
    providers: list[str],
    result: ExportResult,
) -> None:
    """Export for every target that is not finished; record the files of each, or why they are not shipped."""
    recipe = references["student"].recipe
    for number, choice in enumerate(finished.chosen, start=1):
        outcome = finished.find(choice.name)
        if outcome is not None:
            verb = "exported and checked" if isinstance(outcome, TargetExport) else "refused"
            console.say(console.escape(f"{choice.name}: {verb} before this command was stopped; taken over"))
        else:
            position = f"target {number} of {len(finished.chosen)}: {choice.name}"
            try:
                outcome = _export_or_refuse(choice, references, stage_folder, providers, position)
                if not isinstance(outcome, TargetExport):
                    _remove_target(stage_folder, choice)
                if outcome is not None:
                    finished.save(choice, outcome)
            except BaseException:  # a full disk gets its space back
                _remove_target(stage_folder, choice)
                raise
        if isinstance(outcome, TargetExport):
            result.targets[choice.name] = outcome
        elif outcome is not None:
            result.refused[choice.name] = outcome
            _warn_refused(choice, outcome, recipe)


def _remove_target(stage_folder: Path, choice: ChosenTarget) -> None:
    for folder in target_folders(stage_folder, choice):
        shutil.rmtree(folder, ignore_errors=True)


def _export_or_refuse(
    chosen: ChosenTarget,
    references: Mapping[Role, Reference],
    stage_folder: Path,
    providers: list[str],
    position: str,
) -> TargetExport | str | None:
    """Export teacher and student for one target; return the reason if a gate refuses it.

    Args:
        position: which of all targets it is, for the status line.

    Returns:
        None, if the target is optional and cannot be used on this machine.
    """
    try:
        return _export_roles(chosen, references, stage_folder / chosen.prefix, providers, position)
    except (DeviceError, ModelError, PluginError) as error:
        if not chosen.optional:
            raise
        _warn_left_out(chosen.name, error)
        return None
    except GateError as error:
        if not chosen.prefix:  # without the first target there is nothing to compare with, nor to serve
            raise
        return _describe_error(error)


def _export_roles(
    chosen: ChosenTarget, references: Mapping[Role, Reference], folder: Path, providers: list[str], position: str
) -> TargetExport:
    models = {}
    for role in chosen.target.roles:
        with console.busy(f"{position}: exporting the {role} and holding it against its checkpoint"):
            models[role] = export_and_check(chosen.target, references[role], folder / role, providers)
        title: str = role
        if chosen.prefix:
            title = f"{role} ({chosen.name})"
        _print_exported(title, models[role])
    return TargetExport(student=models["student"], teacher=models.get("teacher"))


def _compare_bytes(result: ExportResult) -> None:
    """Name the smallest student: zeros that are left out do not always make it that of the sparse target."""
    sizes = {name: exported.student.bytes for name, exported in result.targets.items()}
    if len(sizes) > 1:
        smallest_first = sorted(sizes, key=lambda name: sizes[name])
        listed = ", ".join(f"{console.escape(name)} {sizes[name]:,}" for name in smallest_first)
        console.say(f"bytes of the student, the smallest first: {listed}")


def _warn_refused(chosen: ChosenTarget, reason: str, recipe: Recipe) -> None:
    message = f"{chosen.name} is not shipped: {reason}"
    if chosen.optional:
        skipped = ", ".join(f'"{name}"' for name in (*recipe.export.skip, chosen.name))
        message += f"; it is optional, and --set 'export.skip=[{skipped}]' does without it"
    console.warn(message)


def _warn_left_out(name: str, error: SpdError) -> None:
    console.warn(f"the export to {name} is left out: {_describe_error(error)}")


def _describe_error(error: SpdError) -> str:
    if error.hint:
        return f"{error.message} ({error.hint})"
    return error.message


def _print_exported(title: str, exported: ExportedModel) -> None:
    line = f"{console.escape(title)}: {console.format_cell(exported.bytes)} bytes, "
    line += f"{exported.sparsity:.2%} zeros as in its checkpoint; "
    difference = "largest logit difference"
    if exported.rounds:
        difference += " with the same rounded weights"
    elif exported.dev is not None:
        line += f"dev {console.format_scores(exported.dev)}, {_describe_flips(exported)}; "
    console.say(f"{line}{difference} {exported.largest_difference:.1e}")
    if exported.fused:
        fused = ", ".join(f"{count} {operator}" for operator, count in exported.fused.items())
        console.say(f"  {exported.nodes} nodes, fused: {fused}")
    if exported.rounds:
        cost = _describe_cost(exported)
        console.say(f"  weights in {exported.values}, embeddings in {exported.embeddings}: {cost}")
    elif len(exported.files) > 1:  # protobuf holds 2 GB at most, and not every client finds a second file
        console.warn(f"{title} is larger than one ONNX file can be: {', '.join(exported.files)}")


def _describe_cost(exported: ExportedModel) -> str:
    """Say what rounding costs on the dev set."""
    change = f"{exported.largest_change:.1e}"
    if exported.dev is None or exported.checkpoint_dev is None:
        return (
            f"largest logit change on random tokens {change}; "
            "no dev set was given to say what that costs (--task or --data)"
        )
    before, after = exported.checkpoint_dev["score"], exported.dev["score"]
    flips = _describe_flips(exported)
    return f"dev score {before:.4f} before, {after:.4f} after; {flips}; largest logit change {change}"


def _describe_flips(exported: ExportedModel) -> str:
    change = (exported.flipped, exported.rows, exported.mean_change, exported.rank_correlation)
    return describe_prediction_change(*change)
