"""An exported folder as it lies on a disk, opened without its target and without torch.

    config.json  tokenizer.json  tokenizer_config.json  onnx/model.onnx        every target
    manifest.json                                                              targets whose files say more

manifest.json names the target, the model's file and, where the model needs custom operators, their library. It comes
with the folder, perhaps from a stranger: what it says is checked, and nothing in the folder is ever run because of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool.errors import ModelError
from spdtool.run import sha256

MANIFEST = "manifest.json"
FORMAT = 1
MODEL = "onnx/model.onnx"
STUDENT = "student"


@dataclass(frozen=True)
class Bundle:
    """One exported folder.

    Attributes:
        folder: the folder itself, which holds config.json.
        model: its ONNX file.
        target: the export target that wrote it; None where there is no manifest.
        library: what the manifest says of the library of custom operators; empty where none is needed.
    """

    folder: Path
    model: Path
    target: str | None
    library: Mapping[str, str]


def read(folder: Path) -> Bundle:
    """The bundle in `folder`, or in its `student`.

    Raises:
        ModelError: it is no exported folder; its manifest is damaged, or newer than this spdtool; a file is missing, or
            not the one that was exported.
    """
    if not (folder / "config.json").is_file() and (folder / STUDENT / "config.json").is_file():
        folder = folder / STUDENT
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder", "give what `spdtool export` wrote, such as RUN/export/student")
    manifest = _manifest(folder / MANIFEST)
    model = _inside(folder, manifest.get("model", MODEL))
    for file in (folder / "config.json", model):
        if not file.is_file():
            raise ModelError(
                f"{folder} is no exported folder: it has no {file.relative_to(folder)}", _hint(folder, model)
            )
    for name, facts in manifest.get("files", {}).items():
        file = _inside(folder, name)
        if file.is_file():
            _refuse_changed(file, facts)
    return Bundle(folder, model, manifest.get("target"), manifest.get("library") or {})


def _refuse_changed(file: Path, facts: Mapping[str, Any]) -> None:
    """Raise ModelError if a file has other contents than the manifest says; a packed matrix alone would notice."""
    again = "copy the folder again, or export it again"
    found = file.stat().st_size
    if found != facts.get("bytes", found):
        raise ModelError(f"{file} has {found} bytes; {MANIFEST} says {facts['bytes']}", again)
    if "sha256" in facts and sha256(file) != facts["sha256"]:
        raise ModelError(f"{file} is damaged or was changed: its sha256 is not the one in {MANIFEST}", again)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "copy the folder again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object", "copy the folder again")
    return value


def _manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = read_json(file)
    if value.get("format") != FORMAT:
        hint = (
            "install a newer spdtool"
            if isinstance(value.get("format"), int)
            else "it is damaged: copy the folder again"
        )
        raise ModelError(f"{file} has the format {value.get('format')!r}; this spdtool reads {FORMAT}", hint)
    kinds = {"target": str, "model": str, "library": dict, "files": dict}
    if value.get("library") and not value.get("target"):
        raise ModelError(f"{file} names a library and no target that needs it", "export it again")
    wrong = [name for name, kind in kinds.items() if not isinstance(value.get(name, kind()), kind)]
    if wrong or not all(isinstance(facts, dict) for facts in value.get("files", {}).values()):
        raise ModelError(f"{file} is damaged: {', '.join(wrong) or 'files'} is of the wrong type", "export it again")
    return value


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / MANIFEST} names a file outside its folder: {name}", "do not use this folder")
    return file


def _hint(folder: Path, model: Path) -> str:
    inside = [path.parent.parent for depth in (1, 2, 3) for path in sorted(folder.glob(depth * "*/" + MODEL))]
    if inside:
        return f"give one of {', '.join(map(str, inside[:4]))}"
    if not model.is_file() and (folder / "config.json").is_file():
        return f"a checkpoint is exported by spdtool export --from '{folder}'; an export has to be copied again"
    return "give what `spdtool export` wrote, such as RUN/export/student"
