"""Opening exported folders: valid ones, damaged ones, and ones without a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import ModelError, UnknownName
from spdtool.export.bundle.manifest import digest_files, read_manifest, seal
from spdtool.export.bundle.read import list_usable_variants, longest_input, read_bundle, read_golden_examples
from spdtool.run.records import LibraryRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder with a manifest and a dummy model file, which no test opens."""
    folder = tmp_path / "export/sparse-cpu/student"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "onnx/model.onnx").write_bytes(b"123")
    write_folder_manifest(folder)
    return folder


def write_folder_manifest(folder: Path, **changes: Any) -> None:
    manifest = {
        "format": 1,
        "target": "sparse-cpu",
        "model": "onnx/model.onnx",
        "library": {"version": "0.1.0"},
        "files": listed_files(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(seal(manifest | changes)))


def listed_files(folder: Path) -> dict[str, Any]:
    return {name: digest.model_dump() for name, digest in digest_files(folder).items()}


def test_a_folder_with_a_manifest_is_read_by_it(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert (bundle.folder, bundle.model) == (folder, folder / "onnx/model.onnx")
    assert (bundle.target, bundle.library) == ("sparse-cpu", LibraryRecord(version="0.1.0"))


def test_a_folder_without_a_manifest_is_opened_only_on_request(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"has no manifest.json: nothing says whether") as error:
        read_bundle(folder)
    assert "--unverified" in str(error.value.hint)
    bundle = read_bundle(folder, unverified=True)
    assert (bundle.model, bundle.target, bundle.library) == (folder / "onnx/model.onnx", None, None)


def test_a_folder_of_roles_stands_for_its_student(folder: Path) -> None:
    assert read_bundle(folder.parent).folder == folder


def test_a_manifest_that_cannot_be_used_is_refused(folder: Path) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"format": 3}, "has the format 3; this spdtool reads 1 and 2"),
        ({"format": 2}, "files, variants and prefer do not fit together"),
        ({"format": None}, "has the format None"),
        ({"format": True}, "has the format True"),
        ({"format": 1.0}, "has the format 1.0"),
        ({"model": "onnx/\0.onnx"}, "names a file outside its folder"),
        ({"files": {}}, "lacks config.json, or its manifest.json says nothing of it"),
        ({"text": []}, "text is of the wrong type"),
        ({"model": "../../../model.onnx"}, "names a file outside its folder"),
        ({"model": "/etc/passwd"}, "names a file outside its folder"),
        ({"model": "onnx/gone.onnx"}, "has no onnx/gone.onnx"),
        ({"model": 3}, "model is of the wrong type"),
        ({"target": ["x"]}, "target is of the wrong type"),
        ({"target": None}, "names a library and no target"),
        ({"library": "lib.so"}, "library is of the wrong type"),
        ({"files": {"onnx/model.onnx": 3}}, "files is of the wrong type"),
        ({"files": listed_files(folder) | {"onnx/model.onnx": {"bytes": 4, "sha256": ""}}}, "has 3 bytes; manifest"),
        (
            {"files": listed_files(folder) | {"onnx/model.onnx": {"bytes": 3, "sha256": ""}}},
            "or was changed: its sha256",
        ),
    ]
    for changes, message in faults:
        write_folder_manifest(folder, **changes)
        with pytest.raises(ModelError, match=message) as error:
            read_bundle(folder)
        assert error.value.hint, message


def test_a_manifest_with_a_wrong_digest_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_bundle(folder).target == "sparse-cpu", "only the layout changed"
    for changes in ({"target": "onnx"}, {"digest": "0"}, {"more": 1}):
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(ModelError, match="its digest is not that of its fields"):
            read_bundle(folder)


def test_a_file_that_transformers_would_read_may_not_be_added(folder: Path) -> None:
    (folder / "notes.txt").write_text("harmless")
    (folder / "README.md").write_text("edited")
    assert read_bundle(folder).target == "sparse-cpu"
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
        with pytest.raises(ModelError, match=f"lacks {name}, or its manifest.json says nothing of it"):
            read_bundle(folder)
        (folder / name).unlink()


def test_a_manifest_that_is_no_json_object_is_refused(folder: Path) -> None:
    twice = (folder / "manifest.json").read_bytes().rstrip()[:-1] + b', "format": 1}'
    for content in (b"{nope", b"[1]", b"\xff\xfe", b"", b"[" * 100_000, twice, b'{"format": NaN}'):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(ModelError, match="manifest.json (cannot be read|holds no JSON object)"):
            read_bundle(folder)


