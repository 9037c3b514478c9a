"""`spdtool export --layout`: write the bundle of a run in the form that a server or a hub expects.

    hub      the bundle as it is, and .gitattributes, so that large files go to the hub's storage
    triton   a model repository of NVIDIA Triton: the tokenizer (Python backend), the model
             (onnxruntime backend) and an ensemble of the two that takes texts and gives logits, or vectors

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spdtool.errors import ModelError, StageMissing, UnknownName
from spdtool.export.bundle.manifest import MANIFEST, read_json_object, read_manifest
from spdtool.export.bundle.read import read_golden_examples
from spdtool.export.bundle.unpack import require_empty_folder
from spdtool.export.bundle.write import BUNDLE_FOLDER, PORTABLE_TARGET
from spdtool.run.folder import Run
from spdtool.run.records import BundleManifest, Variant
from spdtool.run.storage import replacing
from spdtool.tasks.head import read_head
from spdtool.tasks.sentence_settings import read_prompt

LARGE_FILES = ("*.onnx", "*.onnx_data", "*.so", "*.dylib", "*.dll")
MAX_BATCH = 64  # rows
MAX_DELAY = 2000  # microseconds that Triton's batcher waits for more rows
TOKENIZER = "triton_tokenizer.py"
ON_CPU = "instance_group [ { count: 1 kind: KIND_CPU } ]"
ON_GPU = """# On a GPU this is the CUDA provider, as was measured. TensorRT is not turned on: it rounds in another way,
# and builds its engine again for every new range of lengths. To try it:
# optimization { execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] } }
instance_group [ { count: 1 kind: KIND_GPU } ]"""


class WrittenLayout(NamedTuple):
    """A layout that was written; files are relative to the folder."""

    folder: str
    layout: str
    files: list[str]


class TensorSpec(NamedTuple):
    """An input or output in a Triton configuration; `dims` are those after the batch."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = False


def write_layout(run: Run, layout: str, folder: Path) -> WrittenLayout:
    """Write the bundle of a run in a layout.

    Raises:
        UnknownName: there is no such layout.
        StageMissing, Corrupt: the run has no finished export, or it was altered.
        ModelError: the export has no bundle, or the layout cannot hold its kind of model.
        RunError: `folder` holds something already.
    """
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    require_empty_folder(folder)
    bundle = run.use_input("export") / BUNDLE_FOLDER
    if not (bundle / MANIFEST).is_file():
        raise StageMissing(f"the export of {run.path} has no bundle", f"spdtool export --run {run.path} --again")
    with replacing(folder) as partial:  # a server may watch the folder: it appears whole
        partial.mkdir()
        LAYOUTS[layout](bundle, partial, run.recipe.device, _model_name(folder))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return WrittenLayout(str(folder), layout, files)


def write_hub_layout(bundle: Path, folder: Path, _device: str, _name: str) -> None:
    """Write a repository of the Hugging Face hub."""
    shutil.copytree(bundle, folder, dirs_exist_ok=True)
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES]
    (folder / ".gitattributes").write_text("".join(lines), "utf-8")


