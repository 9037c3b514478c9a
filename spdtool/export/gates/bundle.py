"""The gate on a bundle: its files are those that passed the other gates, and what it says of them is what was measured.

A bundle is put together from exported folders after these were checked. So each file is held against the folder that it
came from, and every number against the record of the export; at last each variant replays the golden examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from spdtool.errors import GateError
from spdtool.export.bundle import write
from spdtool.export.bundle.manifest import CARD, digest_files, read_manifest
from spdtool.export.bundle.read import SHARED_FILES, TOKENIZER_FILES, read_golden_examples
from spdtool.export.classifier import Classifier
from spdtool.export.load import load
from spdtool.export.token_rows import TokenRow
from spdtool.run.records import (
    BundleManifest,
    ExportedModel,
    ExportResult,
    FileDigest,
    FolderManifest,
    GoldenExamples,
    Variant,
)


def check_bundle(export: Path, result: ExportResult) -> None:
    """Compare the bundle with the folders from which it was put together and with their record, and replay its rows.

    Args:
        export: the stage's folder, its bundle written.
        result: of the stage.

    Raises:
        GateError: names the file, field or variant that differs.
    """
    folder, manifest = export / write.BUNDLE_FOLDER, read_manifest(export / write.BUNDLE_FOLDER)
    assert isinstance(manifest, BundleManifest), "it was just written"
    digests = digest_files(folder)
    for name in sorted(digests.keys() | manifest.files.keys()):
        if digests.get(name) != manifest.files.get(name):
            raise GateError(f"the bundle's manifest does not have the size and sha256 of {name}")
    sources = write.student_folders(export, result)
    portable = _read_folder_manifest(sources[write.PORTABLE_TARGET])
    _check_shared_files(manifest, portable)
    card = (folder / CARD).read_text("utf-8")
    for name, variant in manifest.variants.items():
        _check_variant_files(name, variant, _read_folder_manifest(sources[name]), digests)
        _check_figures(name, variant, result.targets[name].student)
        _check_table(name, variant, card)
    _check_card(manifest.variants[write.PORTABLE_TARGET], result, card)
    selftest = Path(write.__file__).with_name(write.SELFTEST)
    if (folder / write.SELFTEST).read_bytes() != selftest.read_bytes():
        raise GateError(f"{write.SELFTEST} of the bundle is not that of this spdtool")
    _check_claims(manifest, portable, result.targets[write.PORTABLE_TARGET].student)
    replay_golden_examples(folder, manifest, read_golden_examples(folder))


def replay_golden_examples(folder: Path, manifest: BundleManifest, golden: GoldenExamples) -> None:
    """Open every variant that runs on a CPU, and compare labels, tokens and logits with the golden examples.

    Raises:
        GateError: names the variant whose labels, tokens or logits are not the checkpoint's.
    """
    first = [row.text for row in golden.rows]
    second = [row.pair for row in golden.rows if row.pair is not None] or None
    for name, variant in manifest.variants.items():
        if "cpu" not in variant.providers:
            continue
        classifier = load(folder, variant=name)
        tokens = first_windows(classifier.tokenize(first, second))
        if [row.ids.tolist() for row in tokens] != [row.input_ids for row in golden.rows]:
            raise GateError(f"the bundle's variant {name} gives other tokens than the checkpoint's tokenizer")
        _check_golden_settings(name, classifier, golden)
        logits = classifier.logits_of_tokens(tokens)
        pairs = zip(logits, (row.logits for row in golden.rows), strict=True)
        difference = max(float(np.abs(values - np.array(expected)).max()) for values, expected in pairs)
        if not difference <= variant.tolerance:
            raise GateError(f"the bundle's variant {name} differs from the checkpoint by {difference:.2g} in a logit")


def first_windows(rows: list[TokenRow]) -> list[TokenRow]:
    """Return the first window of every text; rows that are no windows as they are."""
    chosen: list[TokenRow] = []
    for row in rows:
        last = chosen[-1].window if chosen else None
        if row.window is None or last is None or row.window.example != last.example:
            chosen.append(row)
    return chosen


def _read_folder_manifest(folder: Path) -> FolderManifest:
    manifest = read_manifest(folder)
    assert isinstance(manifest, FolderManifest), "targets write folders of one model"
    return manifest


def _check_shared_files(manifest: BundleManifest, portable: FolderManifest) -> None:
    """Refuse configuration or tokenizer files that are not those of the portable variant's folder."""
    for name in sorted({*SHARED_FILES, *TOKENIZER_FILES}):
        if manifest.files.get(name) != portable.files.get(name):
            raise GateError(f"{name} of the bundle is not that of the folder which passed the gates")


