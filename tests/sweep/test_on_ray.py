"""Sweeps on Ray: equal rows, dying workers and nodes, refused resources, early stopping."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdtool import plugins
from spdtool.errors import DeviceError
from spdtool.run.lock import lock_folder
from spdtool.run.records import StudentRow
from spdtool.sweep import on_ray as cluster
from spdtool.sweep import summary
from spdtool.sweep.on_ray import Cluster
from spdtool.sweep.run_sweep import run_in_turn, run_sweep, run_trial
from spdtool.sweep.trials import Sweep, Trial, plan_trials

SETS = (
    *(f"{stage}.max_steps=6" for stage in ("teacher", "prune", "distill", "finetune")),
    *("max_rows=64", "max_length=16", "prune.events=2", "device=cpu"),
    "teacher.accept=true",  # six steps teach nothing
)
Make = Callable[..., list[Trial]]


@pytest.fixture
def planned(tmp_path: Path) -> Make:
    def make(folder: str = "sweep", **changes: Any) -> list[Trial]:
        defaults: dict[str, Any] = {"recipes": ["gmp", "no-distillation"], "sparsities": [0.5], "seeds": [0]}
        return plan_trials(Sweep(**defaults | {"tasks": ["demo"], "out": tmp_path / folder, "sets": SETS} | changes))

    return make


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, with one CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # otherwise workers starve when tests run in parallel
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"include_dashboard": False})
        cluster.add_node()
        yield cluster
        sys.modules["ray"].shutdown()
        cluster.shutdown()


@pytest.fixture
def ray(nodes: Any) -> Any:
    """Ray with this process as a driver of the cluster; its workers stay warm for the next test."""
    import ray

    if not ray.is_initialized():
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    return ray


@pytest.fixture
def gather(tmp_path: Path) -> Callable[[int], str]:
    """Return `gather(count)`, a barrier for trials: it waits for `count` of them and returns the node's id."""
    arrived = tmp_path / "here"
    arrived.mkdir()

    def gather(count: int) -> str:
        node: str = sys.modules["ray"].get_runtime_context().get_node_id()
        (arrived / f"{node}-{os.getpid()}").touch()
        deadline = time.monotonic() + 120
        while len(list(arrived.iterdir())) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        return node

    return gather


def run(trials: list[Trial], cluster: Any) -> list[StudentRow]:
    return run_sweep(trials, Path(trials[0].out), lambda line: None, cluster)


