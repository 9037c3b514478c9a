"""Arrays that are expensive to compute, stored in the user's cache folder and memory-mapped when needed again.

An entry is a folder with one flat file per array and a `contents.json` with types, shapes and hashes. It is written
under another name and renamed, so several processes may write the same one. A file whose size and time of change are
those recorded when it was written is trusted, another one is read and hashed; a damaged entry is computed again.

The folder is `spdtool` under XDG_CACHE_HOME (else `~/.cache`) and may be removed at any time. If all entries
together are larger than SPDTOOL_CACHE_GB (20), those that were not used for longest are removed for a new one.
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
from typing import BinaryIO, TypedDict

import numpy as np

HASHED_BYTES = 1 << 24  # at a time: a file may be larger than the memory
DAY = 24 * 3600
CONTENTS = "contents.json"  # written last; its time of change is when the entry was last used
DEFAULT_LIMIT_GB = 20.0

Append = Callable[[str, np.ndarray], None]
"""`append(name, array)` adds the rows of `array` to those that the array `name` has."""

Fill = Callable[[Append], None]
"""Computes the arrays of an entry, and hands them out through `append`."""


class Arrays(dict[str, np.ndarray]):
    """The arrays of an entry by name, and in `hashes` the hash of each: none has to be read for it."""

    def __init__(self, arrays: dict[str, np.ndarray], hashes: dict[str, str]) -> None:
        super().__init__(arrays)
        self.hashes = hashes


def cache_folder() -> Path:
    """Return the folder of all entries."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(root):  # the standard ignores a relative path
        return Path(root) / "spdtool"
    return Path.home() / ".cache" / "spdtool"


def size_limit() -> float:
    """Return how many bytes all entries together may have, unless a single one has more."""
    try:
        return float(os.environ.get("SPDTOOL_CACHE_GB", "")) * 1e9
    except ValueError:
        return DEFAULT_LIMIT_GB * 1e9


def cache_size() -> tuple[int, int]:
    """Return the number of entries, with those of killed writers, and their bytes."""
    sizes = []
    for entry in _entries():
        with suppress(OSError):  # another process may remove the same
            sizes.append(sum(file.stat().st_size for file in entry.iterdir()))
    return len(sizes), sum(sizes)


def remove_entries() -> None:
    """Remove every entry; a process that has mapped one can read on."""
    for entry in _entries():
        shutil.rmtree(entry, ignore_errors=True)


def _entries() -> list[Path]:
    """List the folders of entries; whatever else lies there is not this module's."""
    hidden = [path for path in cache_folder().glob("*/.*-*") if path.is_dir()]  # of killed writers
    return [path.parent for path in cache_folder().glob(f"*/*/{CONTENTS}")] + hidden


def hash_array(array: np.ndarray) -> str:
    """Hash an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def cache_key(*values: object) -> str:
    """Return a name for an entry that is decided by these values (what JSON can hold)."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def cached_arrays(kind: str, key: str, fill: Fill) -> Arrays:
    """Return the arrays of an entry, mapped from the disk, read only; computed by `fill` if there is no intact entry.

    If the cache cannot be written to, they are computed in memory.
    """
    arrays = arrays_on_disk(kind, key, fill)
    return arrays_in_memory(fill) if arrays is None else arrays


def arrays_in_memory(fill: Fill) -> Arrays:
    """Compute the arrays of `fill` in memory."""
    chunks: dict[str, list[np.ndarray]] = {}
    fill(lambda name, array: chunks.setdefault(name, []).append(array))
    arrays, hashes = {}, {}
    for name in chunks:
        arrays[name] = np.concatenate(chunks[name])
        hashes[name] = hash_array(arrays[name])
    return Arrays(arrays, hashes)