def _check_variant_files(
    name: str, variant: Variant, source: FolderManifest, digests: Mapping[str, FileDigest]
) -> None:
    """Refuse model or library files that are not those of the variant's folder."""
    if variant.target != name or variant.library != source.library:
        raise GateError(f"the bundle's variant {name} names another target or library than its folder")
    for file in variant.files:
        original = source.model if file == variant.file else file
        if digests[file] != source.files.get(original):
            raise GateError(f"{file} of the bundle is not the file of {name} which passed the gates")


def _check_figures(name: str, variant: Variant, exported: ExportedModel) -> None:
    """Refuse other figures than those that were measured."""
    stored, measured = (record.model_dump(include=write.MEASURED_FIELDS) for record in (variant, exported))
    for field in sorted(write.MEASURED_FIELDS):
        if stored.get(field) != measured.get(field):
            raise GateError(
                f"the bundle's manifest has the {field} {stored.get(field)!r} for {name}; measured was "
                f"{measured.get(field)!r}"
            )


def _check_card(portable: Variant, result: ExportResult, card: str) -> None:
    """Refuse a model card without the scores that the hub reads, or without what was measured of probabilities."""
    expected = [f"- {name}: {text}" for name, text in result.quality.lines()]
    for name, value in (portable.dev or {}).items():
        if name != "score":  # the mean of the others is no metric of the hub
            expected.append(f"    - type: {json.dumps(name)}\n      value: {value:.6f}")
    for text in expected:
        if text not in card:
            raise GateError(f"the bundle's {CARD} does not say what was measured: {text.strip()}")


def _check_table(name: str, variant: Variant, card: str) -> None:
    """Refuse a model card whose row of the variant has other figures."""
    figures = [f"`{variant.file}`", f"{variant.bytes:,}", f"{variant.sparsity:.2%}"]
    if variant.dev is not None:
        figures.append(f"{variant.dev['score']:.4f}")
    for line in card.splitlines():
        if all(figure in line for figure in figures):
            return
    raise GateError(f"the bundle's {CARD} has no row with the figures of {name}: {', '.join(figures)}")


def _check_claims(manifest: BundleManifest, portable: FolderManifest, exported: ExportedModel) -> None:
    """Refuse a kind of task, settings or sparsity that are not those of the portable variant."""
    comparisons: dict[str, tuple[JsonValue, JsonValue]] = {
        "kind": (manifest.kind, portable.kind),
        "text": (list(manifest.text or ()), list(portable.text or ())),
        "settings": (manifest.settings, portable.settings),
        "sparsity": (manifest.sparsity, exported.sparsity),
        "model": (manifest.model, manifest.variants[write.PORTABLE_TARGET].file),
    }
    for field, (value, expected) in comparisons.items():
        if value != expected:
            raise GateError(f"the bundle's manifest has the {field} {value!r}; what passed the gates has {expected!r}")


def _check_golden_settings(name: str, classifier: Classifier, golden: GoldenExamples) -> None:
    """Refuse golden examples that are read with other labels, length, padding or cutting than the variant's."""
    padding = {"input_ids": golden.padding.input_ids, "token_type_ids": golden.padding.token_type_ids}
    comparisons = {
        "labels": (golden.labels, classifier.names),
        "longest input": (golden.max_length, classifier.max_length),
        "side of padding": (golden.padding.side == "left", classifier.pads_left),
        "padding": (padding, classifier.padding),
        "truncation": (golden.truncation, classifier.decision.truncation()),
    }
    for field, (value, expected) in comparisons.items():
        if value != expected:
            raise GateError(f"golden.json has the {field} {value!r}; the bundle's variant {name} has {expected!r}")
