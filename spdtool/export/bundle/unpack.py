"""`spdtool unpack`: turn an exported folder back into a checkpoint, if its target keeps the weights."""

from __future__ import annotations

from pathlib import Path

from spdtool.errors import ModelError, RunError
from spdtool.export.bundle.read import read_bundle
from spdtool.export.target import get_target
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
        raise ModelError(
            f"{bundle.model} lacks {len(missing)} of the weights of the model that its config.json describes, "
            f"among them {missing[0]}",
            "copy the folder again",
        )
    with replacing(out) as partial:
        save_model(model, load_tokenizer(bundle.folder), partial)
    return bundle.folder


def require_empty_folder(out: Path) -> None:
    """Raise RunError if `out` is anything but an empty folder or nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder", "give another one")
