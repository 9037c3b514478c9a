"""Arrays that are dear to compute, kept in the user's cache folder and memory-mapped when they are needed again.

An entry is a folder with one flat file per array and a `contents.json` with types, shapes and hashes. It is written
under another name and renamed, so several processes may write the same one. A file whose size and time of change are
those of when it was written is taken as it is, another one is read and hashed; what is damaged is made again.

The folder is `spdtool` under XDG_CACHE_HOME (else `~/.cache`) and may be removed at any time. Where all entries
together are larger than SPDTOOL_CACHE_GB (20), those that were not used for longest give way to a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 24  # bytes that are hashed at a time

DAY = 24 * 3600
CONTENTS = "contents.json"  # written last; its time of change is when the entry was last used


class Arrays(dict[str, np.ndarray]):
    """The arrays of an entry by name, and in `hashes` the hash of each, for which none had to be read again."""

    def __init__(self, arrays: dict[str, np.ndarray], hashes: dict[str, str]) -> None:
        super().__init__(arrays)
        self.hashes = hashes


Append = Callable[[str, np.ndarray], None]
"""`append(name, array)` puts the array's rows behind those that the array `name` has."""


def cache_folder() -> Path:
    """Where entries are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "spdtool"


def size_limit() -> float:
    """How many bytes all entries together may have, unless a single one has more."""
    try:
        return float(os.environ.get("SPDTOOL_CACHE_GB", "")) * 1e9
    except ValueError:
        return 20e9


def hash_array(array: np.ndarray) -> str:
    """Hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def cache_key(*parts: Any) -> str:
    """A name for an entry that is made of `parts` (what JSON can hold)."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def cached_arrays(kind: str, name: str, fill: Callable[[Append], None]) -> Arrays:
    """The arrays of the entry `name`, mapped from the disk, read only; made by `fill` if there is no whole entry.

    Where the cache cannot be written to, they are kept in memory.
    """
    return arrays_on_disk(kind, name, fill) or arrays_in_memory(fill)


def arrays_on_disk(kind: str, name: str, fill: Callable[[Append], None]) -> Arrays | None:
    """As `cached_arrays`, but None where the cache cannot be written to: for what is too much for the memory."""
    entry = cache_folder() / kind / name
    found = _read(entry)
    if found is not None:
        return found
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=entry.parent))
    except OSError:
        return None
    writer = _Writer(aside)
    try:
        fill(writer.append)
        writer.close()
        _put(aside, entry)
    except OSError:  # no room left, most likely
        return None
    finally:
        writer.release()
        shutil.rmtree(aside, ignore_errors=True)
    _make_room(entry)
    return _read(entry)


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
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            found = (self.folder / name).stat()
            self.contents[name] |= {"bytes": found.st_size, "changed": found.st_mtime_ns}
            self.contents[name]["hash"] = self.hashes[name].hexdigest()
        (self.folder / CONTENTS).write_text(json.dumps(self.contents), "utf-8")


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
    """The arrays of an entry, which is marked as used; None where it is missing or not whole."""
    try:
        contents = json.loads((entry / CONTENTS).read_text("utf-8"))
        mapped = {name: _mapped(entry / name, what) for name, what in contents.items()}
        hashes = {name: what["hash"] for name, what in contents.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with suppress(OSError):
        os.utime(entry / CONTENTS)
    return Arrays(mapped, hashes)


def _mapped(file: Path, what: dict[str, Any]) -> np.ndarray:
    """The array of a file; ValueError where the file is not what was written."""
    shape, found = (what["rows"], *what["row"]), file.stat()
    if found.st_size != what["bytes"] or (found.st_mtime_ns != what["changed"] and _file_hash(file) != what["hash"]):
        raise ValueError(file)
    if 0 in shape:  # nothing cannot be mapped
        return np.empty(shape, what["type"])
    return np.memmap(file, what["type"], "r", shape=shape)


def _file_hash(file: Path) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _make_room(made: Path) -> None:
    """Remove the entries that were not used for longest until all fit, but not `made`; and what killed writers left.

    A process that has mapped an entry keeps it: its disk space is freed when that process ends.
    """
    entries: list[tuple[float, int, Path]] = []
    for path in cache_folder().glob("*/*"):
        with suppress(OSError):
            if path.name.startswith("."):
                if time.time() - path.stat().st_mtime > DAY:
                    shutil.rmtree(path, ignore_errors=True)
            else:
                entries.append(((path / CONTENTS).stat().st_mtime, _bytes(path), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > size_limit() and path != made:
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _bytes(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())


def arrays_in_memory(fill: Callable[[Append], None]) -> Arrays:
    """The arrays that `fill` makes, kept nowhere."""
    parts: dict[str, list[np.ndarray]] = {}
    fill(lambda name, array: parts.setdefault(name, []).append(array))
    made = {name: np.concatenate(each) for name, each in parts.items()}
    return Arrays(made, {name: hash_array(array) for name, array in made.items()})
