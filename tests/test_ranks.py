"""Several processes train the same weights as one, up to rounding; only rank 0 writes; killed jobs resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from spdtool.models import collectives
from spdtool.training.snapshot import find_damage

pytestmark = pytest.mark.slow  # each test starts processes, or reads what they have made
HERE = Path(__file__).parent
GRAFTED = ["prune.grafting.start=0.8"]
CASES: dict[str, tuple[str, list[str]]] = {  # layerwise scores on calibration batches; scores learned from gradients
    "layerwise": ("default", GRAFTED),
    "movement": (
        "movement",
        [*GRAFTED, "prune.exchanges=0", "prune.loss={hidden=1.0, hardness=0.5}", "prune.saliency=logits"],
    ),
    "global": (
        "movement",
        [*GRAFTED, "prune.exchanges=0", "prune.loss={hidden=1.0, hardness=0.5}", "prune.scope=global"],
    ),
    "attention": ("default", [*GRAFTED, "prune.loss={attention=0.5, relation=0.3, relation_heads=4}"]),
    "padding": ("default", [*GRAFTED, "prune.loss.mask_padding=false"]),
}
OFTEN = "save_minutes=0"
SHARD = "shard=true"
SHARDED = ("layerwise", "global", "attention")
DROPOUT = "prune.dropout=0.2"


def calls(root: Path) -> dict[str, dict[str, Any]]:
    """Plan the calls of `ranks.py`; of 41 rows in batches of 8 the last batch has one row, for one rank only."""
    planned: dict[str, dict[str, Any]] = {}

    def add(name: str, case: str, ranks: int, *sets: str, folder: str | None = None, **fields: Any) -> None:
        recipe, settings = CASES[case]
        call = {"folder": str(root / (folder or name)), "stage": "prune", "ranks": ranks, "rows": 41, "recipe": recipe}
        planned[name] = call | {"sets": [*settings, *sets], "copy": str(root / "teacher")} | fields

    for name, ranks in (("teacher", 1), ("teacher of 2", 2)):
        planned[name] = {"folder": str(root / name), "stage": "teacher", "ranks": ranks, "rows": 41, "sets": []}
    for case in CASES:
        add(case, case, 1)
        add(f"{case} of 2", case, 2)
    sharded = {"folder": str(root / "teacher of 2, sharded"), "sets": [SHARD]}
    planned["teacher of 2, sharded"] = planned["teacher of 2"] | sharded
    add("attention of 3", "attention", 3)
    for case in SHARDED:
        add(f"{case} of 2, sharded", case, 2, SHARD)
    add("layerwise of 3, sharded", "layerwise", 3, SHARD)
    add("layerwise in pieces", "layerwise", 1, "prune.accumulate=3")
    add("killed", "layerwise", 2, OFTEN, dies=1, after=7)
    add("killed, alone", "layerwise", 1, OFTEN, folder="killed")
    add("killed, sharded", "layerwise", 2, OFTEN, SHARD, dies=1, after=7)
    add("killed, sharded, again", "layerwise", 2, OFTEN, SHARD, folder="killed, sharded")
    add("uninterrupted with dropout", "layerwise", 2, OFTEN, DROPOUT)
    add("main killed with dropout", "layerwise", 2, OFTEN, DROPOUT, dies=0, after=6)
    add("with dropout again", "layerwise", 2, OFTEN, DROPOUT, folder="main killed with dropout")
    return planned


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    planned = calls(root)
    process = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), str(root)],
        input=json.dumps(list(planned.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root, dict(zip(planned, json.loads(process.stdout), strict=True))


def weights(folder: Path, stage: str = "prune") -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "model.safetensors")


def assert_equal_up_to_rounding(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor == 0, expected[name] == 0), name
        assert float((tensor - expected[name]).abs().max()) < 1e-5, name


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "prune" / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.long
def test_a_teacher_of_two_processes_equals_that_of_one(results: tuple[Path, Any]) -> None:
    root, reports = results
    assert reports["teacher of 2"]["ends"] == [0, 0], reports["teacher of 2"]["output"]
    assert_equal_up_to_rounding(weights(root / "teacher", "teacher"), weights(root / "teacher of 2", "teacher"))
    assert reports["teacher of 2, sharded"]["ends"] == [0, 0], reports["teacher of 2, sharded"]["output"]
    assert_equal_up_to_rounding(
        weights(root / "teacher", "teacher"), weights(root / "teacher of 2, sharded", "teacher")
    )


CUT = [*(f"{case} of 2" for case in CASES), "attention of 3", "layerwise in pieces"]
CUT += [*(f"{case} of 2, sharded" for case in SHARDED), "layerwise of 3, sharded"]


@pytest.mark.long
@pytest.mark.parametrize("name", CUT)
def test_a_student_is_the_same_on_any_number_of_ranks_and_micro_batches(results: tuple[Path, Any], name: str) -> None:
    root, reports = results
    single = name.split()[0]
    assert set(reports[name]["ends"] + reports[single]["ends"]) == {0}, reports[name]["output"]
    assert_equal_up_to_rounding(weights(root / name), weights(root / single))
    events = [
        [{k: v for k, v in event.items() if k != "examples_per_second"} for event in log(root / folder)]
        for folder in (name, single)
    ]
    for event_of_name, single_event in zip(*events, strict=True):
        losses = event_of_name.pop("losses", {}), single_event.pop("losses", {})
        assert event_of_name == single_event
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


@pytest.mark.long
def test_training_moves_weights_and_varies_the_draws(results: tuple[Path, Any]) -> None:
    root, _ = results
    teacher, student = weights(root / "teacher", "teacher"), weights(root / "layerwise")
    distances = {name: float((teacher[name] - weight)[weight != 0].abs().max()) for name, weight in student.items()}
    unmoved = [name for name, distance in distances.items() if distance < 1e-3]
    assert all(name.endswith("key.bias") for name in unmoved), "the softmax hides it; all else moved by far more"
    draws = {tuple(event["drawn"]) for event in log(root / "layerwise") if event["event"] == "step"}
    assert len(draws) > 2


@pytest.mark.long
def test_only_the_main_process_writes(results: tuple[Path, Any]) -> None:
    root, reports = results  # ranks.py fails if another rank creates, renames or removes a file
    assert reports["layerwise of 2"]["output"][1] == ""
    assert "prune 6/12" in reports["layerwise of 2"]["output"][0]
    names = [sorted(p.name for p in (root / folder / "prune").iterdir()) for folder in ("layerwise", "layerwise of 2")]
    assert names[0] == names[1]
    assert not [p for p in (root / "layerwise of 2").iterdir() if p.name.startswith(".prune")]


@pytest.mark.long
def test_a_killed_rank_ends_the_job_and_one_process_can_resume_it(results: tuple[Path, Any]) -> None:
    root, reports = results
    assert reports["killed"]["ends"] == [2, -9]
    assert "PeerLost: another of the 2 processes has ended" in reports["killed"]["output"][0]
    assert "Traceback" not in reports["killed"]["output"][0]
    assert "resumed" in reports["killed, alone"]["output"][0]
    assert_equal_up_to_rounding(weights(root / "killed"), weights(root / "layerwise"))


@pytest.mark.long
def test_a_killed_sharded_job_resumes(results: tuple[Path, Any]) -> None:
    root, reports = results
    assert reports["killed, sharded"]["ends"][1] == -9
    assert "PeerLost: another of the 2 processes has ended" in reports["killed, sharded"]["output"][0]
    assert "prune 6/12  resumed" in reports["killed, sharded, again"]["output"][0]
    expected, resumed = weights(root / "layerwise of 2, sharded"), weights(root / "killed, sharded")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.long
def test_the_same_number_of_processes_resumes_to_the_last_bit(results: tuple[Path, Any]) -> None:
    root, reports = results
    assert reports["main killed with dropout"]["ends"] == [-9, 2]
    assert "prune 5/12  resumed" in reports["with dropout again"]["output"][0]
    expected, resumed = weights(root / "uninterrupted with dropout"), weights(root / "main killed with dropout")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert any(not torch.equal(expected[name], weight) for name, weight in weights(root / "layerwise").items())


PLUGIN = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys
toys.register(toys.dataset(train=44, dev=20))
original, calls, died = torch.optim.AdamW.step, 0, Path({died!r})
def step(*args, **options):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 5 and not died.exists():
        if {once}:
            died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
torch.optim.AdamW.step = step
"""


