"""Kill a sweep's driver and its Ray workers with SIGKILL at random moments, and see whether anything is lost.

    python benchmarks/trouble_sweep.py /tmp/trouble --kills 20

Two kinds of victims: the Ray worker of a trial or of a teacher, and the driver, `spdtool sweep --ray local`. After a
driver's death the same command is given again, at once. After every kill each stage that says it is done must read
back as its hashes say; the dead driver's processes must end within seconds; and in the end no lock may be held, every
weight must be that of a sweep that nobody disturbed, to the last bit, and so must the table except for its seconds.
The task is the embedded demo, with four trials of a few steps and a snapshot at each.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spdtool.errors import RunLocked
from spdtool.recipe import TRAINING
from spdtool.run.folder import Run
from spdtool.run.lock import lock_folder
from spdtool.sweep.run_sweep import RESULT

KINDS = ("worker", "driver")
STEPS = {"teacher": 60, "prune": 60, "distill": 40, "finetune": 40}
WORK = ("ray::_work", "ray::_teach")  # how Ray names a worker that is busy with one of our tasks
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, which need a minute to see that all is over
SOON, LATER = 10.0, 90.0  # seconds within which a dead driver's processes, and those agents, must have ended
MOST = 3  # kills of workers under one driver: Ray starts a trial again as often


@dataclass
class Tally:
    """Keeps what has happened.

    Attributes:
        late: moments at which the sweep was over. struck: what was under way when something was killed.
        dead: sessions of dead drivers, and when each died. gone: seconds until all but Ray's agents had ended.
        faults: what must not be.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    late: int = 0
    sweeps: int = 0
    struck: list[str] = field(default_factory=list)
    dead: list[tuple[int, float]] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    root, draw, tally = chosen.folder.resolve(), random.Random(chosen.seed), Tally()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    calm, before = root / "calm", time.monotonic()
    finish(start(calm))
    seconds = time.monotonic() - before
    while sum(tally.kills.values()) < chosen.kills:
        out = root / str(tally.sweeps)
        disturb(out, min(chosen.kills - sum(tally.kills.values()), draw.randint(3, 6)), seconds, draw, tally)
        compare(calm, out, tally)
        shutil.rmtree(out)
        tally.sweeps += 1
        print(f"{tally.sweeps} sweeps, kills so far: {tally.kills}", flush=True)
    for session, since in tally.dead:
        ended(session, (), since + LATER, tally)
    kills = ", ".join(f"{kind} {count}" for kind, count in tally.kills.items())
    print(f"{tally.sweeps} sweeps of {seconds:.0f} s undisturbed; kills: {kills} ({tally.late} found nothing)")
    print("under way when they were killed: " + "; ".join(tally.struck))
    print(f"a dead driver's processes ended within {max(tally.gone, default=0):.1f} s, but for two agents of Ray's")
    print("\n".join(tally.faults) or "nothing was lost")
    raise SystemExit(1 if tally.faults else 0)


def start(out: Path) -> subprocess.Popen[str]:
    """The sweep, in a session of its own, to which all that Ray starts belongs too."""
    settings = [f"{stage}.max_steps={steps}" for stage, steps in STEPS.items()]
    settings += ["prune.events=3", "save_minutes=0", "device=cpu"]
    words = "sweep --tasks demo --recipes gmp,no-distillation --sparsities 0.8 --seeds 0,1 --ray local --json"
    command = [sys.executable, "-m", "spdtool", *words.split(), "--cpus-per-trial", "1", "--out", str(out)]
    return subprocess.Popen(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},  # else a busy machine starves them
        start_new_session=True,
    )


def finish(driver: subprocess.Popen[str]) -> None:
    """Wait for a sweep, which must end well."""
    answer, said = driver.communicate()
    if driver.returncode != 0:
        raise SystemExit(f"the sweep ended with {driver.returncode}:\n{answer[-3000:]}\n{said[-3000:]}")


