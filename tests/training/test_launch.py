"""Failures of multi-process jobs: the launcher reports the cause, not its consequences in other ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from spdtool import ranks as processes
from spdtool.errors import GateError, PeerLost, RunError, RunLocked, SpdError, UnknownName
from spdtool.training import launch

LOST = PeerLost("another of the 2 processes has ended", "see what it said")


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(rank: int, code: int, word: SpdError | None = None) -> ProcessFailure:
        file = tmp_path / f"{rank}.json"
        if word is not None:
            monkeypatch.setenv(processes.ERROR_FILE, str(file))
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            processes.report_failure(word)
            monkeypatch.delenv("RANK")
        return ProcessFailure(rank, 100 + rank, code, str(file))

    return make


def test_a_killed_rank_is_named_as_the_cause(failed: Any) -> None:
    error = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, -signal.SIGKILL)}, 2)
    assert type(error) is PeerLost
    assert "rank 1 of 2 was killed by SIGKILL" in error.message
    assert error.hint == "the same command goes on from the last snapshot"


@pytest.mark.parametrize(
    "error",
    [RunLocked("another process is working in x", "wait"), GateError("no parity"), UnknownName("recipe", "x", "y")],
)
def test_the_error_of_a_rank_is_reported_unchanged(failed: Any, error: SpdError) -> None:
    explained = launch.explain_failures({0: failed(0, error.exit_code, error), 1: failed(1, -signal.SIGTERM)}, 2)
    assert (type(explained), explained.message, explained.hint) == (type(error), error.message, error.hint)
    assert explained.exit_code == error.exit_code


def test_the_error_of_another_rank_names_the_rank(failed: Any) -> None:
    error = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, 2, RunError("the disk is full"))}, 2)
    assert error.message == "the disk is full (rank 1)"


def test_an_exception_is_not_hidden_by_errors_of_other_ranks(failed: Any) -> None:
    error = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, 1)}, 2)
    assert "rank 1 of 2 failed with exit code 1" in error.message


def test_lost_ranks_are_restarted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[SpdError | None] = [PeerLost("rank 1 was killed"), PeerLost("rank 0 was killed"), None]

    def run(count: int, words: Any) -> None:
        if (end := ends.pop(0)) is not None:
            raise end

    monkeypatch.setattr(launch, "launch_ranks", run)
    launch.launch_with_restarts(2, ["prune"], restarts=2)
    assert ends == []
    ends += [PeerLost("rank 1 was killed"), PeerLost("rank 0 was killed"), None]
    with pytest.raises(PeerLost, match="rank 0 was killed"):
        launch.launch_with_restarts(2, ["prune"], restarts=1)
    assert ends == [None]


def test_user_errors_of_a_rank_cause_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(count: int, words: Any) -> None:
        calls.append(words)
        raise RunError("the disk is full")

    monkeypatch.setattr(launch, "launch_ranks", run)
    with pytest.raises(RunError, match="the disk is full"):
        launch.launch_with_restarts(2, ["prune"], restarts=5)
    assert len(calls) == 1


def test_ranks_write_error_files_only_for_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(processes.ERROR_FILE, str(tmp_path / "error.json"))
    processes.report_failure(LOST)
    assert not (tmp_path / "error.json").exists(), "a process that is alone tells its errors itself"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.report_failure(LOST)
    assert json.loads((tmp_path / "error.json").read_text("utf-8"))["message"] == LOST.message


def test_the_ranks_find_their_launcher_and_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with launch.rank_environment(1000, str(tmp_path)):
        assert os.environ[processes.LAUNCHER] == str(os.getpid())
        assert os.environ[processes.FOLDER] == str(tmp_path)
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


def test_a_rank_ends_with_its_launcher_and_removes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "spdtool-ranks-x"
    folder.mkdir()
    script = "import time; from spdtool import ranks as processes; processes.die_with_parent(); time.sleep(60)"
    variables = {processes.LAUNCHER: "0", processes.FOLDER: str(folder), "RANK": "0", "WORLD_SIZE": "2"}
    process = subprocess.run([sys.executable, "-c", script], env=os.environ | variables, check=False, timeout=30)
    assert process.returncode == PeerLost.exit_code
    assert not folder.exists()


@pytest.mark.parametrize("code", [0, 3])
def test_exit_rank_runs_exit_handlers_and_returns_the_code(tmp_path: Path, code: int) -> None:
    exit_mark = tmp_path / "done"
    script = "import atexit, pathlib; from spdtool import ranks as processes; print('said', end='')\n"
    script += f"atexit.register(pathlib.Path({str(exit_mark)!r}).touch); processes.exit_rank({code})"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (process.returncode, process.stdout, exit_mark.exists()) == (code, "said", True)
