"""Notice that an exported folder on the disk is no longer the one that a server opened.

Weights may be mapped into memory, so a file that is written over under a running server would
change its answers. The server therefore checks the folder after every batch, and gives no answer
once a file differs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from spdtool.errors import SpdError

FileStamp: TypeAlias = tuple[int, int, int]
"""Inode, bytes, and nanoseconds of the last change of the content."""


class BundleChanged(SpdError):
    """A file of the folder is no longer the one that was opened."""


class FolderWatch:
    """Compares the files of a folder with what they were.

    Args:
        stamps: what they were: see `stamp_files`.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._stamps = {os.fspath(file): stamp for file, stamp in stamps.items()}

    def check(self) -> None:
        """Compare every file; files that have come since are not looked at.

        Raises:
            BundleChanged: a file was written, replaced or removed.
        """
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise BundleChanged(f"{file} has changed since it was opened", "start the server again")


def stamp_files(folder: Path) -> dict[Path, FileStamp]:
    """Stamp every file of a folder of bundles, two folders deep; an empty mapping if there is no such folder."""
    stamps = {}
    # Patterns, for they follow links to folders, and cannot go round in circles.
    for pattern in ("*", "*/*", "*/*/*"):
        for file in folder.expanduser().glob(pattern):
            stamp = _stamp(os.fspath(file))
            if stamp is not None and file.is_file():
                stamps[file] = stamp
    return stamps


def _stamp(file: str) -> FileStamp | None:
    """Stamp one file, following links; None if it cannot be read."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