def disturb(out: Path, times: int, seconds: float, draw: random.Random, tally: Tally) -> None:
    """Kill a worker or the driver of a sweep `times` times, then let it come to its end."""
    driver, workers = start(out), 0
    for _ in range(times):
        kind = "driver" if workers == MOST else draw.choice(KINDS)
        busy = wait(driver, out, draw.uniform(0, seconds / 3))
        if not busy:
            tally.late += 1
            break
        os.kill(driver.pid if kind == "driver" else draw.choice(busy), signal.SIGKILL)
        tally.kills[kind] += 1
        tally.struck.append(f"{kind}: {', '.join(under_way(out)) or 'nothing'}")
        whole(out, tally)
        workers += 1
        if kind == "driver":
            since = time.monotonic()
            driver.wait()
            tally.dead.append((driver.pid, since))
            driver, workers = start(out), 0
            ended(tally.dead[-1][0], AGENTS, since + SOON, tally)
            tally.gone.append(time.monotonic() - since)
    finish(driver)


def wait(driver: subprocess.Popen[str], out: Path, seconds: float) -> list[int]:
    """The workers that are busy with our tasks `seconds` after one began to train; none where the sweep is over."""
    started, until = time.time(), None
    while driver.poll() is None:
        if until is None and any(modified(file) > started for file in out.glob("*/*/.*.partial/metrics.jsonl")):
            until = time.monotonic() + seconds
        if until is not None and time.monotonic() >= until:
            busy = [process for process, name in processes(driver.pid) if name in WORK]
            if busy:
                return busy
        time.sleep(0.02)
    return []


def modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # the stage was done meanwhile
        return 0.0


def under_way(out: Path) -> list[str]:
    """The stages in progress, with the step of the snapshot from which each can go on."""
    folders = sorted(out.glob("*/*/.*.partial"))
    steps = [max([int(file.name[5:]) for file in folder.glob("state/step-*")], default=0) for folder in folders]
    return [f"{folder.name.split('.')[1]} {step}" for folder, step in zip(folders, steps, strict=True)]


def processes(session: int) -> Iterator[tuple[int, str]]:
    """Living processes of a session, with the first word of their command lines."""
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, its = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode().strip()
        except OSError:
            continue
        if int(its) == session and state != "Z":
            yield int(folder.name), name


def ended(session: int, but: tuple[str, ...], until: float, tally: Tally) -> None:
    """Wait until nothing of a dead driver's is left."""
    while left := [name for _, name in processes(session) if name not in but]:
        if time.monotonic() > until:
            tally.faults.append(f"{left} outlived their driver")
            return
        time.sleep(0.05)


def whole(out: Path, tally: Tally) -> None:
    """Every stage that says it is done must be, to the last byte."""
    for file in out.glob("*/*/run.json"):
        run = Run.open(file.parent)
        for stage in TRAINING:
            if run.done(stage):
                try:
                    run.use_input(stage)
                except Exception as error:
                    tally.faults.append(f"{out.name}: {stage} of {run.path.name} is there and not whole: {error}")


def compare(calm: Path, out: Path, tally: Tally) -> None:
    """Hold a disturbed sweep against the undisturbed one; try its locks."""
    whole(out, tally)
    for file in out.glob("*/*/run.json"):
        try:
            with lock_folder(file.parent):
                pass
        except RunLocked:
            tally.faults.append(f"{file.parent} is held by the dead")
    weights = {file.relative_to(calm): file.read_bytes() for file in calm.glob("*/*/*/*.safetensors")}
    assert len(weights) >= 2 + 4 * len(TRAINING), f"an undisturbed sweep holds {len(weights)} checkpoints"
    for path, content in weights.items():
        if not (out / path).is_file() or (out / path).read_bytes() != content:
            tally.faults.append(f"{out.name}: {path} is not what it is undisturbed")
    if table(calm) != table(out):
        tally.faults.append(f"{out.name}: the table is another one:\n{table(calm)}\n{table(out)}")
    left = list(out.glob("*/*/.*"))
    if left:
        tally.faults.append(f"{out.name}: left behind: {left}")


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of a sweep without their seconds."""
    return [row | {"seconds": None} for row in json.loads((out / RESULT).read_text("utf-8"))["rows"]]


if __name__ == "__main__":
    main()
