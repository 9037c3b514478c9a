"""`spdtool export --layout`: the bundle of a run in the form that a server or a hub expects.

    hub      the bundle as it is, and .gitattributes, so that large files go to the hub's storage
    triton   a model repository of NVIDIA Triton: the tokenizer (Python backend), the model (onnxruntime backend) and
             an ensemble of the two that takes texts and gives logits

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spdtool.errors import ModelError, StageMissing, UnknownName
from spdtool.export.bundle.read import MANIFEST, read_json_object, read_manifest
from spdtool.export.bundle.unpack import require_empty_folder
from spdtool.export.bundle.write import BUNDLE_FOLDER, GOLDEN_FILE, PORTABLE_TARGET
from spdtool.run.folder import Run, replacing

LARGE = ("*.onnx", "*.onnx_data", "*.so", "*.dylib", "*.dll")
BATCH, DELAY = 64, 2000  # rows; microseconds that the batcher waits for more
TOKENIZER = "triton_tokenizer.py"
CPU = "instance_group [ { count: 1 kind: KIND_CPU } ]"
GPU = """# On a GPU this is the CUDA provider, as was measured. TensorRT is not turned on: it rounds in another way,
# and builds its engine again for every new range of lengths. To try it:
# optimization { execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] } }
instance_group [ { count: 1 kind: KIND_GPU } ]"""


def write_layout(run: Run, layout: str, folder: Path) -> dict[str, Any]:
    """Write the bundle of a run in a layout; return what was written.

    Raises:
        UnknownName: there is no such layout.
        StageMissing, Corrupt: the run has no finished export, or it was altered.
        ModelError: the export has no bundle.
        RunError: `folder` holds something already.
    """
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    require_empty_folder(folder)
    source = run.read("export") / BUNDLE_FOLDER
    if not (source / MANIFEST).is_file():
        raise StageMissing(f"the export of {run.path} has no bundle", f"spdtool export --run {run.path} --again")
    with replacing(folder) as partial:
        partial.mkdir()
        LAYOUTS[layout](source, partial, run.recipe.device, _name(folder))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {"folder": str(folder), "layout": layout, "files": files}


def write_hub_layout(source: Path, folder: Path, _device: str, _name: str) -> None:
    """The bundle as a repository of the Hugging Face hub."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE]
    (folder / ".gitattributes").write_text("".join(lines), "utf-8")


