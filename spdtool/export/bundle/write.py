"""The servable folder of a run: every variant of the student that passed its gates, and what a server needs beside.

    export/bundle/
      config.json  tokenizer.json  tokenizer_config.json
      onnx/model.onnx             portable; onnx/model_fp16.onnx, model_quantized.onnx, ...: the other variants
      lib/                        libraries of custom operators, for users of plain onnxruntime
      manifest.json               the variants, which to prefer on what, what each was measured to cost, every sha256,
                                  and the names of the one or two text columns
      golden.json                 sentences of the dev set with the logits of the checkpoint in torch
      selftest.py  README.md      replays golden.json on every variant; a model card

Names of the files are those by which transformers.js finds a `dtype`. Files are hard links to those of the stage where
the file system has them, else copies.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spdtool.data.dataset import find_dataset
from spdtool.errors import ModelError
from spdtool.export.bundle.card import render_card
from spdtool.export.bundle.read import MANIFEST, SHARED_FILES, STUDENT, longest_input, read_bundle, read_json_object
from spdtool.export.target import get_target, optional_names
from spdtool.models.load import label_names, load_model, load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import write_json
from spdtool.run.records import BundleManifest, ExportedModel, ExportResult, FileDigest, LibraryRecord, Variant
from spdtool.tasks import find_task

BUNDLE_FOLDER = "bundle"
PORTABLE_TARGET = "onnx"
GOLDEN_FILE, SELFTEST, CARD = "golden.json", "selftest.py", "README.md"
SENTENCES = 20
PREFERENCES = ("cpu", "cuda", "web")  # where a variant is preferred to the portable one
FACTS = (
    *("bytes", "sparsity", "providers", "dev", "checkpoint_dev", "flipped", "rows", "largest_difference"),
    *("largest_change", "values", "embeddings", "kept_fp32"),
)
TOLERANCE_FACTOR = 2.0  # times the largest change on the dev set: another machine rounds in another order


def write_bundle(export: Path, checkpoint: Path, recipe: Recipe, result: ExportResult) -> str | None:
    """Make `export/bundle` of the students that lie in `export`; return why there is none, or None.

    Args:
        export: the stage's folder, its targets written.
        checkpoint: the student's, from which the golden logits come.
        result: of the stage.
    """
    students = _students(export, recipe, result)
    if PORTABLE_TARGET not in students:
        return f"the target {PORTABLE_TARGET!r} was not exported, which every client can open"
    if not (students[PORTABLE_TARGET][0] / "tokenizer.json").is_file():
        return "the tokenizer has no tokenizer.json, which clients without transformers need"
    folder = export / BUNDLE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    variants = {}
    for name, (source, measured) in students.items():
        if (
            len(measured.files) == 1 or name == PORTABLE_TARGET
        ):  # a second file is found by the name that the first holds
            variants[name] = _variant(folder, name, source, measured, recipe)
    for name in SHARED_FILES:
        if (students[PORTABLE_TARGET][0] / name).is_file():
            _link(students[PORTABLE_TARGET][0] / name, folder / name)
    write_json(folder / GOLDEN_FILE, make_golden_examples(checkpoint, folder, recipe))
    shutil.copyfile(Path(__file__).with_name(SELFTEST), folder / SELFTEST)
    (folder / CARD).write_text(render_card(recipe, variants, read_json_object(folder / "config.json")), "utf-8")
    write_json(folder / MANIFEST, _manifest(folder, variants, recipe).model_dump(mode="json", exclude_none=True))
    return None


def make_golden_examples(checkpoint: Path, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Sentences of the dev set as the checkpoint sees them: text, token ids, logits in float32, computed row by row."""
    rows = find_task(recipe).read_rows(recipe)["dev"]
    picked = rows.select(range(0, len(rows), max(1, len(rows) // SENTENCES))[:SENTENCES])
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, eager=True)
    config, tokenizer_config = (read_json_object(folder / name) for name in ("config.json", "tokenizer_config.json"))
    limit = longest_input(config, tokenizer_config)
    seconds: list[Any] = picked.second or [None] * len(picked)
    return {
        "format": 1,
        "max_length": limit,
        "padding": {
            "side": tokenizer.padding_side,
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
        },
        "labels": label_names(model),
        "rows": [_row(model, tokenizer, *texts, limit) for texts in zip(picked.first, seconds, strict=True)],
    }


def _row(model: Any, tokenizer: Any, text: str, pair: str | None, limit: int) -> dict[str, Any]:
    encoded = tokenizer(text, pair, truncation=True, max_length=limit, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**encoded).logits[0].float()
    ids = {name: encoded[name][0].tolist() for name in ("input_ids", "token_type_ids") if name in encoded}
    return {"text": text, "pair": pair} | ids | {"logits": logits.tolist()}


def _students(export: Path, recipe: Recipe, result: ExportResult) -> dict[str, tuple[Path, ExportedModel]]:
    """Target to the folder and the figures of its student, for every one that was written."""
    first = recipe.export.targets[0]
    found = {first: (export / STUDENT, result.student)}
    for name in (*recipe.export.targets[1:], *optional_names(recipe.export)):
        folder = export / name / STUDENT
        if name not in found and folder.is_dir() and name in result.targets:
            found[name] = (folder, result.targets[name].student)
    return found


def _variant(folder: Path, name: str, source: Path, measured: ExportedModel, recipe: Recipe) -> Variant:
    """Put one variant into the folder; return what the manifest says of it."""
    exported = read_bundle(source)
    stem = get_target(name).bundle_stem or f"model_{re.sub('[^a-z0-9]+', '_', name.lower())}"
    file = f"onnx/{stem}.onnx"
    _link(exported.model, folder / file)
    files = [file]
    for further in measured.files[1:]:
        _link(source / further, folder / further)
        files.append(further)
    variant = Variant(target=name, file=file, files=files, **measured.model_dump(include=set(FACTS)))
    if exported.library:
        library = exported.library["file"]
        _link(source / library, folder / library)
        variant.library = LibraryRecord.model_validate(exported.library)
        variant.hardware = f"cpu, {variant.library.platform}"
        files.append(library)
    variant.files = files
    moved = max(measured.largest_difference, measured.largest_change or 0.0)
    variant.tolerance = TOLERANCE_FACTOR * moved + recipe.export.tolerance
    return variant


def _manifest(folder: Path, variants: dict[str, Variant], recipe: Recipe) -> BundleManifest:
    listed = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)  # a card is edited
    prefer = {}
    for where in PREFERENCES:
        special = [name for name in variants if where in get_target(name).preferred_on]
        prefer[where] = [name for name in (*special, PORTABLE_TARGET) if _runs(variants[name], where)]
    return BundleManifest(
        spdtool=metadata.version("spdtool"),
        task=recipe.task,
        text=list(find_dataset(recipe).text),
        sparsity=recipe.sparsity,
        smoke=recipe.smoke,
        model=variants[PORTABLE_TARGET].file,
        prefer=prefer,
        variants=variants,
        files={
            file.relative_to(folder).as_posix(): FileDigest(bytes=file.stat().st_size, sha256=sha256(file))
            for file in listed
        },
    )


def _runs(variant: Variant, where: str) -> bool:
    """Whether a variant may be preferred there: rounded files on a GPU only where one was seen to run them."""
    return where != "cuda" or variant.target == PORTABLE_TARGET or "cuda" in variant.providers


def _link(source: Path, place: Path) -> None:
    if not source.is_file():
        raise ModelError(f"{source} is missing", "export again")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, place)