def teacher_of_two(root: Path, *extra: str, once: bool) -> subprocess.CompletedProcess[str]:
    """Run `spdtool teacher --processes 2`, where one rank is killed after four steps: always, or once."""
    plugins = root / "plugins"
    plugins.mkdir()
    (plugins / "toy.py").write_text(PLUGIN.format(tests=str(HERE), died=str(root / "died"), once=once))
    arguments = f"teacher --task toy --device cpu --run {root / 'run'} --plugins-dir {plugins} --json --processes 2"
    settings = ["--set", "teacher.batch_size=8", "--set", OFTEN, "--set", "max_length=32"]
    return subprocess.run(
        [sys.executable, "-m", "spdtool", *arguments.split(), *settings, *extra],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long  # it starts three processes, as the test of SIGTERM does
def test_the_command_reports_which_process_was_killed(tmp_path: Path) -> None:
    process = teacher_of_two(tmp_path, once=False)
    assert process.returncode == 2, process.stderr
    error = json.loads(process.stdout)
    assert error["error"] == "PeerLost"
    assert error["message"].startswith("rank 1 of 2 was killed by SIGKILL")
    assert error["hint"] == "the same command goes on from the last snapshot"
    assert "Traceback" not in process.stderr
    # The kill may come before the first process has removed the older snapshot.
    snapshots = sorted(path.name for path in (tmp_path / "run/.teacher.partial/state").iterdir())
    assert snapshots[-1] == "step-000000004"
    assert set(snapshots) <= {"step-000000003", "step-000000004"}


WAITING = """
import os, signal, sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys
toys.register(toys.dataset(train=44, dev=20))
original, calls, begun = torch.optim.AdamW.step, 0, Path({begun!r})
def step(*args, **options):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK") == "1":
        begun.touch()
    while calls == 3 and callable(signal.getsignal(signal.SIGTERM)):  # until the first signal has been recorded
        time.sleep(0.05)
    return original(*args, **options)
torch.optim.AdamW.step = step
"""


def test_a_launcher_lets_its_processes_save_a_step_on_sigterm(tmp_path: Path) -> None:
    plugins, started = tmp_path / "plugins", tmp_path / "begun"
    plugins.mkdir()
    (plugins / "toy.py").write_text(WAITING.format(tests=str(HERE), begun=str(started)))
    arguments = f"teacher --task toy --device cpu --run {tmp_path / 'run'} --plugins-dir {plugins} --processes 2"
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "spdtool",
            *arguments.split(),
            "--set",
            "teacher.batch_size=8",
            "--set",
            "max_length=32",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not started.exists():
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM, errors
    assert "teacher was stopped by SIGTERM and saved step 3 of " in errors
    assert "Traceback" not in errors
    (saved,) = (tmp_path / "run/.teacher.partial/state").iterdir()
    assert saved.name == "step-000000003"
    assert find_damage(saved) is None


@pytest.mark.long
def test_the_command_restarts_its_processes(tmp_path: Path) -> None:
    process = teacher_of_two(tmp_path, "--set", "restarts=1", once=True)
    assert process.returncode == 0, process.stderr
    assert "rank 1 of 2 was killed by SIGKILL" in process.stderr
    assert "all are started again" in process.stderr
    assert "resumed" in process.stderr
    assert (tmp_path / "run/teacher/stage.json").exists()


def test_ranks_agree_on_a_new_prefix_in_a_used_store() -> None:
    store = HashStore()

    def agree(rank: int) -> str:
        return collectives.agree_on_prefix(store, rank, 3)

    with ThreadPoolExecutor(3) as pool:
        first = set(pool.map(agree, range(3)))
        early = [pool.submit(agree, rank) for rank in (1, 2)]  # they find the keys of the first agreement
        time.sleep(0.2)
        second = {agree(0), *(future.result(timeout=20) for future in early)}
    assert len(first) == len(second) == 1
    assert first != second


NODE_DIES = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys
toys.register(toys.dataset(train=41, dev=20, pairs=True))
original, calls, died = torch.optim.AdamW.step, 0, Path({died!r})
def step(*args, **options):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 5 and not died.exists():
        died.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
torch.optim.AdamW.step = step
"""


@pytest.mark.long
def test_two_nodes_resume_after_one_has_died(results: tuple[Path, Any], tmp_path: Path) -> None:
    root, _ = results
    run, died, plugins = tmp_path / "run", tmp_path / "died", tmp_path / "plugins"
    shutil.copytree(root / "teacher", run)
    plugins.mkdir()
    (plugins / "toy.py").write_text(NODE_DIES.format(tests=str(HERE), died=str(died)))
    arguments = ["-m", "--", "spdtool", "prune", "--run", str(run), "--plugins-dir", str(plugins)]
    arguments += [word for setting in (*GRAFTED, OFTEN) for word in ("--set", setting)]

    def launch_nodes() -> list[tuple[int, str]]:
        """Run `torchrun` on two nodes; return the exit code and the standard error of each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        rendezvous = [
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--master-addr",
            "localhost",
            "--master-port",
            str(port),
        ]
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--node-rank", str(node), *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},  # where torch leaves its folders
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in range(2)
        ]
        errors = [node.communicate(timeout=300)[1] for node in nodes]
        return [(node.returncode, error) for node, error in zip(nodes, errors, strict=True)]

    (survivor_code, output), (killed_code, _) = launch_nodes()
    assert died.exists()
    assert (survivor_code, killed_code) == (1, -9)
    assert "PeerLost: another of the 2 processes has ended" in output
    assert "the same command goes on from the last snapshot" in output
    assert not (run / "prune").exists()
    (code, output), (other_code, _) = launch_nodes()
    assert (code, other_code) == (0, 0), output
    assert_equal_up_to_rounding(weights(run), weights(root / "layerwise"))
    assert [event["step"] for event in log(run) if event["event"] == "step"] == list(range(1, 13))
