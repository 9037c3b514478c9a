"""manifest.json of an exported folder: the target, the model file, and the sha256 of every file.

The export stage writes it last into every folder. Format 1 describes a folder of one model, format
2 a bundle with variants: see `FolderManifest` and `BundleManifest` in `run.records`. `digest` is a
hash of all other fields, so that a damaged manifest is told from a sound one. It is no signature:
whoever changes a folder on purpose can write another digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import JsonValue, ValidationError

from spdtool.errors import ModelError
from spdtool.run.fingerprint import hash_json, sha256
from spdtool.run.records import BundleManifest, FileDigest, FolderManifest
from spdtool.run.storage import write_json

MANIFEST = "manifest.json"
CARD = "README.md"  # is there to be edited, so the manifest says nothing of it
DIGEST = "digest"
FOLDER_FORMAT = 1
BUNDLE_FORMAT = 2
COPY_AGAIN = "copy the folder again"


def digest_files(folder: Path) -> dict[str, FileDigest]:
    """Size and sha256 of every file that a manifest lists, by its path in the folder."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in (CARD, MANIFEST):
            digests[name] = FileDigest(bytes=file.stat().st_size, sha256=sha256(file))
    return digests


def write_manifest(folder: Path, manifest: FolderManifest | BundleManifest) -> None:
    """Write manifest.json with its digest."""
    write_json(folder / MANIFEST, seal(manifest.model_dump(mode="json", exclude_none=True)))


def seal(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Add the digest of the other fields."""
    unsealed = {name: value for name, value in fields.items() if name != DIGEST}
    return unsealed | {DIGEST: hash_json(unsealed)}


def read_manifest(folder: Path, *, unverified: bool = False) -> FolderManifest | BundleManifest:
    """Read manifest.json.

    Args:
        unverified: a folder may have none; then it holds one model at the usual place.

    Raises:
        ModelError: there is none, it is damaged, or newer than this spdtool.
    """
    file = folder / MANIFEST
    if not file.exists() and not file.is_symlink():
        if unverified:
            return FolderManifest()
        raise ModelError(
            f"{folder} has no {MANIFEST}: nothing says whether its files are as they were exported",
            "copy the folder again; what others exported is opened with --unverified, or load(..., unverified=True)",
        )
    fields = read_json_object(file)
    version = fields.get("format")
    if type(version) is not int or version not in (FOLDER_FORMAT, BUNDLE_FORMAT):  # True is no 1
        hint = f"it is damaged: {COPY_AGAIN}"
        if type(version) is int:
            hint = "install a newer spdtool"
        raise ModelError(
            f"{file} has the format {version!r}; this spdtool reads {FOLDER_FORMAT} and {BUNDLE_FORMAT}", hint
        )
    if fields != seal(fields):
        raise ModelError(f"{file} is damaged or was changed: its digest is not that of its fields", COPY_AGAIN)
    del fields[DIGEST]
    if version == BUNDLE_FORMAT:
        try:  # strictly: a number in place of a text is damage, not a text
            return BundleManifest.model_validate(fields, strict=True)
        except ValidationError:
            message = f"{file} is damaged: files, variants and prefer do not fit together"
            raise ModelError(message, COPY_AGAIN) from None
    if fields.get("library") and not fields.get("target"):
        raise ModelError(f"{file} names a library and no target that needs it", "export it again")
    try:
        return FolderManifest.model_validate(fields, strict=True)
    except ValidationError as error:
        wrong = ", ".join(dict.fromkeys(str((*problem["loc"], "a field")[0]) for problem in error.errors()))
        raise ModelError(f"{file} is damaged: {wrong} is of the wrong type", "export it again") from None


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names.

    Raises:
        ModelError: it lies outside the folder, or is no name of a file.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ModelError(f"{folder / MANIFEST} names a file outside its folder: {name!r}", "do not use this folder")
    return folder / path


def read_json_object(file: Path) -> dict[str, JsonValue]:
    """Read the object in a JSON file.

    Raises:
        ModelError: the file cannot be read, holds something else, or says one thing twice.
    """
    try:
        value = json.loads(file.read_text("utf-8"), object_pairs_hook=unique_fields, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}", COPY_AGAIN) from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object", COPY_AGAIN)
    return value


def unique_fields(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """Make an object of JSON; raise ValueError for a key that stands there twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):  # readers differ in which of the two they take
        raise ValueError("a key stands twice in one object")
    return fields


def _refuse_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON number")
