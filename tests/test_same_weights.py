"""The same recipe gives the same weights in any environment, or the difference is reported and recorded.

`docs/reference/same-weights.md` has the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]  # each row starts a process that trains toy stages

SCRIPT = Path(__file__).with_name("surrounded.py")
STAGES = ("teacher", "prune", "distill")

# Variables that must not change a weight; many at once, because each process costs seconds.
ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_SPLIT_BATCHES": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}
LEFT_BY_LAUNCHERS = {
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
    "OMPI_COMM_WORLD_SIZE": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
}
SYSTEM = {
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "TZ": "Asia/Kathmandu",
    "PYTHONHASHSEED": "12345",
    "TEST_UMASK": "077",
    "PYTHONOPTIMIZE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_CACHE": "/nowhere",
    "HF_ENABLE_PARALLEL_LOADING": "true",
    "COLUMNS": "20",
    "NO_COLOR": "1",
}
# These change how the machine computes; whether a weight changes depends on the processor.
SWITCHES = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


class Outcome(NamedTuple):
    """Weight hash, threads and arithmetic of each stage, and the printed output."""

    stages: dict[str, Any]
    printed: str


def train(folder: Path, *stages: str, cwd: Path | None = None, cpus: str = "", **variables: str) -> Outcome:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder.parent / f"{folder.name}-cache")} | variables
    words = [sys.executable, str(SCRIPT), str(folder), *(stages or STAGES)]
    if cpus:
        words = ["taskset", "-c", cpus, *words]
    process = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return Outcome(json.loads(process.stdout), process.stderr)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surroundings")


@pytest.fixture(scope="module")
def baseline(root: Path) -> Outcome:
    return train(root / "calm")


def continue_teacher(root: Path, name: str) -> Path:
    """Copy the baseline run up to its teacher."""
    (root / name).mkdir()
    shutil.copy(root / "calm" / "run.json", root / name)
    shutil.copytree(root / "calm" / "teacher", root / name / "teacher")
    return root / name


def test_the_environment_does_not_change_the_weights(root: Path, baseline: Outcome) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    unwritable = root / "a file where the cache should be"
    unwritable.touch()
    rows: dict[str, dict[str, Any]] = {
        "accelerate and launchers": ACCELERATE | LEFT_BY_LAUNCHERS,
        "the system": SYSTEM | {"cwd": elsewhere, "TMPDIR": str(elsewhere), "XDG_CACHE_HOME": str(unwritable)},
        "threads of the recipe": {
            "TEST_SETS": "threads=1",
            "OMP_NUM_THREADS": "2",
            "MKL_NUM_THREADS": "3",
            "RANK": "0",
            "WORLD_SIZE": "1",
        },
    }
    for name, row in rows.items():
        outcome = train(root / name, **row)
        assert outcome.stages == baseline.stages, name


def test_a_run_continues_with_its_number_of_threads(root: Path, baseline: Outcome) -> None:
    outcome = train(continue_teacher(root, "threads"), "prune", "distill", OMP_NUM_THREADS="2")
    assert outcome.stages == {stage: baseline.stages[stage] for stage in ("prune", "distill")}
    if len(os.sched_getaffinity(0)) > 1:  # torch takes no more threads than there are processors
        assert "computing with 1 threads, as this run began" in outcome.printed


def test_the_number_of_processors_does_not_change_the_weights(root: Path, baseline: Outcome) -> None:
    if shutil.which("taskset") is None:
        pytest.skip("needs taskset")
    cpu = min(os.sched_getaffinity(0))
    outcome = train(continue_teacher(root, "cpus"), "prune", cpus=str(cpu), OMP_NUM_THREADS="")
    assert outcome.stages["prune"] == baseline.stages["prune"]


def test_switches_that_change_the_arithmetic_are_recorded_and_reported(root: Path, baseline: Outcome) -> None:
    outcome = train(continue_teacher(root, "switches"), "prune", **SWITCHES)
    weights, _, arithmetic = outcome.stages["prune"]
    baseline_weights, _, baseline_arithmetic = baseline.stages["prune"]
    is_reported = "this process does not compute the same last bits as the one that trained teacher" in outcome.printed
    assert (arithmetic != baseline_arithmetic) == is_reported
    assert weights == baseline_weights or is_reported