def arrays_on_disk(kind: str, key: str, fill: Fill) -> Arrays | None:
    """As `cached_arrays`, but None if the cache cannot be written to: for arrays too large for the memory."""
    entry = cache_folder() / kind / key
    arrays = _read_entry(entry)
    if arrays is not None:
        return arrays
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=entry.parent))
    except OSError:
        return None
    writer = _EntryWriter(partial)
    try:
        fill(writer.append)
        writer.finish()
        _publish(partial, entry)
    except OSError:  # the disk is full, most likely
        return None
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)
    _remove_least_recently_used(keep=entry)
    return _read_entry(entry)


class _ArrayRecord(TypedDict, total=False):
    """What `contents.json` says of one array; its layout is part of what lies in users' caches."""

    type: str
    rows: int
    row: list[int]
    bytes: int
    changed: int
    hash: str


class _EntryWriter:
    """Writes the files of an entry into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._records: dict[str, _ArrayRecord] = {}
        self._hashers: dict[str, hashlib.blake2b] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)  # a view of another array has no single buffer to write
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
            self._records[name] = {"type": array.dtype.str, "rows": 0, "row": list(array.shape[1:])}
            self._hashers[name] = hashlib.blake2b(digest_size=16)
        assert self._records[name]["type"] == array.dtype.str, f"{name} changes its type"
        self._records[name]["rows"] += len(array)
        self._hashers[name].update(array.data)
        self._files[name].write(array.data)

    def finish(self) -> None:
        """Bring all files to the disk, then write `contents.json`."""
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave a renamed folder with empty files
            file.close()
            status = (self._folder / name).stat()
            record = self._records[name]
            record["bytes"], record["changed"] = status.st_size, status.st_mtime_ns
            record["hash"] = self._hashers[name].hexdigest()
        (self._folder / CONTENTS).write_text(json.dumps(self._records), "utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _publish(partial: Path, entry: Path) -> None:
    """Rename `partial` to the entry, unless another process was faster; a damaged entry is removed."""
    if entry.exists() and _read_entry(entry) is None:
        # Renamed first: another process must never meet an entry that is being deleted.
        damaged = partial.with_name(f"{partial.name}-broken")
        entry.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(entry)
    except OSError:
        if _read_entry(entry) is None:
            raise


def _read_entry(entry: Path) -> Arrays | None:
    """Map the arrays of an entry and mark it as used; None if it is missing or damaged."""
    arrays, hashes = {}, {}
    try:
        for name, record in json.loads((entry / CONTENTS).read_text("utf-8")).items():
            arrays[name] = _map_file(entry / name, record)
            hashes[name] = record["hash"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # contents.json may hold anything
        return None
    with suppress(OSError):
        os.utime(entry / CONTENTS)
    return Arrays(arrays, hashes)


def _map_file(file: Path, record: _ArrayRecord) -> np.ndarray:
    """Map the array of a file; ValueError if the file is not what was written."""
    status = file.stat()
    intact = status.st_size == record["bytes"]
    if intact and status.st_mtime_ns != record["changed"]:
        intact = hash_file(file) == record["hash"]
    if not intact:
        raise ValueError(file)
    shape = (record["rows"], *record["row"])
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, record["type"])
    return np.memmap(file, record["type"], "r", shape=shape)


def hash_file(file: Path) -> str:
    """Hash a file as `hash_array` hashes the array that it holds."""
    hasher = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(HASHED_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _remove_least_recently_used(keep: Path) -> None:
    """Remove the entries that were not used for longest until all fit, but not `keep`; and remains of killed writers.

    A process that has mapped an entry can read on: its disk space is freed when that process ends.
    """
    entries: list[tuple[float, int, Path]] = []
    for path in cache_folder().glob("*/*"):
        with suppress(OSError):  # another process may remove the same
            if not path.name.startswith("."):
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append(((path / CONTENTS).stat().st_mtime, size, path))
            elif time.time() - path.stat().st_mtime > DAY:  # a younger one may still be written
                shutil.rmtree(path, ignore_errors=True)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > size_limit() and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
