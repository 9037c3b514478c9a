"""What keeps `gpu.py` within its budget, and going, when an item hangs, raises or takes the device with it."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gc
import importlib.util
import json
import os
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STDERR = 2  # the file itself: `sys.stderr` may be any object
GRACE = 3.0  # seconds in which the process is started anew; after them a thread without Python ends it
# cuBLAS reads it once. On Hopper it is the size that torch takes anyway; without it no later item can be deterministic.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def add_packages(folder: Path, vendor: Path | None) -> None:
    """Let this process, and those that it starts, import this checkout and the packages in `vendor`.

    spdtool asks for its own version, which a checkout that is not installed cannot tell: a description
    is written into `folder`.
    """
    paths = [str(ROOT)]
    if vendor is not None:
        paths.append(str(vendor.resolve()))
    try:
        metadata.version("spdtool")
    except metadata.PackageNotFoundError:
        paths.append(str(describe_checkout(folder)))
    sys.path += [path for path in paths if path not in sys.path]
    # the bench starts processes of its own
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), *paths])
    os.environ.setdefault(*CUBLAS_WORKSPACE)


def describe_checkout(folder: Path) -> Path:
    """Write what an installed spdtool has beside it: its name and version; return the folder for the path."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    description = folder / "checkout" / f"spdtool-{version}.dist-info"
    description.mkdir(parents=True)
    (description / "METADATA").write_text(f"Metadata-Version: 2.1\nName: spdtool\nVersion: {version}\n", "utf-8")
    return description.parent


def is_missing(package: str) -> bool:
    """Whether a package cannot be imported, without importing it."""
    return importlib.util.find_spec(package) is None


class Guard:
    """Ends an item that does not end by itself: the process starts anew, with the same command, and goes on behind it.

    That is done for a device that answers nothing but errors, too: after an illegal access all later
    items would fail.

    Args:
        save: writes what the new process has to know; returns its further arguments.
        report: is given the line of the item that was ended.
        can_restart: whether the process belongs to the script alone.
    """

    def __init__(
        self, save: Callable[[], list[str]], report: Callable[[dict[str, Any]], None], *, can_restart: bool
    ) -> None:
        self._save, self._report, self._can_restart = save, report, can_restart
        self._lock = threading.Lock()
        self._running: str | None = None

    @contextlib.contextmanager
    def limit(self, item: str, seconds: float, figures: dict[str, Any]) -> Iterator[None]:
        """End the block after `seconds`; what is in `figures` by then is reported."""
        if not self._can_restart:
            yield
            return
        self._running = item
        timer = threading.Timer(seconds, self._end, (item, seconds, figures))
        timer.daemon = True
        timer.start()
        # a call that never gives Python its turn again stops the timer too
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=STDERR)
        try:
            yield
        finally:
            with self._lock:  # waits for a new process that is about to start
                self._running = None
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def restart(self) -> None:
        """Start the process anew; it has the same number, so that nobody who waits for it notices."""
        if self._can_restart:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *self._save()])

    def _end(self, item: str, seconds: float, figures: dict[str, Any]) -> None:
        with self._lock:
            if self._running != item:
                return
            faulthandler.dump_traceback(file=STDERR)  # says where it hangs
            result: dict[str, Any] = {"item": item, "error": f"it did not end within {seconds:.0f} s"}
            with contextlib.suppress(RuntimeError):  # the item may be adding a figure right now
                result["measured"] = copy.deepcopy(figures)
            self._report(result | {"seconds": round(seconds, 2)})
            self.restart()


def device_is_lost(device: str) -> bool:
    """Whether every call to the GPU fails from now on, as after an illegal access to its memory."""
    torch = sys.modules.get("torch")
    if device != "cuda" or torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def tidy_up(device: str) -> None:
    """Give memory back, and put torch's switches where they were: an item may have been broken off."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    gc.collect()
    if device == "cuda" and torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


def read_state(file: Path) -> dict[str, Any]:
    """Read what the process before this one saved."""
    state: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return state


def write_state(file: Path, results: list[dict[str, Any]], seconds_left: float) -> None:
    """Save the results, and when the budget ends by the clock on the wall."""
    state = {"results": results, "end": time.time() + seconds_left}
    file.write_text(json.dumps(state, default=str), "utf-8")
