"""An exported folder as it lies on a disk, opened without its target and without torch.

    config.json  tokenizer.json  tokenizer_config.json  onnx/model.onnx        every target
    manifest.json                                                              targets whose files say more
    onnx/model_*.onnx  lib/  golden.json  selftest.py  README.md               the servable folder of a run

manifest.json names the target, the model's file and, where the model needs custom operators, their library (format 1);
or the variants of one model, which to prefer on what, and under `text` the names of the one or two text columns that
it was trained on (format 2: see `assembly.py`; older ones do not say). It comes with the folder, perhaps from a
stranger: what it says is checked, and nothing in the folder is ever run because of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool.errors import ModelError, UnknownName
from spdtool.run.fingerprint import sha256

MANIFEST = "manifest.json"
FOLDER_FORMAT = 1
BUNDLE_FORMAT = 2  # the format of a manifest that names several
MODEL_FILE = "onnx/model.onnx"
SHARED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
STUDENT = "student"
NO_LIMIT = 10**9  # a tokenizer without a limit writes a number above this as its model_max_length
DEFAULT_LENGTH = 512  # where neither the tokenizer nor the model says how long an input may be
# Families whose first position comes after the padding token's number, so that fewer tokens fit than positions exist.
OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}


@dataclass(frozen=True)
class Bundle:
    """One exported folder.

    Attributes:
        folder: the folder itself, which holds config.json.
        model: its ONNX file.
        target: the export target that wrote it; None where there is no manifest.
        library: what the manifest says of the library of custom operators; empty where none is needed.
        variants: names of all variants of the model that the folder holds; empty where it holds one.
        text: names of the one or two text columns that it was trained on; None: the folder does not say.
    """

    folder: Path
    model: Path
    target: str | None
    library: Mapping[str, str]
    variants: tuple[str, ...] = ()
    text: tuple[str, ...] | None = None


def read_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, or in its `student`; of several variants, the portable one.

    Raises:
        ModelError: it is no exported folder; its manifest is damaged, or newer than this spdtool; a file is missing, or
            not the one that was exported.
    """
    folder, said = _open(folder)
    if said.get("format") == BUNDLE_FORMAT:
        portable = next(name for name, facts in said["variants"].items() if facts["file"] == said["model"])
        return _variant(folder, said, portable)
    model = _inside(folder, said.get("model", MODEL_FILE))
    _refuse_missing(folder, model)
    for name, facts in said.get("files", {}).items():
        file = _inside(folder, name)
        if file.is_file():
            _refuse_changed(file, facts)
    return Bundle(folder, model, said.get("target"), said.get("library") or {})


def list_usable_variants(folder: Path, variant: str | None = None, provider: str = "cpu") -> Iterator[Bundle]:
    """What `folder` offers on a provider, the best first; its files are checked when it is asked for.

    Args:
        variant: this one alone.

    Raises:
        UnknownName: there is no such variant.
        ModelError: as `read_bundle` does.
    """
    inside, said = _open(folder)
    if said.get("format") != BUNDLE_FORMAT:
        if variant is not None:
            raise UnknownName("variant", variant, (), f"{inside} holds one model only: leave the variant out")
        yield read_bundle(inside)
        return
    if variant is not None and variant not in said["variants"]:
        raise UnknownName("variant", variant, said["variants"])
    for name in [variant] if variant else said["prefer"].get(provider, [str(read_bundle(inside).target)]):
        yield _variant(inside, said, name)


def _variant(folder: Path, said: dict[str, Any], name: str) -> Bundle:
    """One variant, the files that it is made of checked; those of the others are not looked at."""
    facts = said["variants"][name]
    model = _inside(folder, facts["file"])
    _refuse_missing(folder, model)
    library = facts.get("library") or {}
    for listed in {*SHARED_FILES, *facts["files"]} - {
        library.get("file")
    }:  # the folder's library is not run: see `load`
        file = _inside(folder, listed)
        if file.is_file() != (listed in said["files"]):
            raise ModelError(f"{folder} lacks {listed}, or its {MANIFEST} says nothing of it", "copy the folder again")
        if file.is_file():
            _refuse_changed(file, said["files"][listed])
    text = tuple(said["text"]) if "text" in said else None
    return Bundle(folder, model, facts["target"], library, tuple(said["variants"]), text)


