"""Files that survive a power cut: contents reach the disk before names do, and both before anything older goes.

A kernel keeps what was written in memory for half a minute, and may write names before contents. So
whoever makes something that others rely on calls `settle_folder` on it, and only then
`publish_folder`, which renames.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spdtool.run.records import Record

# what file systems answer that cannot flush a folder; a real fault is another number, and is raised
NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EISDIR)
MODE_PROBE = ".mode.tmp"


def sync_file(file: Path) -> None:
    """Flush the contents of a file to the disk."""
    # Windows flushes only what is open for writing
    descriptor = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: files that were created, renamed and removed."""
    if sys.platform == "win32":  # NTFS writes names in their order, and no folder can be opened
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def create_folder(folder: Path) -> None:
    """Create a folder and the missing ones above it, all of which reach the disk."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)  # another process may be as fast
        sync_folder(path.parent)


def settle_folder(folder: Path) -> None:
    """Flush a folder with all that is below it, and make its files as readable as other new files are."""
    mode = _mode_of_new_files(folder)
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(path, name)
            if file.is_symlink():
                continue
            # safetensors writes through a temporary file, which only its owner may read
            current = stat.S_IMODE(file.stat().st_mode)
            if current | mode != current:
                file.chmod(current | mode)
            sync_file(file)
        sync_folder(Path(path))


def publish_folder(partial: Path, final: Path) -> None:
    """Rename a settled folder to a name in the same parent, which is absent; the name reaches the disk."""
    partial.rename(final)
    sync_folder(final.parent)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():  # rmtree refuses links
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all: to a sibling, flushed to disk, then renamed."""
    sibling = file.with_name(f".{file.name}.tmp")
    try:
        with sibling.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # a rename may reach the disk before the contents do
        sibling.replace(file)
        sync_folder(file.parent)
    except BaseException:  # a full disk, or Ctrl-C: no trace is left
        sibling.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Record | Mapping[str, object]) -> None:
    """Write a record as `write_text` does."""
    content = value if isinstance(value, Mapping) else value.model_dump(mode="json")
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling to create and fill; it becomes `folder` (absent or empty) on success, else is removed."""
    create_folder(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    try:
        yield partial
        settle_folder(partial)
        if folder.exists():
            folder.rmdir()  # fails unless it is empty: files of others are never removed
        publish_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _mode_of_new_files(folder: Path) -> int:
    """Return the permissions that a new file in `folder` gets: the umask can only be asked by changing it."""
    probe = folder / MODE_PROBE
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            probe.unlink()
