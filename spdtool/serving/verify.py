"""`spdtool serve-check`: verify that a bundle is what was exported and computes what its checkpoint computed.

A bundle may come from a stranger, so nothing in it is executed. The self-test that runs is the one
of this package, in a process of its own because native code may crash it; the `selftest.py` in the
folder is for those who trust it. Libraries of custom operators are those of the installed plugins.
The digests in manifest.json cannot show that somebody changed a file and the manifest together; the
golden examples still show whether the model answers as it did.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdtool import plugins
from spdtool.errors import GateError, ModelError, SpdError
from spdtool.export.bundle import selftest
from spdtool.export.bundle.manifest import MANIFEST, read_manifest
from spdtool.export.bundle.read import find_in_run
from spdtool.run.records import BundleManifest

TIMEOUT = 1800  # seconds for the whole self-test


def verify_bundle(folder: Path) -> dict[str, Any]:
    """Run the self-test on a bundle and return its report.

    Raises:
        ModelError: it is no bundle, or the test cannot be run.
        GateError: a file is damaged, missing or replaced, or a model gives other logits; names which.
    """
    folder = find_in_run(folder)
    nested = folder / "bundle"
    if not (folder / MANIFEST).is_file() and (nested / MANIFEST).is_file():
        folder = nested
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "give RUN/export/bundle")
    manifest = read_manifest(folder)
    if not isinstance(manifest, BundleManifest):
        raise ModelError(f"{folder} is no bundle: its {MANIFEST} names no variants", "give RUN/export/bundle")
    report = run_selftest(folder, installed_libraries(manifest))
    if report["failures"]:
        failures = "; ".join(f"{failure['file']} {failure['what']}" for failure in report["failures"])
        raise GateError(f"{folder}: {failures}", "copy the folder again, or export it again")
    return {"folder": str(folder)} | report


def installed_libraries(manifest: BundleManifest) -> dict[str, Path]:
    """Map each variant that needs a library to the installed one; the self-test skips a variant without."""
    libraries = {}
    for name, variant in manifest.variants.items():
        if variant.library is not None:
            try:
                libraries[name] = Path(plugins.find_library(variant.target).module.path())
            except SpdError:
                continue
    return libraries


def run_selftest(folder: Path, libraries: Mapping[str, Path]) -> dict[str, Any]:
    """Run the self-test of this package in a process of its own. Raises as `verify_bundle` does."""
    # -I: neither the environment nor the current folder can put another module in front of ours.
    command = [sys.executable, "-I", selftest.__file__, str(folder.absolute()), "--json", "--only-named-libraries"]
    command += [f"--library={name}={path}" for name, path in libraries.items()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise GateError(f"{folder}: the self-test took more than {TIMEOUT} seconds") from None
    if done.returncode not in (0, 1):  # 1: the test ran and found something; its report says what
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        if done.returncode == 2:
            raise ModelError(f"the self-test cannot be run: {lines[-1]}")
        raise GateError(
            f"{folder}: the self-test died with the code {done.returncode}: {lines[-1]}", "a file is damaged"
        )
    report: dict[str, Any] = json.loads(done.stdout)
    return report
