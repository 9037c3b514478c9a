"""`--processes N`: the same command once for every rank on this machine, and one message if a rank ends badly.

torch's elastic agent starts the ranks, watches them, and ends the others when one ends. As often as the recipe's
`restarts` says, all are started again if one was lost, and go on from the last snapshot; `torchrun --max-restarts` does
that across machines. A rank dies with its launcher (`processes.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from spdtool import console, errors
from spdtool.errors import PeerLost, SpdError
from spdtool.ranks import FOLDER, LAUNCHER

GO_ON = "the same command goes on from the last snapshot"


def launch(count: int, words: Sequence[str], restarts: int = 0) -> None:
    """Run `spdtool WORDS` in `count` processes, and return when all have ended well.

    Args:
        restarts: how often all of them are started again when one is lost; not when one says what is wrong.

    Raises:
        PeerLost: a rank was killed, or failed without a word, once more than it may.
        SpdError: what a rank has said.
        KeyboardInterrupt, SystemExit: this process was told to end, and has ended the ranks.
    """
    for left in range(restarts, -1, -1):
        try:
            _run(count, words)
            return
        except PeerLost as error:
            if left == 0:
                raise
            console.warn(
                f"{error.message}; all are started again from the last snapshot, {left - 1} more times at most"
            )


def _run(count: int, words: Sequence[str]) -> None:
    """The ranks, once; raises as `launch` does."""
    with tempfile.TemporaryDirectory(prefix="spdtool-ranks-") as folder, _for_ranks(count, folder):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "spdtool", *words)
        except ChildFailedError as error:
            raise verdict(error.failures, count) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


def verdict(failures: Mapping[int, Any], count: int) -> SpdError:
    """Why a job ended, from how its ranks did.

    A rank that was killed explains the others' complaints, and a rank's own error those of its peers. SIGTERM is how
    the agent ends the rest.

    Args:
        failures: rank to torch's `ProcessFailure`: its exit code (minus a signal), and what `leave_word` wrote.
    """
    killed = {rank: -f.exitcode for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    for rank, number in sorted(killed.items()):
        memory = "; if nobody did that, the machine ran out of memory" if number == signal.SIGKILL else ""
        return PeerLost(f"rank {rank} of {count} was killed by {signal.Signals(number).name}{memory}", GO_ON)
    words = {rank: f.error_file_data["spdtool"] | f.error_file_data for rank, f in _with_word(failures)}
    for rank, word in sorted(words.items()):
        if word["error"] != PeerLost.__name__:
            return _error(word, rank)
    for rank, failure in sorted(failures.items()):
        if rank not in words and failure.exitcode > 0:
            return PeerLost(f"rank {rank} of {count} failed with exit code {failure.exitcode}; see above", GO_ON)
    return PeerLost(f"a process of {count} has ended, and said nothing", GO_ON)


def _with_word(failures: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
    for rank, failure in failures.items():
        if isinstance(failure.error_file_data, dict) and "spdtool" in failure.error_file_data:
            yield rank, failure


def _error(word: Mapping[str, Any], rank: int) -> SpdError:
    """The error that a rank left word of, as the kind that it was."""
    kind = getattr(errors, word["error"], SpdError)
    message = word["message"] if rank == 0 else f"{word['message']} (rank {rank})"
    error: SpdError = kind.__new__(kind)
    SpdError.__init__(error, message, word["hint"])  # some kinds make their message of other arguments
    return error


@contextmanager
def _for_ranks(count: int, folder: str) -> Iterator[None]:
    """What the ranks find in their environment; torch's own reports of how they ended are left out."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {LAUNCHER: str(os.getpid()), FOLDER: folder}
    own |= {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cpus // count))}
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ |= own
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in own:
            del os.environ[name]
