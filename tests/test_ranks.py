"""Several processes train as one does: the same weights up to rounding, one writer, and a job that can go on."""

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
    """41 rows in batches of 8: the last batch of an epoch has a single row, and all but one process have none."""
    made: dict[str, dict[str, Any]] = {}

    def add(name: str, case: str, ranks: int, *sets: str, folder: str | None = None, **more: Any) -> None:
        recipe, own = CASES[case]
        call = {"folder": str(root / (folder or name)), "stage": "prune", "ranks": ranks, "rows": 41, "recipe": recipe}
        made[name] = call | {"sets": [*own, *sets], "copy": str(root / "teacher")} | more

    for name, ranks in (("teacher", 1), ("teacher of 2", 2)):
        made[name] = {"folder": str(root / name), "stage": "teacher", "ranks": ranks, "rows": 41, "sets": []}
    for case in CASES:
        add(case, case, 1)
        add(f"{case} of 2", case, 2)
    sharded = {"folder": str(root / "teacher of 2, sharded"), "sets": [SHARD]}
    made["teacher of 2, sharded"] = made["teacher of 2"] | sharded
    add("attention of 3", "attention", 3)
    for case in SHARDED:
        add(f"{case} of 2, sharded", case, 2, SHARD)
    add("layerwise of 3, sharded", "layerwise", 3, SHARD)
    add("layerwise in pieces", "layerwise", 1, "prune.accumulate=3")
    add("killed", "layerwise", 2, OFTEN, dies=1, after=7)
    add("killed, alone", "layerwise", 1, OFTEN, folder="killed")
    add("killed, sharded", "layerwise", 2, OFTEN, SHARD, dies=1, after=7)
    add("killed, sharded, again", "layerwise", 2, OFTEN, SHARD, folder="killed, sharded")
    add("calm with dropout", "layerwise", 2, OFTEN, DROPOUT)
    add("main killed with dropout", "layerwise", 2, OFTEN, DROPOUT, dies=0, after=6)
    add("with dropout again", "layerwise", 2, OFTEN, DROPOUT, folder="main killed with dropout")
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    made = calls(root)
    process = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), str(root)],
        input=json.dumps(list(made.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root, dict(zip(made, json.loads(process.stdout), strict=True))


def weights(folder: Path, stage: str = "prune") -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "model.safetensors")


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, other[name] == 0), name
        assert float((tensor - other[name]).abs().max()) < 1e-5, name


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "prune" / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.long
def test_a_teacher_of_two_processes_is_that_of_one(results: tuple[Path, Any]) -> None:
    root, made = results
    assert made["teacher of 2"]["ends"] == [0, 0], made["teacher of 2"]["said"]
    assert_alike(weights(root / "teacher", "teacher"), weights(root / "teacher of 2", "teacher"))
    assert made["teacher of 2, sharded"]["ends"] == [0, 0], made["teacher of 2, sharded"]["said"]
    assert_alike(weights(root / "teacher", "teacher"), weights(root / "teacher of 2, sharded", "teacher"))


CUT = [*(f"{case} of 2" for case in CASES), "attention of 3", "layerwise in pieces"]
CUT += [*(f"{case} of 2, sharded" for case in SHARDED), "layerwise of 3, sharded"]


@pytest.mark.long
@pytest.mark.parametrize("name", CUT)
def test_a_student_is_the_same_however_its_batches_are_cut(results: tuple[Path, Any], name: str) -> None:
    root, made = results
    alone = name.split()[0]
    assert set(made[name]["ends"] + made[alone]["ends"]) == {0}, made[name]["said"]
    assert_alike(weights(root / name), weights(root / alone))
    events = [
        [{k: v for k, v in event.items() if k != "examples_per_second"} for event in log(root / folder)]
        for folder in (name, alone)
    ]
    for cut, whole in zip(*events, strict=True):
        losses = cut.pop("losses", {}), whole.pop("losses", {})
        assert cut == whole
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


@pytest.mark.long
def test_the_comparison_was_not_too_easy(results: tuple[Path, Any]) -> None:
    root, _ = results
    teacher, student = weights(root / "teacher", "teacher"), weights(root / "layerwise")
    moved = {name: float((teacher[name] - weight)[weight != 0].abs().max()) for name, weight in student.items()}
    still = [name for name, distance in moved.items() if distance < 1e-3]
    assert all(name.endswith("key.bias") for name in still), "the softmax hides it; all else moved by far more"
    drawn = {tuple(event["drawn"]) for event in log(root / "layerwise") if event["event"] == "step"}
    assert len(drawn) > 2


@pytest.mark.long
def test_only_the_main_process_writes(results: tuple[Path, Any]) -> None:
    root, made = results  # ranks.py fails a rank that makes, renames or removes a file
    assert made["layerwise of 2"]["said"][1] == ""
    assert "prune 6/12" in made["layerwise of 2"]["said"][0]
    names = [sorted(p.name for p in (root / folder / "prune").iterdir()) for folder in ("layerwise", "layerwise of 2")]
    assert names[0] == names[1]
    assert not [p for p in (root / "layerwise of 2").iterdir() if p.name.startswith(".prune")]


@pytest.mark.long
def test_a_killed_process_ends_the_job_and_one_process_goes_on(results: tuple[Path, Any]) -> None:
    root, made = results
    assert made["killed"]["ends"] == [2, -9]
    assert "PeerLost: another of the 2 processes has ended" in made["killed"]["said"][0]
    assert "Traceback" not in made["killed"]["said"][0]
    assert "resumed" in made["killed, alone"]["said"][0]
    assert_alike(weights(root / "killed"), weights(root / "layerwise"))


