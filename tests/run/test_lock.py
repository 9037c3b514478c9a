"""The lock of a run folder lets one process in at a time, on file systems without locks too."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spdtool.errors import RunLocked
from spdtool.run import lock
from spdtool.run.lock import LOCK, lock_folder

HOLDER = """
import fcntl, sys, time
from pathlib import Path
from spdtool.run.lock import lock_folder
def refuse(*_):
    raise OSError(int(sys.argv[2]), "no locks here")
if int(sys.argv[2]):
    fcntl.flock = refuse
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def lock_in_another_process(folder: Path, number: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Lock `folder` in another process; flock fails there with the errno `number` unless that is 0."""
    words = [sys.executable, "-c", HOLDER, str(folder), str(number)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_warned", False)


def require_locked(folder: Path) -> RunLocked:
    with pytest.raises(RunLocked) as error, lock_folder(folder):
        pytest.fail("two hold it")
    return error.value


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with lock_in_another_process(tmp_path):
        assert "another process is working in" in require_locked(tmp_path).message
        for file in tmp_path.iterdir():  # removing files by hand does not release the lock
            file.unlink()
        require_locked(tmp_path)
    with lock_folder(tmp_path):
        require_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_replaced_while_it_was_locked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    flock = fcntl.flock

    def replace(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        folder.rename(tmp_path / "moved")
        folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", replace)
    require_locked(folder)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_a_file_keeps_others_out_and_dies_with_its_process(
    tmp_path: Path, without_locks: None, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    with lock_in_another_process(tmp_path, number) as process:
        assert json.loads((tmp_path / LOCK).read_text())["process"] == process.pid
        require_locked(tmp_path)
    assert (tmp_path / LOCK).exists(), "it was killed"
    for _ in range(2):
        with lock_folder(tmp_path):
            require_locked(tmp_path)
        assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 1


def test_another_error_of_the_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), lock_folder(tmp_path):
        pass


def test_a_lock_file_of_a_process_that_has_ended_is_ignored(tmp_path: Path, without_locks: None) -> None:
    this_process = lock._describe_process(os.getpid())
    live_owners = {"this process": this_process}
    dead_owners = {
        "before the last boot": this_process | {"boot": "another"},
        "a number that was used before": this_process | {"started": "1"},
        "no process": this_process | {"process": 2**22 + 1},
        "not a number": this_process | {"process": "x"},
        "nothing": {"host": this_process["host"]},
    }
    for name, owner in (live_owners | dead_owners).items():
        (tmp_path / LOCK).write_text(json.dumps(owner))
        if name in live_owners:
            require_locked(tmp_path)
        else:
            with lock_folder(tmp_path):
                pass
            assert list(tmp_path.iterdir()) == [], name


def test_a_lock_file_of_another_machine_is_respected(tmp_path: Path, without_locks: None) -> None:
    (tmp_path / LOCK).write_text(json.dumps(lock._describe_process(1) | {"host": "elsewhere"}))
    error = require_locked(tmp_path)
    assert "a process on elsewhere is working" in error.message
    assert f"remove {tmp_path / LOCK}" in (error.hint or "")


def test_a_lock_file_that_was_cut_off_is_dead_after_a_while(tmp_path: Path, without_locks: None) -> None:
    for content in ("", "{", "[1]"):
        (tmp_path / LOCK).write_text(content)
        require_locked(tmp_path)
        os.utime(tmp_path / LOCK, (0, 0))
        with lock_folder(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_somebody_else_is_not_removed(tmp_path: Path, without_locks: None) -> None:
    with lock_folder(tmp_path):
        (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere"}))
    assert (tmp_path / LOCK).exists()
    shutil.rmtree(tmp_path)
