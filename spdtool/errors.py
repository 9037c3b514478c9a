"""Every error that a user of spdtool can cause, as one small tree.

    SpdError                 exit 2: the request cannot be carried out as it was made
    ├── RecipeError          a setting is unknown, ill-typed or contradicts another one
    │   └── UnknownName      a name that no registry holds; carries the near matches
    ├── DataError            a data file is missing, empty, ragged, badly encoded or wrongly labelled
    ├── ModelError           a checkpoint cannot be read, or its architecture is not supported
    ├── RunError             the run folder does not allow what was asked
    │   ├── StageMissing     a stage was asked for before its predecessor
    │   ├── RunMismatch      the folder belongs to another recipe, or to other rows
    │   ├── RunLocked        another process is working in the folder
    │   ├── PeerLost         one of several processes that train together has ended
    │   └── Corrupt          a file differs from the sha256 in stage.json
    ├── PluginError          a plugin is needed and did not load
    ├── DeviceError          a device, provider or runtime was demanded and is not there
    └── GateError            exit 3: the work was done, and what came out is refused

The command line shows these without a traceback: what was asked, what was found, what to try.
A signal during training is no error: a snapshot is saved, and the exit code is 130 (SIGINT), 143 (SIGTERM) or 129
(SIGHUP).
Anything else that is raised is a bug of ours, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

LISTED = 30  # known names in a message; a longer list helps nobody
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
REFUSED_PATH = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


LONGEST_MESSAGE = 1000  # characters, of a message about data


class SpdError(Exception):
    """An error whose cause lies with the request. `hint` says what to try next."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(SpdError):
    """A setting is unknown, ill-typed, or contradicts another one."""


class UnknownName(RecipeError):
    """A name that nothing answers to; the message lists the near matches."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str | None = None) -> None:
        known = sorted(known)
        # Names are lower case, so a capital is no reason to miss one.
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        if near:
            guess = f"did you mean {' or '.join(map(repr, near))}?"
        else:
            guess = f"known: {', '.join(known[:LISTED]) or 'none'}"
            if len(known) > LISTED:
                guess += " and more"
        if hint:
            guess += f" {hint}"
        super().__init__(f"there is no {kind} {name!r}", guess)
        self.near = near


class DataError(SpdError):
    """A data file is missing, empty, ragged, badly encoded, or wrongly labelled.

    Its message may quote a cell of any length, so the middle of a long message is left out.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(_shorten(message), None if hint is None else _shorten(hint))


def _shorten(message: str) -> str:
    """Leave out the middle of a long message."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]} … {message[-half:]}"


class ModelError(SpdError):
    """A checkpoint cannot be read, or its architecture is not supported."""


class RunError(SpdError):
    """The run folder does not allow what was asked."""


class StageMissing(RunError):
    """A stage was asked for before the one that it reads."""


class RunMismatch(RunError):
    """The run folder was made by another recipe, or of other rows."""


class RunLocked(RunError):
    """Another living process works in this run folder."""


class PeerLost(RunError):
    """One of the processes that train together has ended, and the others cannot go on without it."""


class Corrupt(RunError):
    """A file of a finished stage is not the file that the stage wrote."""


class PluginError(SpdError):
    """A plugin that is needed did not load."""


class DeviceError(SpdError):
    """A device, an execution provider or a runtime was demanded and is not there."""


class GateError(SpdError):
    """The work was done and its result is refused: inexact sparsity, lost parity, a budget exceeded."""

    exit_code = 3


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end, and the training stage has saved its state. No fault of anybody's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code  # 128 + the signal, as a shell reports it


def explain_machine_error(error: Exception) -> SpdError | None:
    """Return what the machine ran out of or does not allow, if that is what happened."""
    number = getattr(error, "errno", None)
    # safetensors raises a class of its own, which is no OSError.
    if number in OUT_OF_SPACE or "No space left on device" in str(error):
        hint = "free some space; the same command goes on from the last snapshot"
        return RunError(f"the disk is full: {error}", hint)
    micro_batches = "use smaller micro-batches: --set prune.accumulate=2"
    # torch's class has this name; torch itself may not be imported here.
    if type(error).__name__ == "OutOfMemoryError":
        return DeviceError(f"out of device memory: {error}", micro_batches)
    if isinstance(error, MemoryError):
        return DeviceError(f"out of memory: {error}", micro_batches)
    if number in REFUSED_PATH:
        return RunError(
            f"not possible here: {error}",
            "check the path and its permissions, or give another --run",
        )
    return None


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