@pytest.mark.long
def test_a_sharded_job_that_was_killed_goes_on(results: tuple[Path, Any]) -> None:
    root, made = results
    assert made["killed, sharded"]["ends"][1] == -9
    assert "PeerLost: another of the 2 processes has ended" in made["killed, sharded"]["said"][0]
    assert "prune 6/12  resumed" in made["killed, sharded, again"]["said"][0]
    calm, again = weights(root / "layerwise of 2, sharded"), weights(root / "killed, sharded")
    assert all(torch.equal(calm[name], again[name]) for name in calm)


@pytest.mark.long
def test_the_same_number_of_processes_goes_on_to_the_last_bit(results: tuple[Path, Any]) -> None:
    root, made = results
    assert made["main killed with dropout"]["ends"] == [-9, 2]
    assert "prune 5/12  resumed" in made["with dropout again"]["said"][0]
    calm, again = weights(root / "calm with dropout"), weights(root / "main killed with dropout")
    assert all(torch.equal(calm[name], again[name]) for name in calm)
    assert any(not torch.equal(calm[name], weight) for name, weight in weights(root / "layerwise").items())


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


def teacher_of_two(root: Path, *more: str, once: bool) -> subprocess.CompletedProcess[str]:
    """`spdtool teacher --processes 2`, of which one is killed after four steps: always, or the first time."""
    plugins = root / "plugins"
    plugins.mkdir()
    (plugins / "toy.py").write_text(PLUGIN.format(tests=str(HERE), died=str(root / "died"), once=once))
    words = f"teacher --task toy --device cpu --run {root / 'run'} --plugins-dir {plugins} --json --processes 2"
    settings = ["--set", "teacher.batch_size=8", "--set", OFTEN, "--set", "max_length=32"]
    return subprocess.run(
        [sys.executable, "-m", "spdtool", *words.split(), *settings, *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_says_which_process_was_killed(tmp_path: Path) -> None:
    done = teacher_of_two(tmp_path, once=False)
    assert done.returncode == 2, done.stderr
    told = json.loads(done.stdout)
    assert told["error"] == "PeerLost"
    assert told["message"].startswith("rank 1 of 2 was killed by SIGKILL")
    assert told["hint"] == "the same command goes on from the last snapshot"
    assert "Traceback" not in done.stderr
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
    while calls == 3 and callable(signal.getsignal(signal.SIGTERM)):  # until the first signal is remembered
        time.sleep(0.05)
    return original(*args, **options)
torch.optim.AdamW.step = step
"""


def test_a_launcher_that_is_told_to_end_lets_its_processes_save_one_step(tmp_path: Path) -> None:
    plugins, begun = tmp_path / "plugins", tmp_path / "begun"
    plugins.mkdir()
    (plugins / "toy.py").write_text(WAITING.format(tests=str(HERE), begun=str(begun)))
    words = f"teacher --task toy --device cpu --run {tmp_path / 'run'} --plugins-dir {plugins} --processes 2"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "spdtool", *words.split(), "--set", "teacher.batch_size=8", "--set", "max_length=32"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not begun.exists():
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
def test_the_command_starts_its_processes_again(tmp_path: Path) -> None:
    done = teacher_of_two(tmp_path, "--set", "restarts=1", once=True)
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 was killed by SIGKILL" in done.stderr
    assert "all are started again" in done.stderr
    assert "resumed" in done.stderr
    assert (tmp_path / "run/teacher/stage.json").exists()


def test_ranks_meet_where_the_dead_have_left_what_they_said() -> None:
    store = HashStore()

    def meet(rank: int) -> str:
        return collectives.agree_on_prefix(store, rank, 3)

    with ThreadPoolExecutor(3) as pool:
        first = set(pool.map(meet, range(3)))
        early = [pool.submit(meet, rank) for rank in (1, 2)]  # they find a meeting that is over
        time.sleep(0.2)
        second = {meet(0), *(one.result(timeout=20) for one in early)}
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
def test_two_launchers_are_two_nodes_and_go_on_when_one_has_died(results: tuple[Path, Any], tmp_path: Path) -> None:
    root, _ = results
    run, died, plugins = tmp_path / "run", tmp_path / "died", tmp_path / "plugins"
    shutil.copytree(root / "teacher", run)
    plugins.mkdir()
    (plugins / "toy.py").write_text(NODE_DIES.format(tests=str(HERE), died=str(died)))
    words = ["-m", "--", "spdtool", "prune", "--run", str(run), "--plugins-dir", str(plugins)]
    words += [word for setting in (*GRAFTED, OFTEN) for word in ("--set", setting)]

    def launched() -> list[tuple[int, str]]:
        """How `torchrun` ended on each of two nodes, and what it said."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "localhost", "--master-port", str(port)]
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *where, "--node-rank", str(node), *words],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},  # where torch leaves its folders
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in range(2)
        ]
        said = [node.communicate(timeout=300)[1] for node in nodes]
        return [(node.returncode, each) for node, each in zip(nodes, said, strict=True)]

    (left, said), (killed, _) = launched()
    assert died.exists()
    assert (left, killed) == (1, -9)
    assert "PeerLost: another of the 2 processes has ended" in said
    assert "the same command goes on from the last snapshot" in said
    assert not (run / "prune").exists()
    (code, said), (other, _) = launched()
    assert (code, other) == (0, 0), said
    assert_alike(weights(run), weights(root / "layerwise"))
    assert [event["step"] for event in log(run) if event["event"] == "step"] == list(range(1, 13))
