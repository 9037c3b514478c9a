"""`spdtool unpack`: turn an exported folder back into a checkpoint, if its target keeps the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from spdtool.errors import ModelError, RunError
from spdtool.export.bundle.read import read_bundle
from spdtool.export.target import get_target
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import build_empty_model, fill_weights, load_tokenizer, save_model
from spdtool.run.storage import replacing


def unpack_checkpoint(folder: Path, out: Path) -> Path:
    """Write an exported folder to `out` as config, tokenizer and `model.safetensors`; return its path.

    The weights are those of the files: the checkpoint's to the last bit where they are stored as
    fp32, else rounded.

    Raises:
        ModelError: it is no exported folder, its target does not keep the weights, or its files are
            damaged.
        UnknownName: the plugin with its target is not installed.
        RunError: `out` holds something already.
    """
    bundle = read_bundle(folder)
    require_empty_folder(out)
    target = get_target(bundle.target or "onnx")
    if not target.rounds_weights:
        raise ModelError(
            f"{bundle.folder} was written by the target {target.name!r}, which cannot be unpacked",
            "the checkpoint of a run is in RUN/finetune",
        )
    model = build_empty_model(bundle.folder, finetuned=True, device="cpu", has_weights=False)
    # Weights that the file lacks would stay random: the checkpoint would open and answer nonsense.
    stored = target.stored_weights(bundle.folder)
    missing = fill_weights(model, ((name, array) for name, array, *_ in stored))
    if missing:
        refuse_emptied_layers(model, missing, bundle.model)
        raise ModelError(
            f"{bundle.model} lacks {len(missing)} of the weights of the model that its config.json describes, "
            f"among them {missing[0]}",
            "copy the folder again",
        )
    with replacing(out) as partial:
        save_model(model, load_tokenizer(bundle.folder), partial)
    return bundle.folder


def refuse_emptied_layers(model: PreTrainedModel, missing: Sequence[str], file: Path) -> None:
    """Raise ModelError if all that a file lacks are matrices of layers, whose heads or neurons were all removed.

    Such a layer leaves no constant in the graph on which its zeros could be noted.
    """
    pruned = {name.rpartition(".")[0] for name in find_prunable_weights(model)}
    lacking = {name.rpartition(".")[0] for name in missing}
    if lacking <= pruned:
        raise ModelError(
            f"{file} was written of a student with emptied layers: it stores nothing of {len(lacking)} matrices, such "
            f"as {sorted(lacking)[0]}, and does not say whether they were zero",
            "the checkpoint of a run is in RUN/finetune",
        )


def require_empty_folder(out: Path) -> None:
    """Raise RunError if `out` is anything but an empty folder or nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder", "give another one")
