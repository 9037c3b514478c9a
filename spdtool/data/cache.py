"""Arrays that are expensive to compute, stored in the user's cache folder and memory-mapped when needed again.

An entry is a folder with one flat file per array and a `contents.json` with types, shapes and checksums. It is written
under another name, flushed to the disk and renamed, so several processes may write the same one. Every process reads
each file once and compares its checksum before it maps it: a disk that loses a bit changes no time stamp. A damaged
entry is computed again.

The folder is `spdtool` under XDG_CACHE_HOME (else `~/.cache`) and may be removed at any time. If all entries
together are larger than SPDTOOL_CACHE_GB (20), those that were not used for longest are removed for a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np

from spdtool.run.storage import create_folder, publish_folder, remove_path, settle_folder

CHUNK_BYTES = 1 << 24  # that are read at a time: a file may be larger than the memory
DAY = 24 * 3600
CONTENTS = "contents.json"  # written last; its time of change is when the entry was last used
DEFAULT_LIMIT_GB = 20.0

FORMAT = 2  # of contents.json: another layout, another number

_verified: set[tuple[str, int, int, int]] = set()  # files that this process has read: path, inode, size, time of change

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
    arrays = read_entry(kind, key)
    if arrays is not None:
        return arrays
    try:
        create_folder(entry.parent)
        partial = entry.with_name(f".{key}-{uuid.uuid4().hex}")
        partial.mkdir()
    except OSError:
        return None
    writer = _EntryWriter(partial)
    try:
        fill(writer.append)
        writer.finish(key)
        _publish(partial, entry)
    except OSError:  # the disk is full, most likely
        return None
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)
    _remove_least_recently_used(keep=entry)
    return read_entry(kind, key)


class _ArrayRecord(TypedDict, total=False):
    """What `contents.json` says of one array.

    `hash` identifies its contents; `crc32` finds damage, at four times the speed.
    """

    type: str
    rows: int
    row: list[int]
    bytes: int
    crc32: int
    hash: str


class _Contents(TypedDict):
    """Contents of `contents.json`; `hash` is that of the rest."""

    format: int
    key: str
    arrays: dict[str, _ArrayRecord]
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
            self._records[name] = {"type": array.dtype.str, "rows": 0, "row": list(array.shape[1:]), "crc32": 0}
            self._hashers[name] = hashlib.blake2b(digest_size=16)
        assert self._records[name]["type"] == array.dtype.str, f"{name} changes its type"
        self._records[name]["rows"] += len(array)
        self._records[name]["crc32"] = zlib.crc32(array.data, self._records[name]["crc32"])
        self._hashers[name].update(array.data)
        self._files[name].write(array.data)

    def finish(self, key: str) -> None:
        """Write `contents.json`, and bring all files to the disk: else a crash may leave a folder of empty files."""
        for name, file in self._files.items():
            file.close()
            record = self._records[name]
            record["bytes"] = (self._folder / name).stat().st_size
            record["hash"] = self._hashers[name].hexdigest()
        contents = _Contents(format=FORMAT, key=key, arrays=self._records, hash=cache_key(FORMAT, key, self._records))
        (self._folder / CONTENTS).write_text(json.dumps(contents), "utf-8")
        settle_folder(self._folder)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _publish(partial: Path, entry: Path) -> None:
    """Rename `partial` to the entry, unless another process was faster; a damaged entry is removed."""
    kind, key = entry.parent.name, entry.name
    if entry.exists() and read_entry(kind, key) is None:
        # Renamed first: another process must never meet an entry that is being deleted.
        damaged = partial.with_name(f"{partial.name}-broken")
        entry.rename(damaged)
        remove_path(damaged)
    try:
        publish_folder(partial, entry)
    except OSError:
        if read_entry(kind, key) is None:
            raise


def read_entry(kind: str, key: str) -> Arrays | None:
    """Map the arrays of an entry and mark it as used; None if it is missing or damaged."""
    entry, arrays, hashes = cache_folder() / kind / key, {}, {}
    try:
        contents = json.loads((entry / CONTENTS).read_text("utf-8"))
        records = contents["arrays"]
        # the key as well: an entry that was copied over another is intact, and not what is asked for
        if contents["hash"] != cache_key(FORMAT, key, records):
            return None
        for name, record in records.items():
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
    identity = (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)
    if identity not in _verified:
        if status.st_size != record["bytes"] or compute_crc32(file) != record["crc32"]:
            raise ValueError(file)
        _verified.add(identity)
    shape = (record["rows"], *record["row"])
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, record["type"])
    return np.memmap(file, record["type"], "r", shape=shape)


def compute_crc32(file: Path) -> int:
    """Compute the CRC-32 of a file."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


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
