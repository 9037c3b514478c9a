"""`spdtool serve-check`: whether a bundle is what was exported, and computes what its checkpoint computed.

A bundle may come from a stranger, so nothing in it is executed. The self-test that runs is the one of this package, in
a process of its own that native code may crash; the `selftest.py` in the folder is for those who trust it. Libraries of
custom operators are those of the installed plugins. What the sums in manifest.json cannot show is that somebody changed
files and manifest together; then the golden examples still say whether the model answers as they do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from spdtool import plugins
from spdtool.errors import GateError, ModelError, SpdError
from spdtool.export.bundle import read as bundle
from spdtool.export.bundle import selftest

SECONDS = 1800


def check(folder: Path) -> dict[str, Any]:
    """What the self-test found.

    Raises:
        ModelError: it is no bundle, or the test cannot be run.
        GateError: a file is damaged, missing or another one, or a model gives other logits; says which.
    """
    if not (folder / bundle.MANIFEST).is_file() and (folder / "bundle" / bundle.MANIFEST).is_file():
        folder = folder / "bundle"
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "give RUN/export/bundle")
    manifest = bundle.manifest(folder)
    if manifest.get("format") != bundle.VARIANTS:
        raise ModelError(f"{folder} is no bundle: its {bundle.MANIFEST} names no variants", "give RUN/export/bundle")
    report = _report(folder, _libraries(manifest))
    if report["failures"]:
        told = "; ".join(f"{failure['file']} {failure['what']}" for failure in report["failures"])
        raise GateError(f"{folder}: {told}", "copy the folder again, or export it again")
    return {"folder": str(folder)} | report


def _libraries(manifest: dict[str, Any]) -> dict[str, Path]:
    """The installed library of each variant that needs one; a variant without is left to be skipped."""
    found = {}
    for name, facts in manifest["variants"].items():
        if facts.get("library"):
            try:
                found[name] = Path(plugins.library(facts["target"]).module.path())
            except SpdError:
                continue
    return found


def _report(folder: Path, libraries: dict[str, Path]) -> dict[str, Any]:
    named = [f"--library={name}={path}" for name, path in libraries.items()]
    words = [
        sys.executable,
        "-I",
        selftest.__file__,
        str(folder.absolute()),
        "--json",
        "--only-named-libraries",
        *named,
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise GateError(f"{folder}: the self-test took more than {SECONDS} seconds") from None
    if done.returncode not in (0, 1):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        if done.returncode == 2:
            raise ModelError(f"the self-test cannot be run: {last}")
        raise GateError(f"{folder}: the self-test died with the code {done.returncode}: {last}", "a file is damaged")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
