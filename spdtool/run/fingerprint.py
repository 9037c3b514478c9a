"""Hashes of files and values, and what is known of the machine: a result is identified by them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spdtool.run.records import FileRecord, MachineRecord

PACKAGES = ("torch", "transformers", "accelerate", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def sha256(file: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path, root: Path, skip: Path | None = None) -> list[FileRecord]:
    """List every file below `folder` with size and sha256, by its path from `root`, but those below `skip`."""
    from spdtool.run.records import FileRecord

    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (skip is None or skip not in path.parents):
            name = str(path.relative_to(root))
            files.append(FileRecord(path=name, size=path.stat().st_size, sha256=sha256(path)))
    return files


def hash_json(value: object) -> str:
    """Return the hex digest of a value as JSON with sorted keys."""
    # sorted, since the order of a recipe's fields changes no result
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe_machine() -> MachineRecord:
    """Describe this machine, and the installed versions of the packages that influence results."""
    from spdtool.run.records import MachineRecord

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # a container or taskset may allow fewer than there are
        cpus = len(os.sched_getaffinity(0))
    return MachineRecord(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=cpus,
        versions=versions,
    )


def describe_processor() -> str:
    """Name the processor, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
