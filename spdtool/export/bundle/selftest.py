"""Replay the golden examples of a bundle on every model in it, and check the sha256 of every file.

    python selftest.py                      the folder in which this file lies
    python selftest.py FOLDER --json

Needs onnxruntime, tokenizers and numpy, and nothing else. Exit code 0: everything is as it was
exported; 1: a file is damaged, missing or another one, or a model gives other logits; 2: the test
cannot be run.

A model with custom operators needs their library, which is native code. The one in `lib/` is loaded
if it is built for this platform and is the file that manifest.json names; with
--only-named-libraries none is, unless --library names it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np


class FileDigest(TypedDict):
    """Size and sha256 of a file in manifest.json."""

    bytes: int
    sha256: str


class Library(TypedDict, total=False):
    """Library of custom operators in manifest.json."""

    file: str
    distribution: str
    platform: str


class Variant(TypedDict, total=False):
    """Model in manifest.json; `tolerance` is the largest difference of a logit that passes."""

    file: str
    files: list[str]
    library: Library
    tolerance: float


class GoldenRow(TypedDict, total=False):
    """Text, token ids, and the checkpoint's logits, of the row or of each token."""

    text: str
    pair: str | None
    input_ids: list[int]
    token_type_ids: list[int]
    logits: list[float] | list[list[float]]


class Golden(TypedDict, total=False):
    """Contents of golden.json."""

    max_length: int
    padding: dict[str, str | int]
    truncation: str
    rows: list[GoldenRow]


class Failure(TypedDict):
    """File at fault, and what is wrong with it."""

    file: str
    what: str


class Outcome(TypedDict, total=False):
    """Result of one variant; `state` is ok, failed or skipped, and `why` says why it is not ok."""

    file: str
    state: str
    why: str
    rows: int
    difference: float
    tolerance: float
    flipped: int


class Report(TypedDict, total=False):
    """Result of the whole test; `files` is how many were checked."""

    files: int
    failures: list[Failure]
    variants: dict[str, Outcome]