def without_seconds(rows: list[StudentRow]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json") | {"seconds": None} for row in rows]


@pytest.mark.slow
def test_rows_on_ray_equal_those_of_a_sweep_in_turn(planned: Make, ray: Any) -> None:
    rows = run(planned("on ray"), Cluster())
    assert [row.status for row in rows] == ["done", "done"]
    assert without_seconds(rows) == without_seconds(run(planned("in turn"), run_in_turn))


@pytest.mark.slow
def test_resources_that_no_machine_has_are_refused(planned: Make, ray: Any) -> None:
    with pytest.raises(DeviceError, match="claims 3 GPUs, and the largest machine of the Ray cluster has 0"):
        run(planned(), Cluster(gpus=3))


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(planned: Make, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = planned(recipes=["gmp"])
    mark = Path(trials[0].out) / "died"

    def work(trial: Trial, stopping: Any, teacher: Any) -> StudentRow:
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return run_trial(trial)

    monkeypatch.setattr("spdtool.sweep.on_ray.run_trial_in_worker", work)
    (row,) = run(trials, Cluster())
    assert mark.exists()
    assert row.status == "done"


@pytest.mark.slow
def test_trials_run_on_every_node_of_a_cluster(
    planned: Make, nodes: Any, gather: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(trial: Trial, stopping: Any, teacher: Any) -> StudentRow:
        gather(2)
        return run_trial(trial)

    monkeypatch.setattr("spdtool.sweep.on_ray.run_trial_in_worker", work)
    sys.modules["ray"].shutdown()  # so that the cluster is found by its address
    rows = run(planned(), Cluster(nodes.address))
    assert [row.status for row in rows] == ["done", "done"]
    used = {file.name.split("-")[0] for file in (tmp_path / "here").iterdir()}
    assert used == {node.node_id for node in nodes.list_all_nodes()}


@pytest.mark.slow
def test_trials_of_a_node_that_dies_go_on_elsewhere(
    planned: Make, nodes: Any, ray: Any, gather: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, dying_node = tmp_path / "held", nodes.add_node()

    def work(trial: Trial, stopping: Any, teacher: Any) -> StudentRow:
        if gather(3) == dying_id:
            trial.folder.mkdir(parents=True)
            with lock_folder(trial.folder):  # a stage in progress holds this lock until Ray's worker has ended
                locked.touch()
                time.sleep(600)
        return unlocked(trial)

    def kill() -> None:
        while not locked.exists():
            time.sleep(0.1)
        nodes.remove_node(dying_node, allow_graceful=False)

    dying_id, unlocked = dying_node.node_id, cluster.run_unlocked_trial
    monkeypatch.setattr("spdtool.sweep.on_ray.run_trial_in_worker", work)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    rows = run(planned(recipes=["gmp"], sparsities=[0.4, 0.5, 0.6]), Cluster())
    killer.join(30)
    assert locked.exists()
    assert [row.status for row in rows] == ["done", "done", "done"]


def test_a_trial_waits_for_an_orphan_that_holds_its_folder(planned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (trial,) = planned(recipes=["gmp"])
    trial.folder.mkdir(parents=True)
    lock = contextlib.ExitStack()
    lock.enter_context(lock_folder(trial.folder))
    monkeypatch.setattr(cluster, "ORPHAN_SECONDS", 0.0)
    assert "RunLocked: another process is working in" in (cluster.run_unlocked_trial(trial).error or "")
    monkeypatch.setattr(cluster, "ORPHAN_SECONDS", 300.0)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: lock.close()))
    assert cluster.run_unlocked_trial(trial).status == "done"


@pytest.mark.slow
def test_the_sweep_ends_if_no_machine_has_the_resources_any_longer(
    planned: Make, nodes: Any, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = nodes.add_node(num_cpus=2)

    def work(trial: Trial, stopping: Any, teacher: Any) -> None:
        time.sleep(600)

    monkeypatch.setattr("spdtool.sweep.on_ray.run_trial_in_worker", work)
    monkeypatch.setattr("spdtool.sweep.on_ray.POLL_SECONDS", 1.0)
    killer = threading.Timer(8, nodes.remove_node, [large], {"allow_graceful": False})
    killer.start()
    with pytest.raises(DeviceError, match="claims 2 CPUs, and the largest machine of the Ray cluster has 1"):
        run(planned(), Cluster(cpus=2))
    killer.join()


@pytest.mark.slow
def test_a_bug_in_a_trial_keeps_its_traceback_and_spares_the_others(
    planned: Make, ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(trial: Trial, stopping: Any, teacher: Any) -> StudentRow:
        if trial.recipe == "gmp":
            raise ZeroDivisionError("nothing to divide by")
        return run_trial(trial)

    monkeypatch.setattr("spdtool.sweep.on_ray.run_trial_in_worker", work)
    bad, good = run(planned(), Cluster())
    assert (bad.status, bad.error) == ("failed", "ZeroDivisionError: nothing to divide by")
    assert good.status == "done"
    assert ", in work" in capsys.readouterr().err, "the place of the bug"


@pytest.mark.slow
def test_plugins_are_loaded_where_a_trial_runs(planned: Make, ray: Any, clean_plugins: None, tmp_path: Path) -> None:
    preamble = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport toys\n"
    (tmp_path / "plugin.py").write_text(f"{preamble}toys.register(toys.dataset('mine'))\n")
    plugins.use_folder(tmp_path)
    assert [row.status for row in run(planned(tasks=["mine"], recipes=["gmp"]), Cluster())] == ["done"]


@pytest.mark.slow
def test_a_trial_far_behind_is_stopped_and_stays_stopped(planned: Make, ray: Any) -> None:
    trials = planned(recipes=["gmp"], seeds=[0, 1])
    run(trials, Cluster())
    more_trials = planned(recipes=["gmp"], seeds=[0, 1, 2])
    cluster = Cluster(margin=-200)  # every score is two below any median
    rows = run(more_trials, cluster)
    assert [row.status for row in rows] == ["done", "done", "stopped"]
    assert "median of 2 other trials" in (rows[2].error or "")
    assert not (more_trials[2].folder / "finetune").exists()
    assert run(more_trials, cluster) == rows
    (summarised,) = summary.summarise(rows)
    assert (summarised.stopped, summarised.student.count) == (1, 0), "the mean of the others would flatter the recipe"
    assert [row.status for row in run(more_trials, run_in_turn)] == ["done", "done", "done"], (
        "without the rule it goes on"
    )


def test_without_ray_the_message_says_what_to_install(planned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match="not there") as error:
        run(planned(), Cluster())
    assert "spdtool[ray]" in (error.value.hint or "")


def test_ray_is_imported_only_where_a_sweep_runs_on_it() -> None:
    script = "import sys; import spdtool.sweep.on_ray; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
