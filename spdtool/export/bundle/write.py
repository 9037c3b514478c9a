"""Write the bundle of a run: every variant of the student that passed its gates, and what a server needs beside them.

    export/bundle/
      config.json  tokenizer.json  tokenizer_config.json
      onnx/model.onnx             portable; onnx/model_fp16.onnx, model_quantized.onnx, ...: the other variants
      lib/                        libraries of custom operators, for users of plain onnxruntime
      manifest.json               the variants, which to prefer on what, what each was measured to cost, every sha256,
                                  and the names of the one or two text columns
      golden.json                 sentences of the dev set with the logits of the checkpoint in torch
      selftest.py  README.md      replays golden.json on every variant; a model card

By the names of the files transformers.js finds a `dtype`. Files are copies, so the bundle can be edited.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from transformers import BatchEncoding, PreTrainedModel

from spdtool import console
from spdtool.data.dataset import find_dataset
from spdtool.data.kinds.embedding import is_sentence_encoder
from spdtool.errors import ModelError
from spdtool.export.bundle.card import render_card
from spdtool.export.bundle.manifest import CARD, digest_files, read_json_object, write_manifest
from spdtool.export.bundle.read import (
    GOLDEN_FILE,
    SHARED_FILES,
    STUDENT,
    Bundle,
    longest_input,
    read_bundle,
)
from spdtool.export.target import get_target
from spdtool.models.load import label_names, load_model, load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.records import (
    BundleManifest,
    ExportedModel,
    ExportResult,
    GoldenExamples,
    GoldenRow,
    Padding,
    Variant,
)
from spdtool.run.storage import write_json
from spdtool.tasks.head import head_of_model
from spdtool.tasks.prepare import find_task
from spdtool.tasks.sentence_settings import read_sentence_settings

BUNDLE_FOLDER = "bundle"
PORTABLE_TARGET = "onnx"
SELFTEST = "selftest.py"
GOLDEN_ROWS = 20  # enough to see a fault, and tested in a second
HARDWARE = ("cpu", "cuda", "web")  # for each of them the manifest says which variants to prefer
TOLERANCE_FACTOR = 2.0  # times the largest change on the dev set: another machine rounds in another order
MEASURED_FIELDS = {
    "bytes",
    "sparsity",
    "providers",
    "dev",
    "checkpoint_dev",
    "flipped",
    "mean_change",
    "rank_correlation",
    "rows",
    "largest_difference",
    "largest_change",
    "values",
    "embeddings",
    "kept_fp32",
}


def write_bundle(export: Path, checkpoint: Path, recipe: Recipe, result: ExportResult) -> str | None:
    """Write `export/bundle` from the exported students; return why there cannot be one, or None.

    Args:
        export: the stage's folder, its targets written.
        checkpoint: the student's; it computes the golden logits.
        result: of the stage.
    """
    folders = student_folders(export, result)
    if PORTABLE_TARGET not in folders:
        return f"the target {PORTABLE_TARGET!r} was not exported, which every client can open"
    portable = folders[PORTABLE_TARGET]
    if not (portable / "tokenizer.json").is_file():
        return "the tokenizer has no tokenizer.json, which clients without transformers need"
    folder = export / BUNDLE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call

    variants = {}
    for name, source in folders.items():
        if get_target(name).opened_by != "onnxruntime":
            console.say(f"[dim]the bundle goes without {console.escape(name)}: spdtool.load does not open it[/]")
            continue
        exported = result.targets[name].student
        # A model's second file is found by the name that the first one holds, so only one such
        # model fits in a folder.
        if len(exported.files) == 1 or name == PORTABLE_TARGET:
            variants[name] = _copy_variant(folder, name, source, exported, recipe)
    for file_name in SHARED_FILES:
        if (portable / file_name).is_file():
            _copy(portable / file_name, folder / file_name)
    sentence = None
    if is_sentence_encoder(portable):
        sentence = read_sentence_settings(portable)
        sentence.write(folder)
    golden = make_golden_examples(checkpoint, folder, recipe)
    write_json(folder / GOLDEN_FILE, golden.model_dump(mode="json", exclude_defaults=True))
    shutil.copyfile(Path(__file__).with_name(SELFTEST), folder / SELFTEST)
    card = render_card(recipe, variants, read_json_object(folder / "config.json"), result.quality, sentence)
    (folder / CARD).write_text(card, "utf-8")
    # Last, because it holds the digests of all the others.
    write_manifest(folder, _make_manifest(folder, variants, recipe, read_bundle(portable)))
    return None


def make_golden_examples(checkpoint: Path, folder: Path, recipe: Recipe) -> GoldenExamples:
    """Compute the checkpoint's logits of some dev sentences, in float32 and row by row.

    Args:
        folder: the bundle, its config.json and tokenizer_config.json written.
    """
    task = find_task(recipe)
    rows = task.read_rows(recipe.without_unlabeled())["dev"]
    chosen = rows.select(range(0, len(rows), max(1, len(rows) // GOLDEN_ROWS))[:GOLDEN_ROWS])
    # Eager attention is what the files were exported with.
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, eager=True)
    config = read_json_object(folder / "config.json")
    max_length = longest_input(config, read_json_object(folder / "tokenizer_config.json"))
    golden_rows = []
    truncation = task.decision.truncation()
    for index, text in enumerate(chosen.first):
        pair = None
        if chosen.second:
            pair = chosen.second[index]
        encoded = tokenizer(text, pair, truncation=truncation, max_length=max_length, return_tensors="pt")
        golden_rows.append(_make_golden_row(model, encoded, text, pair))
    return GoldenExamples(
        format=1,
        max_length=max_length,
        padding=Padding.model_validate(
            {
                "side": tokenizer.padding_side,
                "input_ids": tokenizer.pad_token_id,
                "token_type_ids": tokenizer.pad_token_type_id,
            }
        ),
        truncation=truncation,
        labels=label_names(model),
        rows=golden_rows,
    )


def _make_golden_row(model: PreTrainedModel, encoded: BatchEncoding, text: str, pair: str | None) -> GoldenRow:
    with torch.inference_mode():
        logits = head_of_model(model).collect(model(**encoded), encoded)[0].float()
    token_type_ids = None
    if "token_type_ids" in encoded:
        token_type_ids = encoded["token_type_ids"][0].tolist()
    return GoldenRow(
        text=text,
        pair=pair,
        input_ids=encoded["input_ids"][0].tolist(),
        token_type_ids=token_type_ids,
        logits=logits.tolist(),
    )


def student_folders(export: Path, result: ExportResult) -> dict[str, Path]:
    """Map each target that exported a student to its folder; the first target has none of its own."""
    folders = {result.first: export / STUDENT}
    for name in result.further():
        folders[name] = export / name / STUDENT
    return folders


def _copy_variant(folder: Path, name: str, source: Path, exported: ExportedModel, recipe: Recipe) -> Variant:
    """Put the files of one variant into the bundle, and describe it."""
    bundle = read_bundle(source)
    model = f"onnx/{get_target(name).bundle_stem}.onnx"
    # A target that is derived from another one may have inherited its stem, and must not replace its file.
    if not get_target(name).bundle_stem or (folder / model).exists():
        model = f"onnx/model_{re.sub('[^a-z0-9]+', '_', name.lower())}.onnx"
    _copy(bundle.model, folder / model)
    files = [model, *exported.files[1:]]
    for file_name in exported.files[1:]:
        _copy(source / file_name, folder / file_name)
    hardware = "any"
    if bundle.library is not None:
        assert bundle.library.file is not None, "a target names the library that it wrote"
        hardware = f"cpu, {bundle.library.platform}"
        files.append(bundle.library.file)
        _copy(source / bundle.library.file, folder / bundle.library.file)
    # Rounding is meant to move logits: the self-test must allow for it.
    largest_change = max(exported.largest_difference, exported.largest_change or 0.0)
    return Variant(
        target=name,
        file=model,
        files=files,
        hardware=hardware,
        library=bundle.library,
        tolerance=TOLERANCE_FACTOR * largest_change + recipe.export.tolerance,
        **exported.model_dump(include=MEASURED_FIELDS),
    )


def _make_manifest(folder: Path, variants: dict[str, Variant], recipe: Recipe, portable: Bundle) -> BundleManifest:
    return BundleManifest(
        spdtool=metadata.version("spdtool"),
        task=recipe.task,
        text=list(find_dataset(recipe).text),
        kind=portable.kind,
        settings=dict(portable.settings) or None,
        sparsity=variants[PORTABLE_TARGET].sparsity,
        smoke=recipe.smoke,
        model=variants[PORTABLE_TARGET].file,
        prefer={hardware: order_variants(variants, hardware) for hardware in HARDWARE},
        variants=variants,
        files=digest_files(folder),
    )


def order_variants(variants: Mapping[str, Variant], hardware: str) -> list[str]:
    """Return the variants to prefer on some hardware, the best first; the portable one is the last resort."""
    names = [name for name in variants if hardware in get_target(name).preferred_on]
    names.sort(key=lambda name: -get_target(name).preference)
    return [name for name in (*names, PORTABLE_TARGET) if _runs_on(variants[name], hardware)]


def _runs_on(variant: Variant, hardware: str) -> bool:
    """Whether a variant may be preferred there; a GPU must have run it, or it is the portable one."""
    return hardware != "cuda" or variant.target == PORTABLE_TARGET or "cuda" in variant.providers


def _copy(source: Path, destination: Path) -> None:
    """Copy a file. Never a hard link: who edits the bundle would change what the stage recorded."""
    if not source.is_file():
        raise ModelError(f"{source} is missing", "export again")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
