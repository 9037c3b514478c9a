"""Kill a training stage with SIGKILL at random moments, repeatedly, and check that nothing is lost.

    python benchmarks/trouble.py /tmp/trouble --kills 20

Three kinds of victims: a stage in one process, one of several ranks, and the `spdtool --processes` that launched them.
After each kill every finished stage of the run folder must verify. The same command must then resume, and end with the
weights of an uninterrupted run of as many processes: to the last bit for one process, to 1e-5 with the same zeros for
several. Finally two processes start on one folder, and the second must be refused. The task is the embedded demo.
Needs only spdtool.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from spdtool.run.folder import Run

STAGE = "prune"
KINDS = {"alone": 1, "rank": 2, "launcher": 2}  # victim: processes
STARTED = 0.4  # of a command's time, about where imports end and the stage begins
SETTINGS = ("prune.epochs=0.3", "prune.batch_size=16", "prune.grafting.start=0.8")


@dataclass
class Tally:
    """Counts and faults of one kind of victim.

    Attributes:
        several: whether it trains in several processes.
        late: number of commands that ended before their kill.
        resumed: the steps from which a stage resumed.
        largest_difference: from the weights of the uninterrupted run.
    """

    several: bool
    kills: int = 0
    late: int = 0
    resumed: list[int] = field(default_factory=list)
    runs: int = 0
    largest_difference: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root, draw = options.folder, random.Random(options.seed)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    teacher_run = root / "begun"
    run_to_end(
        [
            "teacher",
            "--task",
            "demo",
            "--device",
            "cpu",
            "--run",
            str(teacher_run),
            "--set",
            "teacher.epochs=1",
            "--set",
            "teacher.accept=true",
        ]
    )
    uninterrupted = {count: copy_run(teacher_run, root / f"calm-{count}") for count in (1, 2)}
    seconds = {count: time_command(prune(run, count)) for count, run in uninterrupted.items()}
    tallies = {kind: Tally(processes > 1) for kind, processes in KINDS.items()}
    number = 0
    while sum(tally.kills for tally in tallies.values()) < options.kills:
        kind = list(KINDS)[number % len(KINDS)]
        run = copy_run(teacher_run, root / str(number))
        remaining = options.kills - sum(tally.kills for tally in tallies.values())
        kill_stage(run, kind, tallies[kind], min(remaining, draw.randint(2, 5)), seconds[KINDS[kind]], draw)
        compare_weights(uninterrupted[KINDS[kind]], run, tallies[kind])
        print(f"run {number}: {kind} killed; {sum(tally.kills for tally in tallies.values())} kills so far", flush=True)
        shutil.rmtree(run)
        number += 1
    refusal = two_on_one_folder(copy_run(teacher_run, root / "two"))
    for kind, tally in tallies.items():
        print(
            f"{kind:9} {tally.kills:3} kills ({tally.late} too late), {tally.runs} runs, resumed from steps "
            f"{tally.resumed}, largest distance from the undisturbed weights {tally.largest_difference:.1e}"
        )
    print(f"a second process on the same folder: {refusal}")
    faults = [f"{kind}: {fault}" for kind, tally in tallies.items() for fault in tally.faults]
    print("\n".join(faults) or "nothing was lost")
    raise SystemExit(1 if faults or "RunLocked" not in refusal else 0)


def prune(run: Path, processes: int) -> list[str]:
    """Return the arguments of the stage to kill; it writes a snapshot at every step."""
    settings = [word for setting in (*SETTINGS, "save_minutes=0") for word in ("--set", setting)]
    return [STAGE, "--run", str(run), *settings, *(["--processes", str(processes)] if processes > 1 else [])]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command in a new session with its output captured."""
    command = [sys.executable, "-m", "spdtool", *arguments, "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def run_to_end(arguments: list[str]) -> str:
    """Run a command to its end; return its standard error, or exit if it fails."""
    process = start(arguments)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"spdtool {' '.join(arguments)} ended with {process.returncode}:\n{errors[-3000:]}")
    return errors