def main(words: list[str] | None = None) -> int:
    """Test a folder, write the report to standard output, and return the exit code."""
    options = parse_options(words)
    try:
        import numpy  # noqa: F401
        import onnxruntime  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"{error}: pip install onnxruntime tokenizers numpy\n")
        return 2
    try:
        report = test_bundle(options.folder, dict(options.library), only_named=options.only_named_libraries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a manifest that is not as expected
        failure: Failure = {"file": "manifest.json", "what": f"{type(error).__name__}: {error}"}
        report = {"failures": [failure], "variants": {}}
    text = render_report(report)
    if options.json:
        text = json.dumps(report) + "\n"
    sys.stdout.write(text)
    return int(bool(report["failures"]))


def parse_options(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Replay the golden examples of a bundle on every model in it.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--library", action="append", default=[], type=lambda word: tuple(word.split("=", 1)))
    parser.add_argument("--only-named-libraries", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def test_bundle(folder: Path, libraries: dict[str, str], *, only_named: bool) -> Report:
    """Check the files, the tokenizer, and every variant whose files are sound.

    Args:
        libraries: by variant, the library of custom operators to load.
        only_named: load no library of the folder.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    failures = check_files(folder, manifest["files"])
    if not has_own_digest(manifest):
        failures.append({"file": "manifest.json", "what": "is damaged: its digest is not that of its fields"})
    # A damaged model is not run: a crash in native code would end the test.
    bad_files = {failure["file"] for failure in failures}
    report: Report = {"files": len(manifest["files"]), "failures": failures, "variants": {}}
    if bad_files & {"golden.json", "tokenizer.json", "tokenizer_config.json", "config.json"}:
        return report
    golden: Golden = json.loads((folder / "golden.json").read_text("utf-8"))
    number = first_mistokenized_row(folder, golden)
    if number is not None:
        failures.append({"file": "tokenizer.json", "what": f"row {number} of golden.json has other token ids"})
    for name, variant in manifest["variants"].items():
        if bad_files & set(variant["files"]):
            continue
        library, obstacle = choose_library(folder, name, variant, libraries, only_named)
        outcome: Outcome = {"state": "skipped", "why": obstacle or ""}
        if obstacle is None:
            outcome = replay(folder, variant, library, golden)
        report["variants"][name] = {"file": variant["file"], **outcome}
        if outcome["state"] == "failed":
            failures.append({"file": variant["file"], "what": outcome["why"]})
    return report


def has_own_digest(manifest: dict[str, object]) -> bool:
    """Whether `digest` is the hash of all other fields."""
    fields = {name: value for name, value in manifest.items() if name != "digest"}
    return manifest.get("digest") == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, digests: dict[str, FileDigest]) -> list[Failure]:
    """List the files that are missing, or other than manifest.json says."""
    failures: list[Failure] = []
    for name, digest in digests.items():
        file, what = folder / name, ""
        if not file.resolve().is_relative_to(folder.resolve()):
            what = "lies outside the folder"
        elif not file.is_file():
            what = "is missing"
        elif file.stat().st_size != digest["bytes"]:
            what = f"has {file.stat().st_size} bytes instead of {digest['bytes']}"
        elif sha256(file) != digest["sha256"]:
            what = "is damaged or another file: its sha256 is not that of manifest.json"
        if what:
            failures.append({"file": name, "what": what})
    return failures


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_mistokenized_row(folder: Path, golden: Golden) -> int | None:
    """Number of the first golden row whose text gives other token ids, or None."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer.no_padding()  # golden rows have none
    strategy, direction = golden.get("truncation", "longest_first"), config.get("truncation_side", "right")
    tokenizer.enable_truncation(golden["max_length"], strategy=strategy, direction=direction)
    for number, row in enumerate(golden["rows"]):
        encoded = tokenizer.encode(row["text"], row["pair"])
        if encoded.ids != row["input_ids"] or encoded.type_ids != row.get("token_type_ids", encoded.type_ids):
            return number
    return None


def choose_library(
    folder: Path, name: str, variant: Variant, libraries: dict[str, str], only_named: bool
) -> tuple[str | None, str | None]:
    """Return the library that a variant needs and why it cannot be used; both None where it needs none."""
    library = variant.get("library")
    if not library:
        return None, None
    if name in libraries:
        return libraries[name], None
    if only_named:
        return None, f"its operators are not installed: pip install {library.get('distribution', name)}"
    if library.get("platform") != sysconfig.get_platform():
        return None, f"its library is built for {library.get('platform')}, this is {sysconfig.get_platform()}"
    if library["file"] not in variant["files"]:  # its digest was not checked
        return None, "its library is not listed"
    return str(folder / library["file"]), None


def replay(folder: Path, variant: Variant, library: str | None, golden: Golden) -> Outcome:
    """Run a model on the golden rows, one by one and all at once, and compare its logits with the checkpoint's."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # onnxruntime prints nothing: the report says what is wrong
    rows = golden["rows"]
    expected = [np.array(row["logits"], np.float64) for row in rows]
    try:
        if library:
            options.register_custom_ops_library(library)
        model = str(folder / variant["file"])
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        # Alone and together: a fault of padding shows in a batch only.
        alone = [read_outputs(session.run(None, make_batch([row], golden, names)), [row], golden)[0] for row in rows]
        together = read_outputs(session.run(None, make_batch(rows, golden, names)), rows, golden)
    except Exception as error:  # onnxruntime's errors share no base of their own
        return {"state": "failed", "why": f"cannot be run: {str(error).strip().splitlines()[0]}"}
    difference, flipped = 0.0, 0
    for wanted, *computed in zip(expected, alone, together, strict=True):
        for logits in computed:
            if logits.shape != wanted.shape:
                return {"state": "failed", "why": f"gives logits of the shape {logits.shape} instead of {wanted.shape}"}
            change = float(np.abs(logits - wanted).max())
            difference = change if change > difference or change != change else difference  # not a number stays one
        if wanted.shape[-1] > 1:  # a regression has no predictions that flip
            flipped += int((computed[0].argmax(-1) != wanted.argmax(-1)).sum())
    tolerance = variant["tolerance"]
    outcome: Outcome = {"rows": len(rows), "difference": difference, "tolerance": tolerance, "flipped": flipped}
    if not difference <= tolerance:  # not a number is a failure too
        why = f"differs from the checkpoint by {difference:.2g} in a logit; {tolerance:.2g} is allowed"
        return {**outcome, "state": "failed", "why": why}
    return {**outcome, "state": "ok"}


def read_outputs(outputs: list[np.ndarray], rows: list[GoldenRow], golden: Golden) -> list[np.ndarray]:
    """Return the logits of each row, [labels], or [tokens, labels] without padding; several outputs are labels."""
    import numpy as np

    if np.ndim(rows[0]["logits"]) == 1:
        return list(outputs[0])
    logits = outputs[0] if outputs[0].ndim == 3 else np.stack(outputs, axis=-1)
    left = golden["padding"]["side"] == "left"
    values = []
    for row, padded in zip(rows, logits, strict=True):
        count = len(row["input_ids"])
        values.append(padded[len(padded) - count :] if left else padded[:count])
    return values


def make_batch(rows: list[GoldenRow], golden: Golden, names: list[str]) -> dict[str, np.ndarray]:
    """Make the model's inputs from rows: each int64 [rows, longest], padded on the tokenizer's side."""
    import numpy as np

    longest = max(len(row["input_ids"]) for row in rows)
    left = golden["padding"]["side"] == "left"
    columns = {name: np.full((len(rows), longest), golden["padding"].get(name, 0), np.int64) for name in names}
    for number, row in enumerate(rows):
        count = len(row["input_ids"])
        tokens = slice(count)
        if left:
            tokens = slice(longest - count, longest)
        values = {
            "attention_mask": [1] * count,
            "token_type_ids": row.get("token_type_ids", [0] * count),
            "input_ids": row["input_ids"],
        }
        for name in names:
            columns[name][number, tokens] = values[name]
    return columns


def render_report(report: Report) -> str:
    """Render the report for people."""
    lines = []
    for name, outcome in report["variants"].items():
        text = outcome.get("why")
        if not text:
            text = f"largest difference {outcome['difference']:.2g} over {outcome['rows']} rows"
        lines.append(f"{outcome['state']:>7}  {name} ({outcome['file']}): {text}")
    if report["failures"]:
        lines += [f" FAILED  {failure['file']} {failure['what']}" for failure in report["failures"]]
        lines.append("failed")
    else:
        lines.append(f"ok: {report['files']} files are as they were exported")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
