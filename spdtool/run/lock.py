"""The lock of a run folder: one process writes to it at a time.

The folder itself is locked (`flock`), so there is no lock file that could be removed, and the lock
dies with its process. File systems without such locks get a file instead, which names the process
that holds it: host, boot, number and start. Whoever meets it can tell a living owner from a dead
one, unless the owner is on another host.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spdtool import console
from spdtool.errors import RunLocked

LOCK = ".lock"
# no such call, no locks on this file system, or none for folders (NFS)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL, errno.EISDIR)
WRITING_SECONDS = 10.0
Owner = dict[str, str | int]

_warned = False


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder`, which exists, for the length of the block.

    Raises:
        RunLocked: another process holds it.
    """
    descriptor = _lock_descriptor(folder)
    if descriptor is not None:
        try:
            yield
        finally:
            os.close(descriptor)
        return
    owner = _create_lock_file(folder)
    try:
        yield
    finally:
        if _read_owner(folder / LOCK) == owner:
            (folder / LOCK).unlink()


def _lock_descriptor(folder: Path) -> int | None:
    """Lock the folder; return the descriptor whose closing unlocks it, or None where folders cannot be locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked, current = os.fstat(descriptor), os.stat(folder)
    except BlockingIOError:
        os.close(descriptor)
        raise _locked(folder) from None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_LOCKS:
            raise
        _warn_once(folder, error)
        return None
    if (locked.st_dev, locked.st_ino) != (current.st_dev, current.st_ino):  # replaced between the two calls
        os.close(descriptor)
        raise _locked(folder)
    return descriptor


def _warn_once(folder: Path, error: OSError) -> None:
    """Say that the file system of `folder` has no locks."""
    global _warned
    if not _warned:
        console.warn(
            f"{folder} cannot be locked ({error.strerror}): "
            f"the file {LOCK} in it, which names this process, keeps others out instead"
        )
    _warned = True


def _create_lock_file(folder: Path) -> Owner:
    """Create the lock file, in place of one whose process is dead; return its contents.

    Raises:
        RunLocked: its process lives, or cannot be asked.
    """
    owner, file = _describe_process(os.getpid()), folder / LOCK
    for _ in range(2):
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            _remove_dead_lock(file)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(owner, stream)
        return owner
    raise _locked(folder)  # another process was faster


def _remove_dead_lock(file: Path) -> None:
    """Remove a lock file whose process is dead.

    Raises:
        RunLocked: its process lives, or cannot be asked.
    """
    before = _read_owner(file)
    if before is not None and before.get("host") != platform.node():
        raise RunLocked(
            f"a process on {before.get('host')} is working in {file.parent}",
            f"wait for it, or give another --run; if that machine is gone, remove {file}",
        )
    if _is_alive(before) if before is not None else _is_being_written(file):
        raise _locked(file.parent)
    # renamed first: of several that meet a dead lock, one gets it
    aside = file.with_name(f"{LOCK}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if _read_owner(aside) != before:  # another process was faster, and this is its lock
            with suppress(FileExistsError):
                os.link(aside, file)
            aside.unlink()
            raise _locked(file.parent)
        aside.unlink()


def _read_owner(file: Path) -> Owner | None:
    """Return what a lock file holds; None where it is missing, or was cut off by a crash."""
    try:
        owner = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_being_written(file: Path) -> bool:
    """Whether a lock file without an owner is so young that its process may not have written it yet."""
    try:
        return time.time() - file.stat().st_mtime < WRITING_SECONDS
    except FileNotFoundError:
        return False


def _describe_process(number: int) -> Owner:
    """Describe a process of this machine such that no later one is described alike."""
    return {"host": platform.node(), "boot": _boot(), "process": number, "started": _start_time(number)}


def _boot() -> str:
    """Return the name of this boot, where the system has one: process numbers begin anew with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _start_time(number: int) -> str:
    """Return when a process started, in ticks since the boot; empty where the system does not say."""
    try:
        status = Path(f"/proc/{number}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    # the name of the program stands in brackets, and may hold spaces and brackets
    return status.rpartition(")")[2].split()[19]


def _is_alive(owner: Owner) -> bool:
    """Whether the process that a lock file names is alive on this machine."""
    number = owner.get("process")
    if not isinstance(number, int) or owner.get("boot") != _boot():
        return False
    if sys.platform == "win32":  # there, signal 0 would end it; a lock that is left must be removed by hand
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return owner == _describe_process(number)


def _locked(folder: Path) -> RunLocked:
    return RunLocked(f"another process is working in {folder}", "wait for it, or give another --run")
