"""Replay the golden examples of a bundle on every model in it, and check the sha256 of every file.

    python selftest.py                      the folder in which this file lies
    python selftest.py FOLDER --json

Needs onnxruntime, tokenizers and numpy, and nothing else. Exit code 0: everything is as it was exported; 1: a file is
damaged, missing or another one, or a model gives other logits; 2: the test cannot be run.

A model with custom operators needs their library, which is native code. The one in `lib/` is loaded if it is built for
this platform and is the file that manifest.json names; with --only-named-libraries none is, unless --library names it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any


def main(words: list[str] | None = None) -> int:
    """Test a folder, write what was found to standard output, and return the exit code."""
    options = parse(words)
    try:
        import numpy  # noqa: F401
        import onnxruntime  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"{error}: pip install onnxruntime tokenizers numpy\n")
        return 2
    try:
        report = test(options.folder, dict(options.library), only_named=options.only_named_libraries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report = {"failures": [{"file": "manifest.json", "what": f"{type(error).__name__}: {error}"}], "variants": {}}
    sys.stdout.write(json.dumps(report) + "\n" if options.json else shown(report))
    return 1 if report["failures"] else 0


def parse(words: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Replay the golden examples of a bundle on every model in it.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--library", action="append", default=[], type=lambda word: tuple(word.split("=", 1)))
    parser.add_argument("--only-named-libraries", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def test(folder: Path, libraries: dict[str, str], *, only_named: bool) -> dict[str, Any]:
    """What is wrong with the folder (`failures`), and what came of each variant.

    Args:
        libraries: by variant, the library of custom operators to load.
        only_named: load no library of the folder.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    failures = [{"file": name, "what": what} for name, what in damaged(folder, manifest["files"]).items()]
    bad = {failure["file"] for failure in failures}
    report: dict[str, Any] = {"files": len(manifest["files"]), "failures": failures, "variants": {}}
    if bad & {"golden.json", "tokenizer.json", "tokenizer_config.json", "config.json"}:
        return report
    golden = json.loads((folder / "golden.json").read_text("utf-8"))
    wrong = mistokenised(folder, golden)
    if wrong is not None:
        failures.append({"file": "tokenizer.json", "what": f"row {wrong} of golden.json has other token ids"})
    for name, facts in manifest["variants"].items():
        if bad & set(facts["files"]):
            continue
        library, why = library_of(folder, name, facts, libraries, only_named)
        found = {"state": "skipped", "why": why} if why else replay(folder, facts, library, golden)
        report["variants"][name] = {"file": facts["file"]} | found
        if found["state"] == "failed":
            failures.append({"file": facts["file"], "what": found["why"]})
    return report


def damaged(folder: Path, files: dict[str, Any]) -> dict[str, str]:
    """What is wrong, by file."""
    wrong = {}
    for name, facts in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            wrong[name] = "lies outside the folder"
        elif not file.is_file():
            wrong[name] = "is missing"
        elif file.stat().st_size != facts["bytes"]:
            wrong[name] = f"has {file.stat().st_size} bytes instead of {facts['bytes']}"
        elif sha256(file) != facts["sha256"]:
            wrong[name] = "is damaged or another file: its sha256 is not that of manifest.json"
    return wrong


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mistokenised(folder: Path, golden: dict[str, Any]) -> int | None:
    """The first golden row whose text gives other token ids; None: all are the same."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(golden["max_length"], direction=config.get("truncation_side", "right"))
    for number, row in enumerate(golden["rows"]):
        encoded = tokenizer.encode(row["text"], row["pair"])
        if encoded.ids != row["input_ids"] or encoded.type_ids != row.get("token_type_ids", encoded.type_ids):
            return number
    return None


def library_of(
    folder: Path, name: str, facts: dict[str, Any], libraries: dict[str, str], only_named: bool
) -> tuple[str | None, str | None]:
    """The library that a variant needs, and why it cannot be used; both None where it needs none."""
    wanted = facts.get("library")
    if not wanted:
        return None, None
    if name in libraries:
        return libraries[name], None
    if only_named:
        return None, f"its operators are not installed: pip install {wanted.get('distribution', name)}"
    if wanted.get("platform") != sysconfig.get_platform():
        return None, f"its library is built for {wanted.get('platform')}, this is {sysconfig.get_platform()}"
    return (
        (str(folder / wanted["file"]), None)
        if wanted["file"] in facts["files"]
        else (None, "its library is not listed")
    )


def replay(folder: Path, facts: dict[str, Any], library: str | None, golden: dict[str, Any]) -> dict[str, Any]:
    """Run a model over the golden rows, one by one and all at once, and hold its logits against the checkpoint's."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        if library:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(str(folder / facts["file"]), options, providers=["CPUExecutionProvider"])
        rows = golden["rows"]
        expected = np.array([row["logits"] for row in rows], np.float64)
        names = [value.name for value in session.get_inputs()]
        alone = np.concatenate([session.run(None, batch([row], golden, names))[0] for row in rows])
        together = session.run(None, batch(rows, golden, names))[0]
    except Exception as error:  # onnxruntime's errors share no base of their own
        return {"state": "failed", "why": f"cannot be run: {str(error).strip().splitlines()[0]}"}
    if alone.shape != expected.shape or together.shape != expected.shape:
        return {"state": "failed", "why": f"gives logits of the shape {alone.shape} instead of {expected.shape}"}
    difference = float(np.maximum(np.abs(alone - expected), np.abs(together - expected)).max())
    flipped = int((alone.argmax(1) != expected.argmax(1)).sum()) if expected.shape[1] > 1 else 0
    found = {"rows": len(rows), "difference": difference, "tolerance": facts["tolerance"], "flipped": flipped}
    if not difference <= facts["tolerance"]:  # not a number is a failure too
        why = f"differs from the checkpoint by {difference:.2g} in a logit; {facts['tolerance']:.2g} is allowed"
        return found | {"state": "failed", "why": why}
    return found | {"state": "ok"}


def batch(rows: list[dict[str, Any]], golden: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The rows as the model's inputs, each int64 [rows, longest], padded on the tokenizer's side."""
    import numpy as np

    longest, left = max(len(row["input_ids"]) for row in rows), golden["padding"]["side"] == "left"
    columns = {name: np.full((len(rows), longest), golden["padding"].get(name, 0), np.int64) for name in names}
    for number, row in enumerate(rows):
        count = len(row["input_ids"])
        place = slice(longest - count, longest) if left else slice(count)
        cells = {"attention_mask": [1] * count, "token_type_ids": [0] * count} | row
        for name in names:
            columns[name][number, place] = cells[name]
    return columns


def shown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for name, found in report["variants"].items():
        told = found.get("why") or f"largest difference {found['difference']:.2g} over {found['rows']} rows"
        lines.append(f"{found['state']:>7}  {name} ({found['file']}): {told}")
    lines += [f" FAILED  {failure['file']} {failure['what']}" for failure in report["failures"]]
    lines.append("failed" if report["failures"] else f"ok: {report['files']} files are as they were exported")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
