"""Exported folders: found, refused, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import ModelError
from spdtool.export import bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder with a manifest; its model is no model, which nobody looks at here."""
    made = tmp_path / "export/sparse-cpu/student"
    (made / "onnx").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "onnx/model.onnx").write_bytes(b"123")
    write(made)
    return made


def write(folder: Path, **changed: Any) -> None:
    manifest = {
        "format": 1,
        "target": "sparse-cpu",
        "model": "onnx/model.onnx",
        "library": {"version": "0.1.0"},
        "files": {"onnx/model.onnx": {"bytes": 3}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changed))


def test_a_folder_with_a_manifest(folder: Path) -> None:
    found = bundle.read(folder)
    assert (found.folder, found.model) == (folder, folder / "onnx/model.onnx")
    assert (found.target, found.library) == ("sparse-cpu", {"version": "0.1.0"})


def test_a_folder_without_one(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    found = bundle.read(folder)
    assert (found.model, found.target, found.library) == (folder / "onnx/model.onnx", None, {})


def test_of_a_folder_of_roles_the_student(folder: Path) -> None:
    assert bundle.read(folder.parent).folder == folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "has the format 2; this spdtool reads 1"),
        ({"format": None}, "has the format None"),
        ({"model": "../../../model.onnx"}, "names a file outside its folder"),
        ({"model": "/etc/passwd"}, "names a file outside its folder"),
        ({"model": "onnx/gone.onnx"}, "has no onnx/gone.onnx"),
        ({"model": 3}, "model is of the wrong type"),
        ({"target": ["x"]}, "target is of the wrong type"),
        ({"target": None}, "names a library and no target"),
        ({"library": "lib.so"}, "library is of the wrong type"),
        ({"files": {"onnx/model.onnx": 3}}, "files is of the wrong type"),
        ({"files": {"onnx/model.onnx": {"bytes": 4}}}, "has 3 bytes; manifest.json says 4"),
        ({"files": {"onnx/model.onnx": {"bytes": 3, "sha256": 64 * "0"}}}, "is damaged or was changed: its sha256"),
    ],
)
def test_a_manifest_that_cannot_be_used(folder: Path, changed: dict[str, Any], message: str) -> None:
    write(folder, **changed)
    with pytest.raises(ModelError, match=message) as caught:
        bundle.read(folder)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"{nope", b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match="manifest.json (cannot be read|holds no JSON object)"):
        bundle.read(folder)


def test_what_is_no_exported_folder_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        bundle.read(tmp_path / "none")
    with pytest.raises(ModelError, match="is no folder"):
        bundle.read(folder / "config.json")
    with pytest.raises(ModelError, match="has no config.json") as caught:
        bundle.read(tmp_path / "export")
    assert str(folder) in str(caught.value.hint)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no onnx/model.onnx") as caught:
        bundle.read(checkpoint)
    assert f"spdtool export --from '{checkpoint}'" in str(caught.value.hint)