def write_triton_layout(bundle: Path, folder: Path, device: str, name: str) -> None:
    """Write a Triton model repository of three models: `name`, `name_tokenizer`, `name_model`.

    On a GPU the model is the fp16 variant, if it has run there; else the portable one. A library of
    custom operators would have to be built for the onnxruntime inside of Triton.
    """
    head = read_head(bundle)
    if head.per_token:
        raise ModelError(
            f"the layout triton gives one output for a text, and this is {head.about}",
            "serve the bundle with spdtool serve, or write the layout hub",
        )
    manifest, golden = read_manifest(bundle), read_golden_examples(bundle)
    assert isinstance(manifest, BundleManifest), "write_layout was given a bundle"
    on_gpu = device == "cuda"
    variant = manifest.variants[PORTABLE_TARGET]
    if on_gpu:
        variant = manifest.variants[manifest.prefer["cuda"][0]]
    inputs = _model_inputs(bundle / variant.file)
    text_inputs = _text_inputs(manifest.text)

    ensemble, tokenizer, model = (folder / f"{name}{suffix}" for suffix in ("", "_tokenizer", "_model"))
    for model_folder in (ensemble, tokenizer, model):
        (model_folder / "1").mkdir(parents=True)
    (ensemble / "1/.keep").touch()  # an ensemble has no file, and Triton wants its version to be a folder
    label_file = ""
    if not head.pools:
        label_file = "labels.txt"
        (ensemble / label_file).write_text("\n".join(golden.labels) + "\n", "utf-8")
    _copy_model(bundle, variant, model / "1")
    shutil.copyfile(Path(__file__).with_name(TOKENIZER), tokenizer / "1/model.py")
    shutil.copyfile(bundle / "tokenizer.json", tokenizer / "1/tokenizer.json")
    settings = {
        "max_length": golden.max_length,
        "truncation_side": read_json_object(bundle / "tokenizer_config.json").get("truncation_side", "right"),
        "padding": golden.padding.model_dump(mode="json"),
        "inputs": inputs,
        "texts": text_inputs,
        "prompt": read_prompt(bundle),
    }
    (tokenizer / "1/settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    # further outputs of the file, such as the vectors of tokens, are not asked for
    output = TensorSpec(head.outputs[0], "TYPE_FP32", [len(golden.labels)])
    configurations = triton_configurations(name, inputs, output, text_inputs, label_file=label_file, gpu=on_gpu)
    for suffix, text in configurations.items():
        (folder / f"{name}{suffix}" / "config.pbtxt").write_text(text, "utf-8")


def triton_configurations(
    name: str,
    inputs: list[str],
    output: TensorSpec,
    text_inputs: Mapping[str, bool],
    *,
    label_file: str,
    gpu: bool,
) -> dict[str, str]:
    """Render config.pbtxt of the three models, by the suffix of their names.

    Args:
        inputs: of the model.
        output: of the model.
        text_inputs: input of the tokenizer to whether it may be left out.
        label_file: with the name of each number of the output; empty: they have none.
    """
    texts = [TensorSpec(text, "TYPE_STRING", [1], optional) for text, optional in text_inputs.items()]
    ids = [TensorSpec(each, "TYPE_INT64", [-1]) for each in inputs]
    ensemble = [
        *_header(name, 'platform: "ensemble"'),
        _tensors("input", texts),
        _tensors("output", [output], label_file),
        _ensemble_steps(name, inputs, list(text_inputs), output.name),
    ]
    tokenizer = [
        *_header(f"{name}_tokenizer", 'backend: "python"'),
        _tensors("input", texts),
        _tensors("output", ids),
        ON_CPU,
    ]
    instances = ON_CPU
    if gpu:
        instances = ON_GPU
    model = [
        *_header(f"{name}_model", 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"'),
        _tensors("input", ids),
        _tensors("output", [output]),
        f"dynamic_batching {{\n  preferred_batch_size: [ 8, 16, 32 ]\n  max_queue_delay_microseconds: {MAX_DELAY}\n}}",
        instances,
    ]
    texts_by_suffix = {"": ensemble, "_tokenizer": tokenizer, "_model": model}
    return {suffix: "\n".join(sections) + "\n" for suffix, sections in texts_by_suffix.items()}


def _copy_model(bundle: Path, variant: Variant, folder: Path) -> None:
    """Copy the model as Triton calls it; a second file keeps its name, which the first one holds."""
    shutil.copyfile(bundle / variant.file, folder / "model.onnx")
    for name in variant.files:
        if name != variant.file:
            shutil.copyfile(bundle / name, folder / Path(name).name)


def _header(name: str, kind: str) -> list[str]:
    return [f'name: "{name}"', kind, f"max_batch_size: {MAX_BATCH}"]


def _tensors(field: str, tensors: list[TensorSpec], label_file: str = "") -> str:
    """Render the inputs or outputs of a configuration."""
    entries = []
    for tensor in tensors:
        attributes = f'name: "{tensor.name}" data_type: {tensor.data_type} dims: {tensor.dims}'
        if tensor.optional:
            attributes += " optional: true"
        if label_file:
            attributes += f' label_filename: "{label_file}"'
        entries.append(f"  {{ {attributes} }}")
    return f"{field} [\n" + ",\n".join(entries) + "\n]"


def _text_inputs(columns: Sequence[str] | None) -> dict[str, bool]:
    """Map each text that is accepted to whether it may be left out."""
    if columns is None:  # an older bundle does not say whether its model reads pairs
        return {"TEXT": False, "PAIR": True}
    if len(columns) == 1:
        return {"TEXT": False}
    return {"TEXT": False, "PAIR": False}


def _ensemble_steps(name: str, inputs: list[str], texts: list[str], output: str) -> str:
    ids = {each: each for each in inputs}
    tokenize = _ensemble_step(f"{name}_tokenizer", {text: text for text in texts}, ids)
    compute = _ensemble_step(f"{name}_model", ids, {output: output})
    return f"ensemble_scheduling {{\n  step [\n{tokenize},\n{compute}\n  ]\n}}"


def _ensemble_step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    lines = [f'      model_name: "{model}"', "      model_version: -1"]
    for field, tensors in (("input_map", inputs), ("output_map", outputs)):
        for key, value in tensors.items():
            lines.append(f'      {field} {{ key: "{key}" value: "{value}" }}')
    return "    {\n" + "\n".join(lines) + "\n    }"


def _model_inputs(model: Path) -> list[str]:
    """List the inputs of an ONNX file, in order."""
    import onnx

    try:
        return [value.name for value in onnx.load(model, load_external_data=False).graph.input]
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ModelError(f"{model} cannot be read: {error}", "export again") from None


def _model_name(folder: Path) -> str:
    """Name the model after the folder, in letters, digits, dashes and underscores."""
    letters = []
    for letter in folder.resolve().name:
        allowed = letter.isalnum() or letter in "-_"
        letters.append(letter if allowed else "_")
    return "".join(letters)


LAYOUTS: dict[str, Callable[[Path, Path, str, str], None]] = {
    "hub": write_hub_layout,
    "triton": write_triton_layout,
}