def time_command(arguments: list[str]) -> float:
    """Run a command to its end; return its seconds."""
    before = time.monotonic()
    run_to_end(arguments)
    return time.monotonic() - before


def copy_run(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def kill_stage(run: Path, kind: str, tally: Tally, times: int, seconds: float, draw: random.Random) -> None:
    """Kill the stage up to `times` times, then run it to its end."""
    arguments = prune(run, KINDS[kind])
    for _ in range(times):
        process = start(arguments)
        try:
            _, errors = process.communicate(timeout=seconds * draw.uniform(STARTED, 1))
            tally.resumed += find_resumed_steps(errors)
            tally.late += 1
            break
        except subprocess.TimeoutExpired:
            pass
        ranks = children(process.pid)
        victim = draw.choice(ranks) if kind == "rank" and ranks else process.pid
        os.kill(victim, signal.SIGKILL)
        answer, errors = process.communicate()
        tally.resumed += find_resumed_steps(errors)
        if process.returncode == 0:  # it was over, or so nearly that the victim was
            tally.late += 1
            break
        tally.kills += 1
        for rank in ranks:
            wait_for_orphan(rank, tally)
        if kind == "rank" and ranks and "was killed by SIGKILL" not in answer:
            tally.faults.append(f"{run.name}: a rank was killed, and the message is {answer!r}")
        check_finished_stages(run, tally)
    if not Run.open(run).done(STAGE):
        tally.resumed += find_resumed_steps(run_to_end(arguments))
    tally.runs += 1


def find_resumed_steps(errors: str) -> list[int]:
    """Read the steps from which a stage resumed from its standard error."""
    return [int(line.split()[1].split("/")[0]) for line in errors.splitlines() if line.endswith("resumed")]


def children(process: int) -> list[int]:
    """Return the process ids of the ranks of a launcher."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def wait_for_orphan(rank: int, tally: Tally) -> None:
    """Wait for an orphaned rank to end by itself; record a fault if it does not."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    tally.faults.append(f"rank {rank} outlived its launcher by 20 s")


def check_finished_stages(run: Path, tally: Tally) -> None:
    """Record a fault for every finished stage whose files do not verify."""
    opened_run = Run.open(run)
    for stage in ("teacher", STAGE):
        if (run / stage).exists():
            try:
                opened_run.use_input(stage)
            except Exception as error:
                tally.faults.append(f"{run.name}: {stage} is there and not whole: {error}")


def compare_weights(uninterrupted: Path, run: Path, tally: Tally) -> None:
    """Compare the weights of `run` with those of the uninterrupted run."""
    check_finished_stages(run, tally)
    expected, actual = (load_file(folder / STAGE / "model.safetensors") for folder in (uninterrupted, run))
    distance = max(float((expected[key] - actual[key]).abs().max()) for key in expected)
    zeros = sum(int(((expected[key] == 0) != (actual[key] == 0)).sum()) for key in expected)
    tally.largest_difference = max(tally.largest_difference, distance)
    if distance > (1e-5 if tally.several else 0.0) or zeros:
        tally.faults.append(f"{run.name}: weights differ by up to {distance:.1e}, {zeros} zeros are elsewhere")


def two_on_one_folder(run: Path) -> str:
    """Start a second process while the first is training; return the message of the second."""
    first = start(prune(run, 1))
    while not (run / f".{STAGE}.partial" / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)  # however slow the second one is, the first still holds the folder
    second = start(prune(run, 1))
    output, _ = second.communicate()
    os.kill(first.pid, signal.SIGCONT)
    first.communicate()
    error = json.loads(output)
    outcome = f"exit code {second.returncode}, {error.get('error')}: {error.get('message')}"
    return f"{outcome}; the first ended with {first.returncode}"


if __name__ == "__main__":
    main()
