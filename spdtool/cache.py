"""Arrays that are dear to compute, kept in the user's cache folder and memory-mapped when they are needed again.

An entry is a folder with one flat file per array and a `contents.json` with types, shapes and a hash. It is written
under another name and renamed, so several processes may write the same one; an entry that is not what its hash says is
made again. The folder is `spdtool` under XDG_CACHE_HOME (else `~/.cache`) and may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 24  # bytes that are hashed at a time

Arrays = dict[str, np.ndarray]
Append = Callable[[str, np.ndarray], None]
"""`append(name, array)` puts the array's rows behind those that the array `name` has."""


def folder() -> Path:
    """Where entries are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "spdtool"


def key(*parts: Any) -> str:
    """A name for an entry that is made of `parts` (what JSON can hold)."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def arrays(kind: str, name: str, fill: Callable[[Append], None]) -> Arrays:
    """The arrays of the entry `name`, mapped from the disk, read only; made by `fill` if there is no whole entry.

    Where the cache cannot be written to, they are kept in memory.
    """
    entry = folder() / kind / name
    found = _read(entry)
    if found is not None:
        return found
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=entry.parent))
    except OSError:
        return in_memory(fill)
    writer = _Writer(aside)
    try:
        fill(writer.append)
        writer.close()
        _put(aside, entry)
    except OSError:  # no room left, most likely
        return in_memory(fill)
    finally:
        writer.release()
        shutil.rmtree(aside, ignore_errors=True)
    return _read(entry) or in_memory(fill)


class _Writer:
    """Keeps the open files of an entry, and what `contents.json` will say of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.contents: dict[str, dict[str, Any]] = {}
        self.hashes: dict[str, Any] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        if name not in self.files:
            self.files[name] = (self.folder / name).open("wb")
            self.contents[name] = {"type": array.dtype.str, "rows": 0, "row": list(array.shape[1:])}
            self.hashes[name] = hashlib.blake2b(digest_size=16)
        assert self.contents[name]["type"] == array.dtype.str, f"{name} changes its type"
        self.contents[name]["rows"] += len(array)
        self.hashes[name].update(array.data)
        self.files[name].write(array.data)

    def release(self) -> None:
        for file in self.files.values():
            file.close()

    def close(self) -> None:
        self.release()
        for name in self.files:
            self.contents[name]["hash"] = self.hashes[name].hexdigest()
        (self.folder / "contents.json").write_text(json.dumps(self.contents), "utf-8")


def _put(aside: Path, entry: Path) -> None:
    """Make `aside` the entry, unless another process was faster; what is not whole gives way."""
    if entry.exists() and _read(entry) is None:
        entry.rename(aside.with_name(f"{aside.name}-broken"))
        shutil.rmtree(aside.with_name(f"{aside.name}-broken"), ignore_errors=True)
    try:
        aside.rename(entry)
    except OSError:
        if _read(entry) is None:
            raise


def _read(entry: Path) -> Arrays | None:
    """The arrays of an entry; None where it is missing or not whole."""
    try:
        contents = json.loads((entry / "contents.json").read_text("utf-8"))
        return {name: _mapped(entry / name, what) for name, what in contents.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _mapped(file: Path, what: dict[str, Any]) -> np.ndarray:
    """The array of a file; ValueError where the file is not what its hash says."""
    shape, hashed = (what["rows"], *what["row"]), hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            hashed.update(chunk)
    if hashed.hexdigest() != what["hash"]:
        raise ValueError(file)
    if 0 in shape:  # nothing cannot be mapped
        return np.empty(shape, what["type"])
    return np.memmap(file, what["type"], "r", shape=shape)


def in_memory(fill: Callable[[Append], None]) -> Arrays:
    """The arrays that `fill` makes, kept nowhere."""
    parts: dict[str, list[np.ndarray]] = {}
    fill(lambda name, array: parts.setdefault(name, []).append(array))
    return {name: np.concatenate(each) for name, each in parts.items()}
