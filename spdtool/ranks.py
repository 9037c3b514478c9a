"""Several processes that train one model: which of them this one is, and how they end.

`torchrun`, `accelerate launch` and `--processes` start the same command once for every rank and say so in the
environment. Rank 0, the main process, is the only one that writes, speaks, and holds the run's lock. Nothing here
needs torch; `collectives.py` is how ranks exchange tensors, `launcher.py` how `--processes` starts them.
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
from spdtool.recipe.fields import TRAINING

LAUNCHER = "SPDTOOL_LAUNCHER"  # process id of the `spdtool --processes` that started this rank, and tells its errors
FOLDER = "SPDTOOL_LAUNCHER_FOLDER"  # its temporary folder, which it removes unless it is killed
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's elastic agent looks for what a rank died of

_watched = False


def count() -> int:
    """How many processes there are; 1 when nobody launched several."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def local_rank() -> int:
    """Its number among those on this machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def has_launcher() -> bool:
    """Whether `spdtool --processes` started this process and will tell its errors."""
    return count() > 1 and LAUNCHER in os.environ


def takes_part(stage: str) -> bool:
    """Whether this process has work in `stage`: one that is not training is done by one process."""
    return stage in TRAINING or (is_main() and not has_launcher())


def leave_word(error: SpdError) -> None:
    """Tell whoever launched the ranks what this one ends with; without several ranks, do nothing."""
    file = os.environ.get(ERROR_FILE)
    if count() == 1 or not file:
        return
    said = {"error": type(error).__name__, "hint": error.hint, "exit_code": error.exit_code}
    word = {"message": error.message, "timestamp": int(time.time()), "spdtool": said}
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(word, stream)


def leave(code: int) -> NoReturn:
    """End this rank with an exit code, once Python has done what is registered for its end.

    C++ would then destroy what torch's threads still use: one rank in fifty was aborted so, after its work was done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent() -> None:
    """From now on die when the process that launched this rank dies, by `kill -9` too: no orphan holds the lock."""
    global _watched
    if count() == 1 or _watched:
        return
    _watched = True
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    if has_launcher() and FOLDER in os.environ:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    os._exit(PeerLost.exit_code)
