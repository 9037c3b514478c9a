"""Exported folders: found, refused, and never trusted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import ModelError, UnknownName
from spdtool.export.bundle.read import list_usable_variants, read_bundle


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
    found = read_bundle(folder)
    assert (found.folder, found.model) == (folder, folder / "onnx/model.onnx")
    assert (found.target, found.library) == ("sparse-cpu", {"version": "0.1.0"})


def test_a_folder_without_one(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    found = read_bundle(folder)
    assert (found.model, found.target, found.library) == (folder / "onnx/model.onnx", None, {})


def test_of_a_folder_of_roles_the_student(folder: Path) -> None:
    assert read_bundle(folder.parent).folder == folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 3}, "has the format 3; this spdtool reads 1 and 2"),
        ({"format": 2}, "files, variants and prefer do not fit together"),
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
        read_bundle(folder)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"{nope", b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match="manifest.json (cannot be read|holds no JSON object)"):
        read_bundle(folder)


def test_what_is_no_exported_folder_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        read_bundle(tmp_path / "none")
    with pytest.raises(ModelError, match="is no folder"):
        read_bundle(folder / "config.json")
    with pytest.raises(ModelError, match="has no config.json") as caught:
        read_bundle(tmp_path / "export")
    assert str(folder) in str(caught.value.hint)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no onnx/model.onnx") as caught:
        read_bundle(checkpoint)
    assert f"spdtool export --from '{checkpoint}'" in str(caught.value.hint)


class TestVariants:
    """A folder that holds several variants of one model."""

    @pytest.fixture
    def several(self, folder: Path) -> Path:
        for name in ("onnx/model_sparse.onnx", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text(name)
        self.write(folder)
        return folder

    def write(self, folder: Path, **changed: Any) -> None:
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        listed = {name: (folder / name).read_bytes() for name in names if name != "manifest.json"}
        manifest = {
            "format": 2,
            "model": "onnx/model.onnx",
            "prefer": {"cpu": ["sparse", "onnx"], "cuda": ["onnx"]},
            "variants": {
                "onnx": {"target": "onnx", "file": "onnx/model.onnx", "files": ["onnx/model.onnx"]},
                "sparse": {
                    "target": "sparse",
                    "file": "onnx/model_sparse.onnx",
                    "files": ["onnx/model_sparse.onnx"],
                    "library": {"file": "lib/x.so"},
                },
            },
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in listed.items()
            },
        }
        (folder / "manifest.json").write_text(json.dumps(manifest | changed))

    def test_the_best_comes_first_and_the_portable_one_is_what_read_gives(self, several: Path) -> None:
        assert [found.target for found in list_usable_variants(several)] == ["sparse", "onnx"]
        assert [found.target for found in list_usable_variants(several, provider="cuda")] == ["onnx"]
        assert [found.target for found in list_usable_variants(several, provider="web")] == ["onnx"]
        assert [found.model.name for found in list_usable_variants(several, "sparse")] == ["model_sparse.onnx"]
        found = read_bundle(several)
        assert (found.target, found.library, found.variants) == ("onnx", {}, ("onnx", "sparse"))
        assert next(list_usable_variants(several)).library == {"file": "lib/x.so"}

    def test_a_variant_that_is_not_there_is_told(self, several: Path) -> None:
        with pytest.raises(UnknownName, match="no variant 'spares'"):
            next(list_usable_variants(several, "spares"))
        write(several)
        with pytest.raises(UnknownName, match="no variant 'sparse'"):
            next(list_usable_variants(several, "sparse"))

    def test_only_what_is_opened_is_checked(self, several: Path) -> None:
        (several / "onnx/model_sparse.onnx").write_text("another, as long as")
        assert read_bundle(several).target == "onnx"
        with pytest.raises(ModelError, match=r"model_sparse.onnx (has|is damaged)"):
            next(list_usable_variants(several))
        (several / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"lacks tokenizer.json"):
            read_bundle(several)

    @pytest.mark.parametrize(
        "changed",
        [
            {"variants": {}},
            {"variants": []},
            {"variants": {"onnx": {"target": "onnx", "file": "gone.onnx", "files": []}}},
            {"variants": {"onnx": {"target": 3, "file": "onnx/model.onnx", "files": []}}},
            {"model": "onnx/other.onnx"},
            {"prefer": {"cpu": ["other"]}},
            {"prefer": {"cpu": []}},
            {"prefer": None},
            {"files": {"onnx/model.onnx": {}}},
        ],
    )
    def test_a_manifest_whose_parts_do_not_fit_is_refused(self, changed: dict[str, Any], several: Path) -> None:
        self.write(several, **changed)
        with pytest.raises(ModelError, match="do not fit together"):
            read_bundle(several)
