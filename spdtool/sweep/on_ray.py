"""A sweep on Ray: trials run at once on one machine or many, each with the processors and GPUs that it declares.

Ray schedules, starts a trial again whose worker died, and ends all with the driver. Progress is in
the run folders, which every machine must see: the same command goes on with a sweep, wherever it
stopped. Ray is an optional dependency.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from spdtool import console, plugins
from spdtool.errors import DeviceError, RunLocked, SpdError, first_line
from spdtool.recipe import PHASES
from spdtool.run.folder import Run
from spdtool.run.records import StudentRow, SweepRecord
from spdtool.sweep.early_stopping import MedianStopping
from spdtool.sweep.run_sweep import RESULT, failed_row, run_trial, train_teacher, unmeasured_row
from spdtool.sweep.trials import Trial, is_finished, trial_recipe

if TYPE_CHECKING:
    from types import ModuleType

P = ParamSpec("P")
T = TypeVar("T")

RETRIES = 3  # of a trial whose worker died: it goes on from its last snapshot
POLL_SECONDS = 60.0  # without news, after which the machines are counted again
ORPHAN_SECONDS = 30.0  # to wait for a locked run folder: workers outlive their driver by about two
SPARSITY_TOLERANCE = 1e-3  # scores count from here on: whole weights rarely make the exact share


class TrialStopped(SpdError):
    """A trial was so far behind the others that it was stopped."""


@dataclass(frozen=True)
class Cluster:
    """Where and with what trials run; calling it runs them, as `run_sweep` wants.

    Attributes:
        address: of a Ray cluster, `auto` for that of RAY_ADDRESS or of this machine; None: one for
            this sweep alone.
        cpus, gpus: that each trial claims; fractions of a GPU may be shared.
        margin: points below the median at which a trial is stopped, see `early_stopping.py`; None: never.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    margin: float | None = None

    def __call__(self, trials: Sequence[Trial]) -> Iterator[tuple[int, StudentRow]]:
        """Run the trials; yield the index and the row of each as it ends.

        Raises:
            DeviceError: Ray is not installed, its cluster does not answer, or it can never give
                what a trial claims.
        """
        ray = _import_ray()
        stopped = {}
        if self.margin is not None:
            stopped = _read_stopped(trials)
        yield from stopped.items()
        connected = _connect(ray, self.address)  # a connection of the caller's is not shut down
        try:
            self._require_claims(ray)
            remaining = {i: trial for i, trial in enumerate(trials) if i not in stopped}
            yield from self._run_all(ray, remaining)
        finally:
            if connected:
                ray.shutdown()

    def _run_all(self, ray: ModuleType, trials: dict[int, Trial]) -> Iterator[tuple[int, StudentRow]]:
        claims = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        remote_teacher = ray.remote(_with_plugins(train_teacher_in_worker)).options(**claims)
        remote_trial = ray.remote(_with_plugins(run_trial_in_worker)).options(**claims)
        stopping = None
        if self.margin is not None:
            endless = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}  # the actor's machine may die
            stopping = ray.remote(MedianStopping).options(**endless).remote(self.margin)
            _report_finished_phases(ray, stopping, trials.values())
        teachers = {}
        for trial in trials.values():
            if trial.teacher_folder not in teachers and not is_finished(trial):
                teachers[trial.teacher_folder] = remote_teacher.remote(trial)
        pending = {}
        for index, trial in trials.items():
            # Ray starts a task when its arguments are there: so each trial waits for its teacher
            task = remote_trial.remote(trial, stopping, teachers.get(trial.teacher_folder))
            pending[task] = index
        while pending:
            done, _ = ray.wait(list(pending), timeout=POLL_SECONDS)
            if not done:
                self._require_claims(ray)  # a machine may be gone for good
                continue
            index = pending.pop(done[0])
            try:
                yield index, ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                console.warn(str(error))  # a bug is printed with its traceback, and the others go on
                reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"
                yield index, failed_row(trials[index], reason)
            except ray.exceptions.RayError as error:
                reason = f"its worker died {RETRIES + 1} times: {type(error).__name__}"
                yield index, failed_row(trials[index], reason)

    def _require_claims(self, ray: ModuleType) -> None:
        """Refuse claims that no machine of the cluster can meet: their trials would wait for ever."""
        for name, claim in (("CPU", self.cpus), ("GPU", self.gpus)):
            alive = [node for node in ray.nodes() if node["Alive"]]
            most = max((node["Resources"].get(name, 0) for node in alive), default=0)
            if claim > most:
                raise DeviceError(
                    f"each trial claims {claim:g} {name}s, and the largest machine of the Ray cluster has {most:g}",
                    "lower --cpus-per-trial or --gpus-per-trial, or name another cluster with --ray",
                )


