"""A sweep on Ray: trials run at once on one machine or many, each with the processors and GPUs that it declares.

Ray schedules, starts a trial again whose worker died, and ends all with the driver. What was done is in the run
folders, which every machine must see: the same command goes on with a sweep, wherever it stopped. It is an extra.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool import console, plugins
from spdtool.errors import DeviceError, RunLocked, SpdError, first_line
from spdtool.recipe import PHASES
from spdtool.run.folder import Run
from spdtool.run.records import StudentRow, SweepRecord
from spdtool.sweep import RESULT, Trial, blank, finished, make_teacher, run_trial, trial_recipe
from spdtool.sweep.early_stopping import Standings

RETRIES = 3  # of a trial whose worker died: it goes on from its last snapshot
LOOKED_AFTER = 60.0  # seconds without news after which the machines are counted again
ORPHANED = 30.0  # seconds to wait for a locked run folder: workers outlive their driver or machine by about two


class Hopeless(SpdError):
    """A trial was so far behind the others that it was stopped."""


@dataclass(frozen=True)
class Cluster:
    """Where and with what trials run; calling it performs them, as `sweep.run_sweep` wants.

    Attributes:
        address: of a Ray cluster, `auto` for that of RAY_ADDRESS or of this machine; None: one of the sweep's own.
        cpus, gpus: that each trial claims; parts of a GPU may be shared.
        behind: points below the median at which a trial is stopped as hopeless, see `standings.py`; None: never.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    behind: float | None = None

    def __call__(self, trials: Sequence[Trial]) -> Iterator[tuple[int, StudentRow]]:
        """Run the trials; yields the number and the row of each as it ends.

        Raises:
            DeviceError: Ray is not installed, its cluster does not answer, or it can never give what a trial claims.
        """
        ray = _ray()
        stopped = _stopped_before(trials) if self.behind is not None else {}
        yield from stopped.items()
        started = _start(ray, self.address)
        try:
            self._require(ray)
            yield from self._perform(ray, [(i, trial) for i, trial in enumerate(trials) if i not in stopped])
        finally:
            if started:
                ray.shutdown()

    def _perform(self, ray: Any, numbered: Sequence[tuple[int, Trial]]) -> Iterator[tuple[int, StudentRow]]:
        claims = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        teach, work = (ray.remote(_equipped(function)).options(**claims) for function in (_teach, _work))
        standings = None
        if self.behind is not None:
            lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}  # its machine may die
            standings = ray.remote(Standings).options(**lasting).remote(self.behind)
            _recall(ray, standings, [trial for _, trial in numbered])
        teachers = {trial.teacher_folder: trial for _, trial in numbered if not finished(trial)}
        taught = {folder: teach.remote(trial) for folder, trial in teachers.items()}
        pending = {work.remote(trial, standings, taught.get(trial.teacher_folder)): (i, trial) for i, trial in numbered}
        while pending:
            done, _ = ray.wait(list(pending), timeout=LOOKED_AFTER)
            if not done:
                self._require(ray)  # of the machines that are left
                continue
            number, trial = pending.pop(ready := done[0])
            try:
                yield number, ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                console.warn(str(error))  # a bug keeps its traceback, and the other trials go on
                reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"
                yield number, blank(trial).model_copy(update={"status": "failed", "error": reason})
            except ray.exceptions.RayError as error:
                reason = f"its worker died {RETRIES + 1} times: {type(error).__name__}"
                yield number, blank(trial).model_copy(update={"status": "failed", "error": reason})

    def _require(self, ray: Any) -> None:
        """Refuse claims that no machine of the cluster can meet: their trials would wait for ever."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        for name, claim in wanted.items():
            most = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
            if claim > most:
                raise DeviceError(
                    f"each trial claims {claim:g} {name}s, and the largest machine of the Ray cluster has {most:g}",
                    "lower --cpus-per-trial or --gpus-per-trial, or name another cluster with --ray",
                )


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        hint = 'pip install "spdtool[ray]", or leave --ray out'
        raise DeviceError(f"the sweep was to run on Ray, which is not there: {error}", hint) from None
    return ray


def _start(ray: Any, address: str | None) -> bool:
    """Connect to the cluster or start one; whether that was done here."""
    if ray.is_initialized():
        return False
    where = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "see `ray status`; a cluster with a token wants RAY_AUTH_MODE=token here too"
        raise DeviceError(f"no Ray cluster answers at {address}: {error}", hint) from None
    return True


def _equipped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with this process's folder of plugins, wherever it is called."""
    folder = plugins.plugin_folder()

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        plugins.use_folder(folder)
        return function(*args)

    return call


