"""Which of several training processes this one is, and how a rank ends.

`torchrun`, `accelerate launch` and `--processes` start the same command once for every rank and say
so in the environment. Rank 0, the main process, is the only one that writes, prints, and holds the
run's lock. Nothing here needs torch: `models/collectives.py` exchanges tensors,
`training/launch.py` starts the ranks of `--processes`.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import threading
import time
from typing import NoReturn

from spdtool.errors import PeerLost, SpdError
from spdtool.recipe import TRAINING

LAUNCHER = "SPDTOOL_LAUNCHER"  # process id of the `spdtool --processes` that started this rank and prints its errors
FOLDER = "SPDTOOL_LAUNCHER_FOLDER"  # temporary folder of the launcher, which it removes unless it is killed
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's elastic agent reads here why a rank ended
POLL_SECONDS = 0.5

_watches_parent = False


def world_size() -> int:
    """Return the number of processes that train together; 1 when nobody launched several."""
    return max(1, _read_number("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return _read_number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, which is the number of its device."""
    return _read_number("LOCAL_RANK", 0) if world_size() > 1 else 0


def _read_number(name: str, default: int) -> int:
    """Read a number from the environment; `default` where there is none, or something else was left over."""
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Return whether this process writes and prints."""
    return rank() == 0


def has_launcher() -> bool:
    """Return whether `spdtool --processes` started this process and will print its errors."""
    return world_size() > 1 and LAUNCHER in os.environ


def works_on(stage: str) -> bool:
    """Return whether this process has work in `stage`: every rank trains, one process does all else."""
    return stage in TRAINING or (is_main() and not has_launcher())


def report_failure(error: SpdError) -> None:
    """Write the error for the launcher of the ranks; without several ranks, do nothing."""
    file = os.environ.get(ERROR_FILE)
    if world_size() == 1 or not file:
        return
    # The keys are those that torch's agent reads; ours stand under `spdtool`.
    details = {"error": type(error).__name__, "hint": error.hint, "exit_code": error.exit_code}
    report = {"message": error.message, "timestamp": int(time.time()), "spdtool": details}
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(report, stream)


def exit_rank(code: int) -> NoReturn:
    """End this rank with an exit code, after Python's exit functions and before C++ destructors.

    The destructors free what torch's threads still use: one rank in fifty was aborted so, its work done.
    """
    atexit._run_exitfuncs()  # os._exit would skip them: temporary folders, locks
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """End this rank when its launcher dies, even by `kill -9`, so that no orphan holds the run's lock."""
    global _watches_parent
    if world_size() == 1 or _watches_parent:
        return
    _watches_parent = True
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    # A process whose parent dies gets another one.
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if has_launcher() and FOLDER in os.environ:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    os._exit(PeerLost.exit_code)
