"""Signals during training: the first is recorded, the second ends the process, and handlers are restored."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from spdtool.errors import Stopped
from spdtool.training.signals import SIGNALS, StopRequest, watch_signals

NUMBERS = [getattr(signal, name) for name in SIGNALS]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_recorded_and_reported(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number_of_signal) for number_of_signal in NUMBERS]
    with watch_signals() as stop:
        assert stop.signal is None
        send(number)
        assert stop.signal == number
    assert [signal.getsignal(number_of_signal) for number_of_signal in NUMBERS] == before
    name = signal.Signals(number).name
    assert f"{name}: saving after this step; once more to end at once" in capfd.readouterr().err
    with pytest.raises(Stopped, match=f"prune was stopped by {name} and saved step 1,200 of 3,000") as error:
        stop.raise_stopped("prune", 1200, 3000)
    assert error.value.exit_code == 128 + number


def test_the_second_signal_ends_the_process_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), watch_signals():
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    """A run under nohup continues after its terminal has closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watch_signals() as stop:
            send(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_not_watched_in_another_thread() -> None:
    handlers: list[object] = []

    def watch() -> None:
        with watch_signals() as stop:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert isinstance(stop, StopRequest)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_single_process_agrees_on_its_own_signal() -> None:
    with watch_signals() as stop:
        assert not stop.agree()
        send(signal.SIGTERM)
        assert stop.agree()
        assert stop.signal == signal.SIGTERM