def _teach(trial: Trial) -> None:
    """Make the teacher that trials share; where it cannot be made, each of them says so itself."""
    with console.quiet():
        for _ in _attempts():
            try:
                make_teacher(trial)
            except RunLocked:
                continue
            except SpdError:
                pass
            return


def _work(trial: Trial, standings: Any, _taught: None) -> StudentRow:
    """Run a trial in a worker.

    Args:
        standings: the actor that knows how the trials stand; None: nothing is stopped.
        _taught: stands for the teacher, which Ray waits for.
    """
    with console.quiet():
        if standings is None:
            return _unlocked(trial)
        import ray

        def judge(place: float, score: float) -> None:
            reason = ray.get(standings.report.remote((trial.task, trial.sparsity), str(trial.folder), place, score))
            if reason is not None:
                raise Hopeless(reason)

        with console.listen(_Follower(trial.sparsity, judge)):
            row = _unlocked(trial)
    if _failed_of(row, Hopeless):
        return row.model_copy(update={"status": "stopped", "error": (row.error or "").partition(": ")[2]})
    return row


def _unlocked(trial: Trial) -> StudentRow:
    """Run a trial, again for a while where an orphan of a dead driver or machine still holds its folder."""
    for _ in _attempts():
        row = run_trial(trial)
        if not _failed_of(row, RunLocked):
            break
    return row


def _attempts() -> Iterator[None]:
    """Once a second, for as long as an orphan may live."""
    until = time.monotonic() + ORPHANED
    yield
    while time.monotonic() < until:
        time.sleep(1)
        yield


def _failed_of(row: StudentRow, kind: type[SpdError]) -> bool:
    return row.status == "failed" and (row.error or "").startswith(f"{kind.__name__}: ")


class _Follower:
    """Reports the dev scores of a student that has reached its sparsity, with the place of each."""

    def __init__(self, sparsity: float, judge: Any) -> None:
        self.sparsity, self.judge, self.pruned = sparsity, judge, 0.0

    def __call__(self, stage: str, steps: int, event: dict[str, Any]) -> None:
        self.pruned = event.get("sparsity") or self.pruned
        if event["event"] == "eval" and stage in PHASES and (stage != "prune" or self.pruned > self.sparsity - 1e-3):
            self.judge(PHASES.index(stage) + event["step"] / steps, event["metrics"]["score"])


def _recall(ray: Any, standings: Any, trials: Sequence[Trial]) -> None:
    """Tell the standings what finished phases of earlier sessions had reached."""
    for trial in trials:
        run = Run(trial.folder, trial_recipe(trial))
        for index, phase in enumerate(PHASES, start=1):
            if run.done(phase):
                score = run.training_result(phase).score
                ray.get(standings.report.remote((trial.task, trial.sparsity), str(trial.folder), float(index), score))


def _stopped_before(trials: Sequence[Trial]) -> dict[int, StudentRow]:
    """The rows of trials that an earlier session of the sweep stopped, by their numbers."""
    file = Path(trials[0].out) / RESULT
    if not file.is_file():
        return {}
    rows = SweepRecord.model_validate(json.loads(file.read_text("utf-8"))).rows
    stopped = {row.run: row for row in rows if row.status == "stopped"}
    folders = [blank(trial).run for trial in trials]
    return {number: stopped[folder] for number, folder in enumerate(folders) if folder in stopped}