def _open(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The exported folder that `folder` is or has as its `student`, and its manifest; empty where it has none."""
    if not (folder / "config.json").is_file() and (folder / STUDENT / "config.json").is_file():
        folder = folder / STUDENT
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder", "give what `spdtool export` wrote, such as RUN/export/student")
    return folder, read_manifest(folder)


def _refuse_missing(folder: Path, model: Path) -> None:
    for file in (folder / "config.json", model):
        if not file.is_file():
            raise ModelError(
                f"{folder} is no exported folder: it has no {file.relative_to(folder)}", _hint(folder, model)
            )


def _refuse_changed(file: Path, facts: Mapping[str, Any]) -> None:
    """Raise ModelError if a file has other contents than the manifest says; a packed matrix alone would notice."""
    again = "copy the folder again, or export it again"
    found = file.stat().st_size
    if found != facts.get("bytes", found):
        raise ModelError(f"{file} has {found} bytes; {MANIFEST} says {facts['bytes']}", again)
    if "sha256" in facts and sha256(file) != facts["sha256"]:
        raise ModelError(f"{file} is damaged or was changed: its sha256 is not the one in {MANIFEST}", again)


def read_json_object(file: Path) -> dict[str, Any]:
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json of `folder` says; empty where there is none.

    Raises:
        ModelError: it is damaged, or newer than this spdtool.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    value = read_json_object(file)
    if value.get("format") == BUNDLE_FORMAT:
        return _with_variants(file, value)
    if value.get("format") != FOLDER_FORMAT:
        hint = (
            "install a newer spdtool"
            if isinstance(value.get("format"), int)
            else "it is damaged: copy the folder again"
        )
        raise ModelError(
            f"{file} has the format {value.get('format')!r}; this spdtool reads {FOLDER_FORMAT} and {BUNDLE_FORMAT}",
            hint,
        )
    kinds = {"target": str, "model": str, "library": dict, "files": dict}
    if value.get("library") and not value.get("target"):
        raise ModelError(f"{file} names a library and no target that needs it", "export it again")
    wrong = [name for name, kind in kinds.items() if not isinstance(value.get(name, kind()), kind)]
    if wrong or not all(isinstance(facts, dict) for facts in value.get("files", {}).values()):
        raise ModelError(f"{file} is damaged: {', '.join(wrong) or 'files'} is of the wrong type", "export it again")
    return value


def _with_variants(file: Path, value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of several variants, if everything in it that is used is of the type and refers to what it should."""
    try:
        files, variants = value["files"], value["variants"]
        sound = all(isinstance(facts["sha256"], str) and isinstance(facts["bytes"], int) for facts in files.values())
        for facts in variants.values():
            library = facts.get("library") or {}
            sound &= isinstance(facts["target"], str) and isinstance(library, dict) and facts["file"] in files
            sound &= all(name in files for name in facts["files"])
        sound &= value["model"] in [facts["file"] for facts in variants.values()]
        sound &= all(names and set(names) <= variants.keys() for names in value["prefer"].values())
        text = value.get("text", [""])
        sound &= isinstance(text, list) and len(text) in (1, 2) and all(isinstance(name, str) for name in text)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(f"{file} is damaged: files, variants and prefer do not fit together", "copy the folder again")
    return value


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / MANIFEST} names a file outside its folder: {name}", "do not use this folder")
    return file


def _hint(folder: Path, model: Path) -> str:
    inside = [path.parent.parent for depth in (1, 2, 3) for path in sorted(folder.glob(depth * "*/" + MODEL_FILE))]
    if inside:
        return f"give one of {', '.join(map(str, inside[:4]))}"
    if not model.is_file() and (folder / "config.json").is_file():
        return f"a checkpoint is exported by spdtool export --from '{folder}'; an export has to be copied again"
    return "give what `spdtool export` wrote, such as RUN/export/student"


def longest_input(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    """Longest input in tokens that both the tokenizer and the position embeddings allow."""
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in OFFSET_POSITIONS:
        positions -= (config.get("pad_token_id") or 0) + 1
    stated = [positions, tokenizer_config.get("model_max_length")]
    limits = [limit for limit in stated if limit and 0 < limit < NO_LIMIT]
    return int(min(limits, default=DEFAULT_LENGTH))
