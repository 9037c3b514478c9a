"""Why a job of several processes ended: the cause is told, not what it did to the others."""

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


def test_a_killed_rank_is_named_whatever_its_peers_say_of_it(failed: Any) -> None:
    found = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, -signal.SIGKILL)}, 2)
    assert type(found) is PeerLost
    assert "rank 1 of 2 was killed by SIGKILL" in found.message
    assert found.hint == "the same command goes on from the last snapshot"


@pytest.mark.parametrize(
    "error",
    [RunLocked("another process is working in x", "wait"), GateError("no parity"), UnknownName("recipe", "x", "y")],
)
def test_what_a_rank_said_is_told_as_it_said_it(failed: Any, error: SpdError) -> None:
    found = launch.explain_failures({0: failed(0, error.exit_code, error), 1: failed(1, -signal.SIGTERM)}, 2)
    assert (type(found), found.message, found.hint) == (type(error), error.message, error.hint)
    assert found.exit_code == error.exit_code


def test_another_rank_says_which_it_is(failed: Any) -> None:
    found = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, 2, RunError("the disk is full"))}, 2)
    assert found.message == "the disk is full (rank 1)"


def test_a_bug_is_not_hidden_by_the_complaints_of_the_peers(failed: Any) -> None:
    found = launch.explain_failures({0: failed(0, 2, LOST), 1: failed(1, 1)}, 2)
    assert "rank 1 of 2 failed with exit code 1" in found.message


def test_ranks_are_started_again_as_often_as_asked_if_one_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_a_rank_complains_of_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(count: int, words: Any) -> None:
        calls.append(words)
        raise RunError("the disk is full")

    monkeypatch.setattr(launch, "launch_ranks", run)
    with pytest.raises(RunError, match="the disk is full"):
        launch.launch_with_restarts(2, ["prune"], restarts=5)
    assert len(calls) == 1


def test_words_are_left_only_where_someone_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_rank_without_its_launcher_ends_and_removes_what_that_has_left(tmp_path: Path) -> None:
    left = tmp_path / "spdtool-ranks-x"
    left.mkdir()
    script = "import time; from spdtool import ranks as processes; processes.die_with_parent(); time.sleep(60)"
    launched = {processes.LAUNCHER: "0", processes.FOLDER: str(left), "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | launched, check=False, timeout=30)
    assert done.returncode == PeerLost.exit_code
    assert not left.exists()


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_with_its_code_and_what_is_registered_is_done(tmp_path: Path, code: int) -> None:
    done = tmp_path / "done"
    script = "import atexit, pathlib; from spdtool import ranks as processes; print('said', end='')\n"
    script += f"atexit.register(pathlib.Path({str(done)!r}).touch); processes.exit_rank({code})"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout, done.exists()) == (code, "said", True)
