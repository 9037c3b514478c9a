"""Kill a training stage with SIGKILL at random moments, again and again, and see whether anything is lost.

    python benchmarks/trouble.py /tmp/trouble --kills 20

Three kinds of victims: the process of a stage that runs alone, one of several ranks, and the `spdtool --processes` that
launched them. After each kill the run folder must hold no stage that looks finished and is not; the same command must
then go on, and end with the weights of a run of as many processes that nobody disturbed: to the last bit for one
process, and to 1e-5 with the same zeros for several. At last two processes are started on one folder, of which the
second must be refused. The task is the embedded demo.
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
    """Keeps what has happened to one kind of victim.

    Attributes:
        several: whether it trains in several processes.
    """

    several: bool
    kills: int = 0
    late: int = 0
    resumed: list[int] = field(default_factory=list)
    runs: int = 0
    furthest: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    root, draw = chosen.folder, random.Random(chosen.seed)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    begun = root / "begun"
    finished(
        [
            "teacher",
            "--task",
            "demo",
            "--device",
            "cpu",
            "--run",
            str(begun),
            "--set",
            "teacher.epochs=1",
            "--set",
            "teacher.accept=true",
        ]
    )
    calm = {count: copied(begun, root / f"calm-{count}") for count in (1, 2)}
    seconds = {count: timed(prune(run, count)) for count, run in calm.items()}
    tallies = {kind: Tally(processes > 1) for kind, processes in KINDS.items()}
    number = 0
    while sum(tally.kills for tally in tallies.values()) < chosen.kills:
        kind = list(KINDS)[number % len(KINDS)]
        run = copied(begun, root / str(number))
        left = chosen.kills - sum(tally.kills for tally in tallies.values())
        disturb(run, kind, tallies[kind], min(left, draw.randint(2, 5)), seconds[KINDS[kind]], draw)
        compare(calm[KINDS[kind]], run, tallies[kind])
        print(f"run {number}: {kind} killed; {sum(tally.kills for tally in tallies.values())} kills so far", flush=True)
        shutil.rmtree(run)
        number += 1
    refused = two_on_one_folder(copied(begun, root / "two"))
    for kind, tally in tallies.items():
        print(
            f"{kind:9} {tally.kills:3} kills ({tally.late} too late), {tally.runs} runs, resumed from steps "
            f"{tally.resumed}, largest distance from the undisturbed weights {tally.furthest:.1e}"
        )
    print(f"a second process on the same folder: {refused}")
    faults = [f"{kind}: {fault}" for kind, tally in tallies.items() for fault in tally.faults]
    print("\n".join(faults) or "nothing was lost")
    raise SystemExit(1 if faults or "RunLocked" not in refused else 0)


def prune(run: Path, processes: int) -> list[str]:
    """The words of the stage that is disturbed; a snapshot is due at every step."""
    settings = [word for setting in (*SETTINGS, "save_minutes=0") for word in ("--set", setting)]
    return [STAGE, "--run", str(run), *settings, *(["--processes", str(processes)] if processes > 1 else [])]


def start(words: list[str]) -> subprocess.Popen[str]:
    """A command in a session of its own, its output kept."""
    command = [sys.executable, "-m", "spdtool", *words, "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def finished(words: list[str]) -> str:
    """What a command said, which must end well."""
    process = start(words)
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"spdtool {' '.join(words)} ended with {process.returncode}:\n{said[-3000:]}")
    return said


def timed(words: list[str]) -> float:
    """Seconds of a command that must end well."""
    before = time.monotonic()
    finished(words)
    return time.monotonic() - before


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def disturb(run: Path, kind: str, tally: Tally, times: int, seconds: float, draw: random.Random) -> None:
    """Kill the stage up to `times` times, then let it come to its end."""
    words = prune(run, KINDS[kind])
    for _ in range(times):
        process = start(words)
        try:
            _, said = process.communicate(timeout=seconds * draw.uniform(STARTED, 1))
            tally.resumed += resumed(said)
            tally.late += 1
            break
        except subprocess.TimeoutExpired:
            pass
        ranks = children(process.pid)
        victim = draw.choice(ranks) if kind == "rank" and ranks else process.pid
        os.kill(victim, signal.SIGKILL)
        answer, said = process.communicate()
        tally.resumed += resumed(said)
        if process.returncode == 0:  # it was over, or so nearly that the victim was
            tally.late += 1
            break
        tally.kills += 1
        for rank in ranks:
            gone(rank, tally)
        if kind == "rank" and ranks and "was killed by SIGKILL" not in answer:
            tally.faults.append(f"{run.name}: a rank was killed, and the message is {answer!r}")
        whole(run, tally)
    if not Run.open(run).done(STAGE):
        tally.resumed += resumed(finished(words))
    tally.runs += 1


def resumed(said: str) -> list[int]:
    """The steps from which a stage went on, as it says itself."""
    return [int(line.split()[1].split("/")[0]) for line in said.splitlines() if line.endswith("resumed")]


def children(process: int) -> list[int]:
    """Process ids of the ranks that a launcher has started."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def gone(rank: int, tally: Tally) -> None:
    """Wait until an orphan has ended: it must do so on its own."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    tally.faults.append(f"rank {rank} outlived its launcher by 20 s")


def whole(run: Path, tally: Tally) -> None:
    """A stage that says it is finished must be, to the last byte."""
    opened = Run.open(run)
    for stage in ("teacher", STAGE):
        if (run / stage).exists():
            try:
                opened.use_input(stage)
            except Exception as error:
                tally.faults.append(f"{run.name}: {stage} is there and not whole: {error}")


def compare(calm: Path, run: Path, tally: Tally) -> None:
    """Hold the weights of `run` against those of the undisturbed one."""
    whole(run, tally)
    one, other = (load_file(folder / STAGE / "model.safetensors") for folder in (calm, run))
    distance = max(float((one[key] - other[key]).abs().max()) for key in one)
    zeros = sum(int(((one[key] == 0) != (other[key] == 0)).sum()) for key in one)
    tally.furthest = max(tally.furthest, distance)
    if distance > (1e-5 if tally.several else 0.0) or zeros:
        tally.faults.append(f"{run.name}: weights differ by up to {distance:.1e}, {zeros} zeros are elsewhere")


def two_on_one_folder(run: Path) -> str:
    """Start a second process while the first is training; what it says."""
    first = start(prune(run, 1))
    while not (run / f".{STAGE}.partial" / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)  # however slow the second one is, the first still holds the folder
    second = start(prune(run, 1))
    said, _ = second.communicate()
    os.kill(first.pid, signal.SIGCONT)
    first.communicate()
    word = json.loads(said)
    told = f"exit code {second.returncode}, {word.get('error')}: {word.get('message')}"
    return f"{told}; the first ended with {first.returncode}"


if __name__ == "__main__":
    main()
