"""The gate on a bundle: put together from what passed the gates, and nothing that it says is anything else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import GateError
from spdtool.export.bundle.manifest import digest_files, seal
from spdtool.export.gates.bundle import check_bundle
from spdtool.run.folder import Run
from spdtool.run.records import FileDigest

Change = Callable[[Path, dict[str, Any]], object]


def edit(name: str, **fields: Any) -> Change:
    def change(folder: Path, _manifest: dict[str, Any]) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(content | fields), "utf-8")

    return change


def claim(**fields: Any) -> Change:
    return lambda _folder, manifest: manifest.update(fields)


def measured(**fields: Any) -> Change:
    return lambda _folder, manifest: manifest["variants"]["onnx"].update(fields)


def use_teacher(folder: Path, _manifest: dict[str, Any]) -> None:
    shutil.copy(folder.parent / "teacher/onnx/model.onnx", folder / "onnx/model.onnx")


def forge_card(folder: Path, _manifest: dict[str, Any]) -> None:
    card = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(card.replace("50.00%", "95.00%"), "utf-8")


def forge_metadata(folder: Path, _manifest: dict[str, Any]) -> None:
    card = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(re.sub(r"value: [\d.]+", "value: 1.500000", card), "utf-8")


FAULTS: dict[str, tuple[Change, str]] = {
    "the teacher in place of the student": (use_teacher, "onnx/model.onnx of the bundle is not the file of onnx"),
    "labels swapped": (edit("config.json", id2label={"0": "b", "1": "a"}), "config.json of the bundle is not that"),
    "a short input": (edit("tokenizer_config.json", model_max_length=8), "tokenizer_config.json of the bundle"),
    "a stray tokenizer": (lambda folder, _: (folder / "vocab.txt").write_text("x"), "vocab.txt of the bundle"),
    "settings lost": (claim(settings=None), "has the settings None"),
    "another kind": (claim(kind="multilabel"), "has the kind 'multilabel'"),
    "another column": (claim(text=["other"]), r"has the text \['other'\]"),
    "more zeros": (claim(sparsity=0.95), "has the sparsity 0.95"),
    "more zeros of a variant": (measured(sparsity=0.95), "has the sparsity 0.95 for onnx"),
    "a better score": (measured(dev={"score": 1.5, "accuracy": 1.5}), r"has the dev .* for onnx"),
    "fewer bytes": (measured(bytes=1), "has the bytes 1 for onnx"),
    "another target": (measured(target="onnx-int8"), "names another target or library"),
    "a forged card": (forge_card, "README.md has no row with the figures of onnx"),
    "a forged score for the hub": (forge_metadata, "does not say what was measured: - type:"),
    "golden rows of other padding": (
        edit("golden.json", padding={"side": "left", "input_ids": 0, "token_type_ids": 0}),
        "golden.json has the side of padding True",
    ),
    "golden rows of other labels": (edit("golden.json", labels=["b", "a"]), "golden.json has the labels"),
    "golden rows of another length": (edit("golden.json", max_length=9), "golden.json has the longest input 9"),
}


def reseal(folder: Path, change: Change) -> None:
    """Change a bundle, and write its manifest as an exporter with that fault would."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(folder, manifest)
    digests: dict[str, FileDigest] = digest_files(folder)
    manifest["files"] = {name: digest.model_dump() for name, digest in digests.items()}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)), "utf-8")


@pytest.mark.slow  # a whole run, which other tests share
def test_a_bundle_that_is_not_what_passed_the_gates_is_refused(compressed: Path, tmp_path: Path) -> None:
    export, run = tmp_path / "export", Run.open(compressed)
    shutil.copytree(run.path / "export", export)
    check_bundle(export, run.export_result())
    for title, (change, message) in FAULTS.items():
        shutil.rmtree(export / "bundle")
        shutil.copytree(run.path / "export/bundle", export / "bundle")
        reseal(export / "bundle", change)
        with pytest.raises(GateError, match=message):
            check_bundle(export, run.export_result())
        assert title
    shutil.rmtree(export / "bundle")
    shutil.copytree(run.path / "export/bundle", export / "bundle")
    (export / "bundle/selftest.py").write_text("# another one")
    with pytest.raises(GateError, match=r"sha256 of selftest\.py"):
        check_bundle(export, run.export_result())
