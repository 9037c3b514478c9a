"""SIGINT, SIGTERM and SIGHUP during training: the first lets the step end and a snapshot be saved, the second ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from spdtool import console
from spdtool.errors import Stopped
from spdtool.models import collectives

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # by name: Windows has no SIGHUP


class StopRequest:
    """The first signal that asked this process, or another rank, to end, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def agree(self) -> bool:
        """Return whether a signal asked any rank to end. Collective: call on every rank, after the same step."""
        number = collectives.max_over_ranks(self.signal or 0)
        if number:
            self.signal = signal.Signals(number)
        return number > 0

    def raise_stopped(self, stage: str, step: int, steps: int) -> NoReturn:
        """Raise Stopped for a stage that has saved a snapshot after step `step` of `steps`."""
        assert self.signal is not None
        raise Stopped(
            f"{stage} was stopped by {self.signal.name} and saved step {step:,} of {steps:,}; "
            "the same command goes on from there",
            128 + self.signal,
        )


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Note the first signal inside the block instead of ending. The handlers are put back then, or at the end."""
    request = StopRequest()
    # Python delivers signals to the main thread alone, and lets no other one ask for them
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()  # a second one ends at once
        console.warn_from_signal(f"{request.signal.name}: saving after this step; once more to end at once")

    for name in SIGNALS:
        number = getattr(signal, name, None)
        # None: set by C code, such as an embedding program's; ignored: by nohup, which must go on
        if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
            before[number] = signal.signal(number, remember)
    try:
        yield request
    finally:
        restore()
