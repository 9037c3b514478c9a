"""Simulate power cuts: record the worst states that a file system may leave at any moment.

`recording(root)` wraps functions of `os`. Before and after every call that creates, renames, removes or flushes, it
records the worst legal states of `root`, without repetition. Bytes that were not flushed (`os.fsync`) are lost. Names
have two extremes: all changes since the last flush of their folder are lost, or all are there with empty files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

WATCHED = ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync")

Node = dict[str, Any]
"""Name to the bytes of a file, or to the `Node` of a folder."""


class PowerCuts:
    """The states of `root` that power cuts could have left.

    Attributes:
        states: by moment, in order, without repetition; `write_state` turns one into files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: dict[str, Node] = {}
        # by inode: the bytes of a file, or the names in a folder, when they were last flushed
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._folders: set[int] = set()
        self._alive: list[int] = []  # open descriptors: a removed inode's number would be used again
        self._settle(root)

    def on_fsync(self, descriptor: int) -> None:
        """Record that the file or folder of a descriptor has reached the disk."""
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = self._read_names(f"/proc/self/fd/{descriptor}")
        else:
            self._contents[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def note_states(self, moment: str) -> None:
        """Record the worst states at this moment."""
        self._read_names(self.root)  # pins new files before they can be removed
        for kind, state in (
            ("names lost", self._flushed(self._inode(self.root))),
            ("names there", self._live(self.root)),
        ):
            if state not in self.states.values():
                self.states[f"{len(self.states)}: {kind}, {moment}"] = state

    def close(self) -> None:
        for descriptor in self._alive:
            os.close(descriptor)

    def _inode(self, path: Path | str) -> int:
        return os.stat(path).st_ino

    def _pin(self, path: str) -> int:
        """Hold an inode open, so that its number is not used again."""
        status = os.stat(path)
        is_pinned = status.st_ino in self._contents or status.st_ino in self._folders
        if not is_pinned:
            self._alive.append(os.open(path, os.O_RDONLY))
            if stat.S_ISDIR(status.st_mode):
                self._folders.add(status.st_ino)
            else:
                self._contents[status.st_ino] = b""
        return status.st_ino

    def _read_names(self, folder: Path | str) -> dict[str, int]:
        names = {}
        for entry in os.scandir(folder):
            names[entry.name] = self._pin(f"{folder}/{entry.name}")
            if entry.is_dir(follow_symlinks=False):
                self._read_names(f"{folder}/{entry.name}")
        return names

    def _settle(self, folder: Path) -> None:
        """Treat all files at the start as flushed."""
        self._folders.add(self._inode(folder))
        self._names[self._inode(folder)] = self._read_names(folder)
        for path in folder.iterdir():
            if path.is_dir():
                self._settle(path)
            else:
                self._contents[self._inode(path)] = path.read_bytes()

    def _flushed(self, inode: int) -> Node:
        state: Node = {}
        for name, child in self._names.get(inode, {}).items():
            state[name] = self._flushed(child) if child in self._folders else self._contents[child]
        return state

    def _live(self, folder: Path) -> Node:
        state: Node = {}
        for path in sorted(folder.iterdir()):
            state[path.name] = self._live(path) if path.is_dir() else self._contents[self._inode(path)]
        return state


@contextmanager
def recording(root: Path) -> Iterator[PowerCuts]:
    """Record the worst states of `root` around every call of this process that changes or flushes a name."""
    cuts = PowerCuts(root)

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            moment = f"{name} {Path(str(arguments[0])).name}"
            cuts.note_states(f"before {moment}")
            result = original(*arguments, **options)
            if name == "fsync":
                cuts.on_fsync(arguments[0])
            cuts.note_states(f"after {moment}")
            return result

        return call

    with ExitStack() as stack:
        for name in WATCHED:
            stack.enter_context(mock.patch.object(os, name, watch(name, getattr(os, name))))
        yield cuts
    cuts.close()


def write_state(state: Node, folder: Path) -> None:
    """Write a recorded state as a new folder."""
    folder.mkdir()
    for name, content in state.items():
        if isinstance(content, dict):
            write_state(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def leave_out(state: Node, names: Sequence[str]) -> Node:
    """Return a state without the files and folders of these names, wherever they are."""
    remaining: Node = {}
    for name, content in state.items():
        if name not in names:
            remaining[name] = leave_out(content, names) if isinstance(content, dict) else content
    return remaining
