"""`--processes N`: the same command once for every rank on this machine, and one message if a rank ends badly.

torch's elastic agent starts the ranks, watches them, and ends the others when one ends. As often
as the recipe's `restarts` says, all are started again if one was lost, and continue from the last
snapshot; `torchrun --max-restarts` does that across machines. A rank dies with its launcher
(`ranks.py`).
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

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from spdtool import console, errors
from spdtool.errors import PeerLost, SpdError
from spdtool.ranks import FOLDER, LAUNCHER

RESUME_HINT = "the same command goes on from the last snapshot"


def launch_with_restarts(count: int, arguments: Sequence[str], restarts: int = 0) -> None:
    """Run `spdtool ARGUMENTS` in `count` processes, and return when all have ended well.

    Args:
        restarts: how often all of them are started again when one is lost; not when one reports an
            error.

    Raises:
        PeerLost: a rank was killed, or failed without a report, once more than it may.
        SpdError: what a rank has reported.
        KeyboardInterrupt, SystemExit: this process was told to end, and has ended the ranks.
    """
    for remaining in range(restarts, -1, -1):
        try:
            launch_ranks(count, arguments)
            return
        except PeerLost as error:
            if remaining == 0:
                raise
            console.warn(
                f"{error.message}; all are started again from the last snapshot, {remaining - 1} more times at most"
            )


def launch_ranks(count: int, arguments: Sequence[str]) -> None:
    """Run the ranks once; raises as `launch_with_restarts`."""
    with tempfile.TemporaryDirectory(prefix="spdtool-ranks-") as folder, rank_environment(count, folder):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",
            max_restarts=0,  # the agent would also restart ranks that have reported an error
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "spdtool", *arguments)
        except ChildFailedError as error:
            raise explain_failures(error.failures, count) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None  # as a shell reports a signal


def explain_failures(failures: Mapping[int, ProcessFailure], count: int) -> SpdError:
    """Return the error that explains why a job ended.

    A killed rank explains the complaints of the others, and the error of one rank those of its
    peers.

    Args:
        failures: by rank: its exit code (minus a signal), and what `ranks.report_failure` wrote.
        count: number of ranks.
    """
    reports = {}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM is how the agent ends the others
            return _explain_signal(rank, count, -failure.exitcode)
        report = failure.error_file_data
        if isinstance(report, dict) and "spdtool" in report:
            reports[rank] = report
    for rank, report in reports.items():
        if report["spdtool"]["error"] != PeerLost.__name__:
            return _rebuild_error(report["spdtool"], report["message"], rank)
    for rank, failure in sorted(failures.items()):
        if rank not in reports and failure.exitcode > 0:
            message = f"rank {rank} of {count} failed with exit code {failure.exitcode}; see above"
            return PeerLost(message, RESUME_HINT)
    return PeerLost(f"one of {count} processes ended without an error message", RESUME_HINT)


def _explain_signal(rank: int, count: int, number: int) -> PeerLost:
    message = f"rank {rank} of {count} was killed by {signal.Signals(number).name}"
    if number == signal.SIGKILL:
        message += "; if nobody did that, the machine ran out of memory"
    return PeerLost(message, RESUME_HINT)


def _rebuild_error(details: Mapping[str, str], message: str, rank: int) -> SpdError:
    """Return the error that a rank reported, of its own class."""
    error_class = getattr(errors, details["error"], SpdError)
    error: SpdError = error_class.__new__(error_class)
    # not through its constructor: some classes build their message from other arguments
    SpdError.__init__(error, message if rank == 0 else f"{message} (rank {rank})", details["hint"])
    return error


@contextmanager
def rank_environment(count: int, folder: str) -> Iterator[None]:
    """Set what the ranks read from their environment, and silence torch's own reports of how they ended."""
    variables = {LAUNCHER: str(os.getpid()), FOLDER: folder}
    if "OMP_NUM_THREADS" not in os.environ:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        variables["OMP_NUM_THREADS"] = str(max(1, cpus // count))  # torch would give all cores to every rank
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ |= variables
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in variables:
            del os.environ[name]
