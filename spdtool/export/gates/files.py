"""The gate on files beside the model: each says what the checkpoint says, none is missing, and nothing else is there.

What transformers and `spdtool.load` make of them is compared in `folder`. Other clients read more: the class of the
tokenizer, how it was left cutting and padding, weights or adapters that lie there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from spdtool.errors import GateError
from spdtool.export.bundle.manifest import digest_files, read_manifest
from spdtool.export.bundle.read import TOKENIZER_FILES
from spdtool.export.gates.reference import Reference
from spdtool.export.target import Target
from spdtool.models.sentence import sentence_settings
from spdtool.run.records import FolderManifest, LibraryRecord

CONFIG = "config.json"
# Where a model was saved and by what: no client computes anything else because of them.
PROVENANCE = ("_name_or_path", "transformers_version")
# What clients of Hugging Face look for in a folder; anything else that a target writes is its own.
FILES_OF_CLIENTS = (
    *TOKENIZER_FILES,
    *("*.onnx", "*.onnx_data", "*.onnx.data", "*.ort", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5"),
    *("*.msgpack", "*.gguf", "*.index.json", "*.py", "*.jinja", "adapter_*", "*_config.json", "config*.json"),
)


def check_files(target: Target, reference: Reference, folder: Path, files: Sequence[Path]) -> None:
    """Compare every file beside the model with what the checkpoint's model and tokenizer save.

    Args:
        files: that hold the model.

    Raises:
        GateError: names the file, and what of it differs.
    """
    expected = reference.metadata
    for name, content in sorted(expected.items()):
        if not (folder / name).is_file():
            raise GateError(f"the exported folder lacks {name}")
        changed_fields = (*PROVENANCE, *target.changed_fields) if name == CONFIG else ()
        _compare_file(folder / name, content, changed_fields)
    settings = sentence_settings(reference.model)
    listed = {*expected, *(file.relative_to(folder).as_posix() for file in files)}
    if settings is not None:
        listed |= dict(settings.files).keys()
    library = target.library_record(folder)
    if library is not None:
        listed.add(library["file"])
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        is_read = any(fnmatch(name, pattern) or fnmatch(file.name, pattern) for pattern in FILES_OF_CLIENTS)
        if file.is_file() and name not in listed and is_read:
            raise GateError(f"the exported folder has {name}, which is not of this export, and clients read it")


def check_manifest(target: Target, reference: Reference, folder: Path, files: Sequence[Path], provider: str) -> None:
    """Compare manifest.json with what it describes: target, model, library, formats, files, and what was scored.

    Answers on dev rows do not show everything: a threshold may move between two logits.

    Args:
        files: that hold the model.
        provider: of which the settings of the kind of task are.

    Raises:
        GateError: names the field.
    """
    manifest = read_manifest(folder)
    assert isinstance(manifest, FolderManifest), "it was just written"
    task, library = reference.dev.task, target.library_record(folder)
    formats = target.storage_formats(reference.recipe)
    expected: dict[str, object] = {
        "target": target.name,
        "model": files[0].relative_to(folder).as_posix(),
        "library": None if library is None else LibraryRecord.model_validate(library),
        "kind": None if task is None else task.dataset.kind,
        "text": None if task is None else list(task.dataset.text),
        "settings": reference.kind_settings(provider) or None,
        "values": formats.matrices,
        "embeddings": formats.embeddings,
    }
    for name, wanted in expected.items():
        value = getattr(manifest, name)
        if value != wanted:
            raise GateError(f"manifest.json has the {name} {value!r}; what was exported has {wanted!r}")
    digests = digest_files(folder)
    for name in sorted(digests.keys() | manifest.files.keys()):
        if digests.get(name) != manifest.files.get(name):
            raise GateError(f"manifest.json does not have the size and sha256 of {name}")


def _compare_file(exported: Path, expected: bytes, changed_fields: Sequence[str]) -> None:
    """Raise GateError where a file differs in anything but these fields; of JSON the order is free."""
    content = exported.read_bytes()
    if content == expected:
        return
    if exported.suffix != ".json":
        raise GateError(f"{exported.name} of the exported folder is not the checkpoint's")
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise GateError(f"{exported.name} of the exported folder cannot be read: {error}") from None
    wanted = json.loads(expected)
    if not isinstance(fields, dict) or not isinstance(wanted, dict):
        fields, wanted = {"content": fields}, {"content": wanted}
    for name in sorted(fields.keys() | wanted.keys()):
        if name not in changed_fields and fields.get(name) != wanted.get(name):
            shown = f"{str(fields.get(name))[:60]!r}; the checkpoint has {str(wanted.get(name))[:60]!r}"
            raise GateError(f"{exported.name}: {name} is {shown}")
