"""Open an exported folder on a disk, without its target and without torch.

    config.json  tokenizer.json  tokenizer_config.json  onnx/model.onnx  manifest.json        every target
    onnx/model_*.onnx  lib/  golden.json  selftest.py  README.md                             the bundle of a run

The manifest names the model file and, where the model needs custom operators, their library: see
`manifest`. Every file that is read is held against its sha256 first. A folder may come from a
stranger. What its manifest says is checked, and nothing in the folder is ever run because of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue, ValidationError

from spdtool.errors import ModelError, UnknownName
from spdtool.export.bundle.manifest import COPY_AGAIN, MANIFEST, path_inside, read_json_object, read_manifest
from spdtool.run.fingerprint import sha256
from spdtool.run.records import (
    BundleManifest,
    FileDigest,
    FolderManifest,
    GoldenExamples,
    LibraryRecord,
)

GOLDEN_FILE = "golden.json"
MODEL_FILE = "onnx/model.onnx"
SHARED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Further files that transformers reads beside a tokenizer. One that is not listed was added later.
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    # of sentence-transformers: what pools and prompts otherwise gives other vectors
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
STUDENT = "student"
NO_LIMIT = 10**9  # a tokenizer without a limit writes a number above this as its model_max_length
DEFAULT_LENGTH = 512  # where neither the tokenizer nor the model says how long an input may be
# Their first position comes after the padding token's number: fewer tokens fit than positions exist.
OFFSET_POSITIONS = {
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
}
WHAT_TO_GIVE = "give what `spdtool export` wrote, such as RUN/export/student"


@dataclass(frozen=True)
class Bundle:
    """One model of an exported folder.

    Attributes:
        folder: the folder itself, which holds config.json.
        model: its ONNX file.
        target: the export target that wrote it; None where there is no manifest.
        library: the library of custom operators that it needs; None where it needs none.
        variants: names of all variants of the model in the folder; empty in a folder of one model.
        text: names of the one or two text columns that it was trained on; None: the folder does not
            say.
        kind: registered name of its kind of task; None: the folder does not say.
        settings: of what answers for this kind.
    """

    folder: Path
    model: Path
    target: str | None
    library: LibraryRecord | None = None
    variants: tuple[str, ...] = ()
    text: tuple[str, ...] | None = None
    kind: str | None = None
    settings: Mapping[str, JsonValue] = field(default_factory=dict)


def read_bundle(folder: Path, *, unverified: bool = False) -> Bundle:
    """Read the model in `folder`, or in its `student`; of several variants, the portable one.

    Args:
        unverified: open a folder without a manifest too, such as one that others exported.

    Raises:
        ModelError: it is no exported folder; its manifest is missing, damaged, or newer than this
            spdtool; a file is missing, or is not the one that was exported.
    """
    folder = _find_exported_folder(folder)
    manifest = _read_manifest_of(folder, unverified=unverified)
    if isinstance(manifest, BundleManifest):
        return _read_variant(folder, manifest, _portable_variant(manifest))
    model = path_inside(folder, manifest.model)
    _require_model(folder, model)
    if (folder / MANIFEST).is_file():  # else it is opened unverified
        # A second model: the manifest of one folder has come into another.
        models = {file.relative_to(folder).as_posix() for file in folder.glob("onnx/*.onnx")}
        # Files that the manifest does not list are refused too: someone has added them.
        names = {*manifest.files, *SHARED_FILES, manifest.model, *models}
        _require_listed(folder, names, manifest.files, manifest.library)
    text = tuple(manifest.text) if manifest.text else None
    return Bundle(
        folder,
        model,
        manifest.target or None,
        manifest.library,
        text=text,
        kind=manifest.kind,
        settings=manifest.settings or {},
    )


def list_usable_variants(
    folder: Path, variant: str | None = None, provider: str = "cpu", *, unverified: bool = False
) -> Iterator[Bundle]:
    """Yield what `folder` offers on a provider, the best first; each one's files are checked when it is reached.

    Args:
        variant: yield this one alone.
        unverified: as in `read_bundle`.

    Raises:
        UnknownName: there is no such variant.
        ModelError: as `read_bundle`.
    """
    folder = _find_exported_folder(folder)
    manifest = _read_manifest_of(folder, unverified=unverified)
    if isinstance(manifest, FolderManifest):
        if variant is not None:
            raise UnknownName("variant", variant, (), f"{folder} holds one model only: leave the variant out")
        yield read_bundle(folder, unverified=unverified)
        return
    if variant is not None and variant not in manifest.variants:
        raise UnknownName("variant", variant, manifest.variants)
    # On hardware that the manifest does not know, the portable file runs.
    names = manifest.prefer.get(provider, [_portable_variant(manifest)])
    if variant is not None:
        names = [variant]
    for name in names:
        yield _read_variant(folder, manifest, name)


def read_golden_examples(folder: Path) -> GoldenExamples:
    """Read golden.json of a bundle.

    Raises:
        ModelError: it is missing or damaged.
    """
    file = folder / GOLDEN_FILE
    try:
        return GoldenExamples.model_validate(read_json_object(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ModelError(f"{file} is damaged: {where}: {problem['msg']}", COPY_AGAIN) from None


def longest_input(config: Mapping[str, JsonValue], tokenizer_config: Mapping[str, JsonValue]) -> int:
    """Longest input in tokens that both the tokenizer and the position embeddings allow."""
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and str(config.get("model_type")) in OFFSET_POSITIONS:
        pad = config.get("pad_token_id")
        # RoBERTa numbers positions from padding + 1, so as many rows of the table are never read.
        positions -= 1
        if isinstance(pad, int):
            positions -= pad
    # Tokenizer and model may each say more than the other can read.
    limits = []
    for limit in (positions, tokenizer_config.get("model_max_length")):
        if isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < NO_LIMIT:
            limits.append(int(limit))
    return min(limits, default=DEFAULT_LENGTH)


def find_in_run(folder: Path) -> Path:
    """Return the servable folder of a run; any other folder as it is.

    Raises:
        ModelError: the run has exported nothing yet.
    """
    if not (folder / "run.json").is_file():
        return folder
    for name in ("bundle", STUDENT):  # where a bundle could not be written, the student is there all the same
        if (folder / "export" / name).is_dir():
            return folder / "export" / name
    raise ModelError(f"the run {folder} has no exported model", f"spdtool resume {folder}")


def _find_exported_folder(folder: Path) -> Path:
    """Return `folder`, the bundle of a run, or the `student` of a folder where that is the exported one."""
    folder = find_in_run(folder)
    if not (folder / "config.json").is_file() and (folder / STUDENT / "config.json").is_file():
        return folder / STUDENT
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder", WHAT_TO_GIVE)
    return folder


def _read_manifest_of(folder: Path, *, unverified: bool) -> FolderManifest | BundleManifest:
    """Read the manifest; where there is no model at all, say that rather than that there is no manifest."""
    if not (folder / MANIFEST).exists():
        _require_model(folder, folder / MODEL_FILE)
    return read_manifest(folder, unverified=unverified)


def _portable_variant(manifest: BundleManifest) -> str:
    return next(name for name, variant in manifest.variants.items() if variant.file == manifest.model)


def _read_variant(folder: Path, manifest: BundleManifest, name: str) -> Bundle:
    """Read one variant and check its files; those of the others are not looked at."""
    variant = manifest.variants[name]
    model = path_inside(folder, variant.file)
    _require_model(folder, model)
    _require_listed(folder, {*SHARED_FILES, *variant.files}, manifest.files, variant.library)
    text = tuple(manifest.text) if manifest.text else None
    return Bundle(
        folder,
        model,
        variant.target,
        variant.library,
        tuple(manifest.variants),
        text,
        manifest.kind,
        manifest.settings or {},
    )


def _require_model(folder: Path, model: Path) -> None:
    for file in (folder / "config.json", model):
        if not file.is_file():
            message = f"{folder} is no exported folder: it has no {file.relative_to(folder)}"
            raise ModelError(message, _exported_folder_hint(folder, model))


def _require_listed(
    folder: Path, names: set[str], digests: Mapping[str, FileDigest], library: LibraryRecord | None
) -> None:
    """Raise ModelError unless each of these files is listed and unchanged, or neither listed nor there."""
    if library is not None:
        # The library in the folder is never run: see `export.load`.
        names = names - {library.file}
    for name in sorted(names.union(TOKENIZER_FILES)):
        file = path_inside(folder, name)
        if file.is_file() != (name in digests):
            raise ModelError(f"{folder} lacks {name}, or its {MANIFEST} says nothing of it", COPY_AGAIN)
        if name in digests:
            _require_unchanged(file, digests[name])


def _require_unchanged(file: Path, expected: FileDigest) -> None:
    """Raise ModelError if a file is not the one in the manifest: other numbers open just as well."""
    hint = "copy the folder again, or export it again"
    size = file.stat().st_size  # first: it costs nothing, and names the commonest damage
    if size != expected.bytes:
        raise ModelError(f"{file} has {size} bytes; {MANIFEST} says {expected.bytes}", hint)
    if sha256(file) != expected.sha256:
        raise ModelError(f"{file} is damaged or was changed: its sha256 is not the one in {MANIFEST}", hint)


def _exported_folder_hint(folder: Path, model: Path) -> str:
    """Say what to give in place of a folder that is no exported one."""
    inside = []
    for depth in (1, 2, 3):
        inside += [str(file.parent.parent) for file in sorted(folder.glob(depth * "*/" + MODEL_FILE))]
    if inside:
        return f"give one of {', '.join(inside[:4])}"
    if not model.is_file() and (folder / "config.json").is_file():
        return f"a checkpoint is exported by spdtool export --from '{folder}'; an export has to be copied again"
    return WHAT_TO_GIVE