def test_a_folder_that_was_not_exported_is_refused_with_advice(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", folder / "config.json"):
        with pytest.raises(ModelError, match="is no folder"):
            read_bundle(path)
    with pytest.raises(ModelError, match="has no config.json") as error:
        read_bundle(tmp_path / "export")
    assert str(folder) in str(error.value.hint)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no onnx/model.onnx") as error:
        read_bundle(checkpoint)
    assert f"spdtool export --from '{checkpoint}'" in str(error.value.hint)


def test_damaged_golden_examples_are_refused_by_position(tmp_path: Path) -> None:
    row = {"text": "a", "pair": None, "input_ids": [2, 3], "logits": [0.5]}
    padding = {"side": "right", "input_ids": 0, "token_type_ids": 0}
    golden = {"format": 1, "max_length": 8, "padding": padding, "labels": ["x"], "rows": [row]}
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    assert read_golden_examples(tmp_path).rows[0].token_type_ids is None
    (tmp_path / "golden.json").write_text(json.dumps(golden | {"rows": [row | {"logits": "high"}]}))
    with pytest.raises(ModelError, match=r"golden.json is damaged: rows.0.logits"):
        read_golden_examples(tmp_path)


def test_the_longest_input_follows_tokenizer_and_positions() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {}, 512),
        ({"max_position_embeddings": 64}, {}, 64),
        ({"max_position_embeddings": 64}, {"model_max_length": 32}, 32),
        ({"max_position_embeddings": 64}, {"model_max_length": 10**30}, 64),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, {}, 512),
        ({"max_position_embeddings": 513, "model_type": "roberta"}, {}, 512),
        ({"max_position_embeddings": 0}, {"model_max_length": None}, 512),
    ]
    for config, tokenizer_config, expected in cases:
        assert longest_input(config, tokenizer_config) == expected, (config, tokenizer_config)


class TestVariants:
    """A folder with several variants of one model."""

    @pytest.fixture
    def bundle_folder(self, folder: Path) -> Path:
        for name in ("onnx/model_sparse.onnx", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text(name)
        self.write(folder)
        return folder

    def write(self, folder: Path, **changes: Any) -> None:
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
            "files": listed_files(folder),
        }
        (folder / "manifest.json").write_text(json.dumps(seal(manifest | changes)))

    def test_the_preferred_variant_comes_first_and_read_bundle_gives_the_portable_one(
        self, bundle_folder: Path
    ) -> None:
        assert [bundle.target for bundle in list_usable_variants(bundle_folder)] == ["sparse", "onnx"]
        for provider in ("cuda", "web"):
            assert [bundle.target for bundle in list_usable_variants(bundle_folder, provider=provider)] == ["onnx"]
        (sparse,) = list_usable_variants(bundle_folder, "sparse")
        assert (sparse.model.name, sparse.library) == ("model_sparse.onnx", LibraryRecord(file="lib/x.so"))
        portable = read_bundle(bundle_folder)
        assert (portable.target, portable.library, portable.variants) == ("onnx", None, ("onnx", "sparse"))

    def test_a_variant_that_is_not_there_is_an_unknown_name(self, bundle_folder: Path) -> None:
        with pytest.raises(UnknownName, match="no variant 'spares'"):
            next(list_usable_variants(bundle_folder, "spares"))
        write_folder_manifest(bundle_folder)
        with pytest.raises(UnknownName, match="no variant 'sparse'"):
            next(list_usable_variants(bundle_folder, "sparse"))

    def test_only_the_files_of_the_opened_variant_are_checked(self, bundle_folder: Path) -> None:
        (bundle_folder / "onnx/model_sparse.onnx").write_text("another, as long as")
        assert read_bundle(bundle_folder).target == "onnx"
        with pytest.raises(ModelError, match=r"model_sparse.onnx (has|is damaged)"):
            next(list_usable_variants(bundle_folder))
        (bundle_folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"lacks tokenizer.json"):
            read_bundle(bundle_folder)

    def test_a_manifest_that_contradicts_itself_is_refused(self, bundle_folder: Path) -> None:
        onnx = {"target": "onnx", "file": "onnx/model.onnx", "files": []}
        faults: list[dict[str, Any]] = [
            {"variants": {}},
            {"variants": []},
            {"variants": {"onnx": onnx | {"file": "gone.onnx"}}},
            {"variants": {"onnx": onnx | {"files": ["gone.onnx"]}}},
            {"variants": {"onnx": onnx | {"target": 3}}},
            {"model": "onnx/other.onnx"},
            {"prefer": {"cpu": ["other"]}},
            {"prefer": {"cpu": []}},
            {"prefer": None},
            {"files": {"onnx/model.onnx": {}}},
            {"text": []},
            {"text": ["a", "b", "c"]},
            {"text": "ab"},
            {"text": [1]},
            {"text": None},
        ]
        for changes in faults:
            self.write(bundle_folder, **changes)
            with pytest.raises(ModelError, match="do not fit together"):
                read_manifest(bundle_folder)
            with pytest.raises(ModelError, match="do not fit together"):
                read_bundle(bundle_folder)

    def test_a_folder_can_be_moved(self, bundle_folder: Path, tmp_path: Path) -> None:
        moved = Path(shutil.move(bundle_folder, tmp_path / "moved"))
        assert read_manifest(moved).model == "onnx/model.onnx"
        assert read_bundle(moved).text is None, "an older bundle does not say"
