"""Sweeps on Ray: the rows are those without it, workers die, claims are refused, hopeless trials are stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spdtool import sweep
from spdtool.cluster import Cluster
from spdtool.errors import DeviceError
from spdtool.report import summary
from spdtool.report.rows import DONE, STOPPED, Row

SETS = (
    *(f"{stage}.max_steps=6" for stage in ("teacher", "prune", "distill", "finetune")),
    *("max_rows=64", "max_length=16", "prune.events=2", "device=cpu"),
)
Make = Callable[..., list[sweep.Trial]]


@pytest.fixture
def planned(tmp_path: Path) -> Make:
    def make(folder: str = "sweep", **how: Any) -> list[sweep.Trial]:
        known: dict[str, Any] = {"recipes": ["gmp", "no-distillation"], "sparsities": [0.5], "seeds": [0]}
        return sweep.plan(**known | {"tasks": ["demo"], "out": tmp_path / folder, "sets": SETS} | how)

    return make


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local cluster of two processors, kept for the tests of this file."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def run(trials: list[sweep.Trial], cluster: Any) -> list[Row]:
    return sweep.run_sweep(trials, Path(trials[0].out), lambda line: None, cluster)


def without_seconds(rows: list[Row]) -> list[dict[str, Any]]:
    return [row.record() | {"seconds": None} for row in rows]


def test_the_rows_are_those_of_a_sweep_in_turn(planned: Make, ray: Any) -> None:
    rows = run(planned("on ray"), Cluster())
    assert [row.status for row in rows] == [DONE, DONE]
    assert without_seconds(rows) == without_seconds(run(planned("in turn"), sweep.in_turn))


def test_a_claim_that_no_machine_meets_is_refused(planned: Make, ray: Any) -> None:
    with pytest.raises(DeviceError, match="claims 3 GPUs, and the largest machine of the Ray cluster has 0"):
        run(planned(), Cluster(gpus=3))


def test_a_worker_that_dies_is_started_again(planned: Make, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = planned(recipes=["gmp"])
    mark = Path(trials[0].out) / "died"

    def work(trial: sweep.Trial, standings: Any, taught: Any) -> Row:
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return sweep.run_trial(trial)

    monkeypatch.setattr("spdtool.cluster._work", work)
    (row,) = run(trials, Cluster())
    assert mark.exists()
    assert row.status == DONE


def test_a_hopeless_trial_is_stopped_and_stays_stopped(planned: Make, ray: Any) -> None:
    trials = planned(recipes=["gmp"], seeds=[0, 1])
    run(trials, Cluster())
    more = planned(recipes=["gmp"], seeds=[0, 1, 2])
    cluster = Cluster(behind=-200)  # every score is two below any median
    rows = run(more, cluster)
    assert [row.status for row in rows] == [DONE, DONE, STOPPED]
    assert "median of 2 other trials" in (rows[2].error or "")
    assert not (more[2].folder / "finetune").exists()
    assert run(more, cluster) == rows
    (seen,) = summary.summarise(rows)
    assert (seen.stopped, seen.student.count) == (1, 0), "the mean of the others would flatter the recipe"
    assert [row.status for row in run(more, sweep.in_turn)] == [DONE, DONE, DONE], "without the rule it goes on"


def test_without_ray_the_message_says_what_to_install(planned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match="not there") as caught:
        run(planned(), Cluster())
    assert "spdtool[ray]" in (caught.value.hint or "")


def test_ray_is_imported_only_where_a_sweep_runs_on_it() -> None:
    script = "import sys; import spdtool.cluster; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