def write_triton_layout(source: Path, folder: Path, device: str, name: str) -> None:
    """The bundle as a Triton model repository of three models: `name`, `name_tokenizer`, `name_model`.

    On a GPU the fp16 variant is taken, where it was seen to run there; else the portable one: a library of custom
    operators would have to be built for the onnxruntime inside of Triton.
    """
    said, golden = read_manifest(source), read_json_object(source / GOLDEN_FILE)
    gpu = device == "cuda"
    chosen = said["variants"][said["prefer"]["cuda"][0]] if gpu else said["variants"][PORTABLE_TARGET]
    inputs = _inputs(source / chosen["file"])
    labels = golden["labels"]
    texts = _texts(said.get("text"))
    version = {part: folder / f"{name}{part}" / "1" for part in ("", "_tokenizer", "_model")}
    for place in version.values():
        place.mkdir(parents=True)
    (version[""] / ".keep").touch()  # an ensemble has no file, and Triton wants its version to be a folder
    shutil.copyfile(source / chosen["file"], version["_model"] / "model.onnx")
    for further in chosen["files"]:
        if further != chosen["file"]:
            shutil.copyfile(source / further, version["_model"] / Path(further).name)
    shutil.copyfile(Path(__file__).with_name(TOKENIZER), version["_tokenizer"] / "model.py")
    shutil.copyfile(source / "tokenizer.json", version["_tokenizer"] / "tokenizer.json")
    tokens = read_json_object(source / "tokenizer_config.json")
    settings = {
        "max_length": golden["max_length"],
        "truncation_side": tokens.get("truncation_side", "right"),
        "padding": golden["padding"],
        "inputs": inputs,
        "texts": texts,
    }
    (version["_tokenizer"] / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (version[""].parent / "labels.txt").write_text("\n".join(labels) + "\n", "utf-8")
    for part, text in triton_configurations(name, inputs, len(labels), texts, gpu=gpu).items():
        (folder / f"{name}{part}" / "config.pbtxt").write_text(text, "utf-8")


def triton_configurations(
    name: str, inputs: list[str], labels: int, texts: Mapping[str, bool], *, gpu: bool
) -> dict[str, str]:
    """By suffix of the model's name, the text of its config.pbtxt.

    Args:
        texts: input of the tokenizer to whether it may be left out.
    """
    taken = _tensors("input", [(each, "TYPE_STRING", [1], optional) for each, optional in texts.items()])
    ids = [(each, "TYPE_INT64", [-1], False) for each in inputs]
    logits = _tensors("output", [("logits", "TYPE_FP32", [labels], False)], "labels.txt")
    plain = _tensors("output", [("logits", "TYPE_FP32", [labels], False)])
    batching = (
        f"dynamic_batching {{\n  preferred_batch_size: [ 8, 16, 32 ]\n  max_queue_delay_microseconds: {DELAY}\n}}"
    )
    return {
        "": _file(_head(name, 'platform: "ensemble"'), taken, logits, _steps(name, inputs, list(texts))),
        "_tokenizer": _file(_head(f"{name}_tokenizer", 'backend: "python"'), taken, _tensors("output", ids), CPU),
        "_model": _file(
            _head(f"{name}_model", 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"'),
            _tensors("input", ids),
            plain,
            batching,
            GPU if gpu else CPU,
        ),
    }


def _head(name: str, kind: str) -> str:
    return f'name: "{name}"\n{kind}\nmax_batch_size: {BATCH}'


def _file(*parts: str) -> str:
    return "\n".join(parts) + "\n"


def _tensors(field: str, tensors: list[tuple[str, str, list[int], bool]], labels: str = "") -> str:
    """The inputs or outputs of a configuration: name, type, dimensions after the batch, whether it may be left out."""
    written = []
    for name, kind, dims, optional in tensors:
        further = " optional: true" if optional else ""
        further += f' label_filename: "{labels}"' if labels else ""
        written.append(f'  {{ name: "{name}" data_type: {kind} dims: {dims}{further} }}')
    return f"{field} [\n" + ",\n".join(written) + "\n]"


def _texts(columns: Sequence[str] | None) -> dict[str, bool]:
    """The texts that are taken, and whether each may be left out; a bundle that does not say may be of pairs."""
    return {"TEXT": False} if columns and len(columns) == 1 else {"TEXT": False, "PAIR": columns is None}


def _steps(name: str, inputs: list[str], texts: list[str]) -> str:
    def step(model: str, taken: Mapping[str, str], given: Mapping[str, str]) -> str:
        maps = [("input_map", taken), ("output_map", given)]
        lines = [
            f'      {field} {{ key: "{key}" value: "{value}" }}'
            for field, pairs in maps
            for key, value in pairs.items()
        ]
        return f'    {{\n      model_name: "{model}"\n      model_version: -1\n' + "\n".join(lines) + "\n    }"

    ids = {each: each for each in inputs}
    first = step(f"{name}_tokenizer", {each: each for each in texts}, ids)
    second = step(f"{name}_model", ids, {"logits": "logits"})
    return f"ensemble_scheduling {{\n  step [\n{first},\n{second}\n  ]\n}}"


def _inputs(model: Path) -> list[str]:
    """The inputs of an ONNX file, in order."""
    import onnx

    try:
        return [value.name for value in onnx.load(model, load_external_data=False).graph.input]
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ModelError(f"{model} cannot be read: {error}", "export again") from None


def _name(folder: Path) -> str:
    """A model's name, made of the folder's: letters, digits, dashes and underscores."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in folder.resolve().name)


LAYOUTS: dict[str, Callable[[Path, Path, str, str], None]] = {"hub": write_hub_layout, "triton": write_triton_layout}
