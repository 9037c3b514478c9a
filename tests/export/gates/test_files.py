"""The gate on files beside the model: what other clients than spdtool read is the checkpoint's, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from faults import Fault, edit_json

from spdtool.data import tokens as data
from spdtool.errors import GateError
from spdtool.export.bundle.manifest import digest_files, write_manifest
from spdtool.export.gates.files import check_files, check_manifest
from spdtool.export.gates.reference import DevSets, Reference
from spdtool.export.graph.trace import save_folder
from spdtool.export.target import MODEL_FILE, get_target
from spdtool.models.load import load_tokenizer, save_model
from spdtool.run.records import FolderManifest

CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture
def reference(tmp_path: Path, toys: ModuleType) -> Reference:
    """A checkpoint, and beside it the folder `out` with everything but a graph."""
    save_model(toys.bert(), toys.tokenizer(), tmp_path / "checkpoint")
    save_folder(onnx.ModelProto(), tmp_path / "checkpoint", tmp_path / "out")
    rows = data.empty_split(load_tokenizer(tmp_path / "checkpoint"))
    return Reference(tmp_path / "checkpoint", DevSets(None, {"dev": rows}), toys.recipe())


def add_file(name: str) -> Fault:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    return plant


def test_files_that_say_something_else_are_refused_and_so_are_stray_ones(reference: Reference, tmp_path: Path) -> None:
    target, intact = get_target("onnx"), tmp_path / "out"
    (intact / "notes.txt").write_text("what a target adds for itself")
    # the reference's tokenizer has cut texts since it was loaded
    reference.tokenizer("good " * 99, truncation=True, max_length=8)
    check_files(target, reference, intact, [intact / MODEL_FILE])
    faults: dict[str, tuple[Fault, str]] = {
        "weights in half precision": (
            edit_json("config.json", lambda config: config.update(dtype="float16")),
            "config.json: dtype is 'float16'; the checkpoint has 'float32'",
        ),
        "another tokenizer class": (
            edit_json("tokenizer_config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast")),
            "tokenizer_config.json: tokenizer_class",
        ),
        "a space before words": (
            edit_json("tokenizer_config.json", lambda config: config.update(add_prefix_space=True)),
            "tokenizer_config.json: add_prefix_space is 'True'",
        ),
        "left cutting": (edit_json("tokenizer.json", lambda tokenizer: tokenizer.update(truncation=CUT)), "truncation"),
        "no configuration": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        "no JSON": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "cannot be read"),
    }
    for name in (
        *(
            "vocab.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "generation_config.json",
            "quantize_config.json",
        ),
        *("model.safetensors", "pytorch_model.bin", "model.onnx", "onnx/model_quantized.onnx", "onnx/model.onnx_data"),
        *("adapter_config.json", "adapter_model.safetensors", "modeling_custom.py", "chat_template.jinja"),
    ):
        faults[f"a stray {name}"] = (add_file(name), f"has {name}, which is not of this export")
    for title, (plant, message) in faults.items():
        folder = shutil.copytree(intact, tmp_path / "faulty")
        plant(folder)
        with pytest.raises(GateError, match=message):
            check_files(target, reference, folder, [folder / MODEL_FILE])
        shutil.rmtree(folder)
        assert title


def test_a_manifest_that_describes_something_else_is_refused(reference: Reference, tmp_path: Path) -> None:
    target, folder = get_target("onnx"), tmp_path / "out"
    manifest = FolderManifest(target="onnx", values="fp32", embeddings="fp32", files=digest_files(folder))

    def check(change: Callable[[], dict[str, object]]) -> None:
        write_manifest(folder, manifest.model_copy(update=change()))
        check_manifest(target, reference, folder, [folder / MODEL_FILE], "cpu")

    check(dict)
    files = manifest.files
    digest = files["config.json"].model_copy(update={"sha256": "0" * 64})
    faults: dict[str, object] = {
        "target": "onnx-int8",
        "model": "onnx/other.onnx",
        "kind": "regression",
        "text": ["sentence"],
        "settings": {"temperature": 2.0},
        "values": "fp16",
        "embeddings": "int8",
        "files": files | {"config.json": digest},
    }
    for field, value in faults.items():
        with pytest.raises(GateError, match=r"manifest.json (has the|does not have the size and sha256 of config)"):
            check(lambda: {field: value})  # noqa: B023
    without = {name: digest for name, digest in files.items() if name != "tokenizer.json"}
    with pytest.raises(GateError, match=r"sha256 of tokenizer\.json"):
        check(lambda: {"files": without})