def train_teacher_in_worker(trial: Trial) -> None:
    """Train the teacher that trials share; where it cannot be trained, each of them says so itself."""
    with console.quiet():
        for _ in _attempts():
            try:
                train_teacher(trial)
            except RunLocked:  # by an orphan, which ends soon
                continue
            except SpdError:
                pass
            return


def run_trial_in_worker(trial: Trial, stopping: Any, _teacher: None) -> StudentRow:
    """Run a trial in a worker.

    Args:
        stopping: Ray's handle of a `MedianStopping`; None: nothing is stopped.
        _teacher: result of the teacher's task, for which Ray waits.
    """
    with console.quiet():
        if stopping is None:
            return run_unlocked_trial(trial)
        import ray

        def report(progress: float, score: float) -> None:
            group = (trial.task, trial.sparsity)
            reason = ray.get(stopping.report.remote(group, str(trial.folder), progress, score))
            if reason is not None:
                raise TrialStopped(reason)

        with console.listen(_ScoreListener(trial.sparsity, report)):
            row = run_unlocked_trial(trial)
    if _failed_with(row, TrialStopped):
        row.status, row.error = "stopped", (row.error or "").partition(": ")[2]
    return row


def run_unlocked_trial(trial: Trial) -> StudentRow:
    """Run a trial, again for a while where an orphan of a dead driver or machine still locks its folder."""
    for _ in _attempts():
        row = run_trial(trial)
        if not _failed_with(row, RunLocked):
            break
    return row


class _ScoreListener:
    """Reports the dev scores of a student that has reached its sparsity, with the progress of each."""

    def __init__(self, sparsity: float, report: Callable[[float, float], None]) -> None:
        self._target, self._report, self._sparsity = sparsity, report, 0.0

    def __call__(self, stage: str, steps: int, event: dict[str, Any]) -> None:
        self._sparsity = event.get("sparsity") or self._sparsity  # evaluations do not say it
        if event["event"] != "eval" or stage not in PHASES:
            return
        if stage != "prune" or self._sparsity > self._target - SPARSITY_TOLERANCE:
            self._report(PHASES.index(stage) + event["step"] / steps, event["metrics"]["score"])


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        hint = 'pip install "spdtool[ray]", or leave --ray out'
        raise DeviceError(f"the sweep was to run on Ray, which is not there: {error}", hint) from None
    return ray  # type: ignore[no-any-return]


def _connect(ray: ModuleType, address: str | None) -> bool:
    """Connect to the cluster or start one; return False where this process was connected already."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"address": "local", "include_dashboard": False}
    if address:
        options = {"address": address}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "see `ray status`; a cluster with a token wants RAY_AUTH_MODE=token here too"
        raise DeviceError(f"no Ray cluster answers at {address}: {error}", hint) from None
    return True


def _with_plugins(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap `function` so that it sees this process's folder of plugins, wherever it is called."""
    folder = plugins.plugin_folder()

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        plugins.use_folder(folder)
        return function(*args, **kwargs)

    return call


def _attempts() -> Iterator[None]:
    """Yield once a second, for as long as an orphan may live."""
    until = time.monotonic() + ORPHAN_SECONDS
    yield
    while time.monotonic() < until:
        time.sleep(1)
        yield


def _failed_with(row: StudentRow, kind: type[SpdError]) -> bool:
    return row.status == "failed" and (row.error or "").startswith(f"{kind.__name__}: ")


def _report_finished_phases(ray: ModuleType, stopping: Any, trials: Iterable[Trial]) -> None:
    """Report the scores of phases that earlier sessions of the sweep have finished."""
    for trial in trials:
        run = Run(trial.folder, trial_recipe(trial))
        for index, phase in enumerate(PHASES, start=1):
            if run.done(phase):
                group, score = (trial.task, trial.sparsity), run.training_result(phase).score
                ray.get(stopping.report.remote(group, str(trial.folder), float(index), score))


def _read_stopped(trials: Sequence[Trial]) -> dict[int, StudentRow]:
    """Return the rows of trials that an earlier session of the sweep stopped, by their indices."""
    file = Path(trials[0].out) / RESULT
    if not file.is_file():
        return {}
    rows = SweepRecord.model_validate(json.loads(file.read_text("utf-8"))).rows
    by_folder = {row.run: row for row in rows if row.status == "stopped"}
    stopped = {}
    for index, trial in enumerate(trials):
        folder = unmeasured_row(trial).run
        if folder in by_folder:
            stopped[index] = by_folder[folder]
    return stopped
