"""Kill a sweep's driver and its Ray workers with SIGKILL at random moments, and check that nothing is lost.

    python benchmarks/trouble_sweep.py /tmp/trouble --kills 20

Two kinds of victims: the Ray worker of a trial or of a teacher, and the driver, `spdtool sweep --ray local`. After a
driver's death the same command is started again at once. After every kill each finished stage must verify, and the dead
driver's processes must end within seconds. At the end no lock may be held, and the weights and the table (except its
seconds) must equal those of an uninterrupted sweep, to the last bit. The task is the embedded demo, with four trials of
a few steps and a snapshot at each. Needs ray.
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
    """Counts and faults of the sweeps.

    Attributes:
        late: number of kills that came after the end of the sweep.
        stages_at_kill: the stages in progress at each kill.
        dead: sessions of dead drivers, and when each died.
        seconds_to_end: seconds until all processes of a dead driver but Ray's agents had ended.
        faults: one line for each loss.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    late: int = 0
    sweeps: int = 0
    stages_at_kill: list[str] = field(default_factory=list)
    dead: list[tuple[int, float]] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root, draw, tally = options.folder.resolve(), random.Random(options.seed), Tally()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    uninterrupted, before = root / "calm", time.monotonic()
    finish(start(uninterrupted))
    seconds = time.monotonic() - before
    while sum(tally.kills.values()) < options.kills:
        out = root / str(tally.sweeps)
        kill_sweep(out, min(options.kills - sum(tally.kills.values()), draw.randint(3, 6)), seconds, draw, tally)
        compare_sweeps(uninterrupted, out, tally)
        shutil.rmtree(out)
        tally.sweeps += 1
        print(f"{tally.sweeps} sweeps, kills so far: {tally.kills}", flush=True)
    for session, death_time in tally.dead:
        wait_for_processes(session, (), death_time + LATER, tally)
    kills = ", ".join(f"{kind} {count}" for kind, count in tally.kills.items())
    print(f"{tally.sweeps} sweeps of {seconds:.0f} s undisturbed; kills: {kills} ({tally.late} found nothing)")
    print("under way when they were killed: " + "; ".join(tally.stages_at_kill))
    longest = max(tally.seconds_to_end, default=0)
    print(f"a dead driver's processes ended within {longest:.1f} s, but for two agents of Ray's")
    print("\n".join(tally.faults) or "nothing was lost")
    raise SystemExit(1 if tally.faults else 0)


def start(out: Path) -> subprocess.Popen[str]:
    """Start the sweep in a new session, which Ray's processes belong to as well."""
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
    """Wait for a sweep; exit if it fails."""
    output, errors = driver.communicate()
    if driver.returncode != 0:
        raise SystemExit(f"the sweep ended with {driver.returncode}:\n{output[-3000:]}\n{errors[-3000:]}")


def kill_sweep(out: Path, times: int, seconds: float, draw: random.Random, tally: Tally) -> None:
    """Kill a worker or the driver of a sweep `times` times, then run it to its end."""
    driver, workers = start(out), 0
    for _ in range(times):
        kind = "driver" if workers == MOST else draw.choice(KINDS)
        busy_workers = wait(driver, out, draw.uniform(0, seconds / 3))
        if not busy_workers:
            tally.late += 1
            break
        os.kill(driver.pid if kind == "driver" else draw.choice(busy_workers), signal.SIGKILL)
        tally.kills[kind] += 1
        tally.stages_at_kill.append(f"{kind}: {', '.join(list_stages_in_progress(out)) or 'nothing'}")
        check_sweep_stages(out, tally)
        workers += 1
        if kind == "driver":
            death_time = time.monotonic()
            driver.wait()
            tally.dead.append((driver.pid, death_time))
            driver, workers = start(out), 0
            wait_for_processes(tally.dead[-1][0], AGENTS, death_time + SOON, tally)
            tally.seconds_to_end.append(time.monotonic() - death_time)
    finish(driver)


def wait(driver: subprocess.Popen[str], out: Path, seconds: float) -> list[int]:
    """Return the workers busy with trials `seconds` after training began; [] if the sweep is over."""
    wait_start, deadline = time.time(), None
    while driver.poll() is None:
        if deadline is None and any(modified(file) > wait_start for file in out.glob("*/*/.*.partial/metrics.jsonl")):
            deadline = time.monotonic() + seconds
        if deadline is not None and time.monotonic() >= deadline:
            busy_workers = [process for process, name in processes(driver.pid) if name in WORK]
            if busy_workers:
                return busy_workers
        time.sleep(0.02)
    return []


def modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # the stage was done meanwhile
        return 0.0


def list_stages_in_progress(out: Path) -> list[str]:
    """List the stages in progress, with the step of the snapshot from which each can resume."""
    folders = sorted(out.glob("*/*/.*.partial"))
    steps = [max([int(file.name[5:]) for file in folder.glob("state/step-*")], default=0) for folder in folders]
    return [f"{folder.name.split('.')[1]} {step}" for folder, step in zip(folders, steps, strict=True)]


def processes(session: int) -> Iterator[tuple[int, str]]:
    """Yield the live processes of a session, with the first word of their command lines."""
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, process_session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode().strip()
        except OSError:
            continue
        if int(process_session) == session and state != "Z":
            yield int(folder.name), name


def wait_for_processes(session: int, ignored: tuple[str, ...], deadline: float, tally: Tally) -> None:
    """Wait until all processes of a dead driver have ended, except the `ignored` ones."""
    while remaining := [name for _, name in processes(session) if name not in ignored]:
        if time.monotonic() > deadline:
            tally.faults.append(f"{remaining} outlived their driver")
            return
        time.sleep(0.05)


def check_sweep_stages(out: Path, tally: Tally) -> None:
    """Record a fault for every finished stage of a sweep whose files do not verify."""
    for file in out.glob("*/*/run.json"):
        run = Run.open(file.parent)
        for stage in TRAINING:
            if run.done(stage):
                try:
                    run.use_input(stage)
                except Exception as error:
                    tally.faults.append(f"{out.name}: {stage} of {run.path.name} is there and not whole: {error}")


def compare_sweeps(uninterrupted: Path, out: Path, tally: Tally) -> None:
    """Compare a killed sweep with the uninterrupted one, and check that no lock is held."""
    check_sweep_stages(out, tally)
    for file in out.glob("*/*/run.json"):
        try:
            with lock_folder(file.parent):
                pass
        except RunLocked:
            tally.faults.append(f"{file.parent} is held by the dead")
    weights = {file.relative_to(uninterrupted): file.read_bytes() for file in uninterrupted.glob("*/*/*/*.safetensors")}
    assert len(weights) >= 2 + 4 * len(TRAINING), f"an undisturbed sweep holds {len(weights)} checkpoints"
    for path, content in weights.items():
        if not (out / path).is_file() or (out / path).read_bytes() != content:
            tally.faults.append(f"{out.name}: {path} is not what it is undisturbed")
    if table(uninterrupted) != table(out):
        tally.faults.append(f"{out.name}: the table is another one:\n{table(uninterrupted)}\n{table(out)}")
    leftovers = list(out.glob("*/*/.*"))
    if leftovers:
        tally.faults.append(f"{out.name}: left behind: {leftovers}")


def table(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a sweep without their seconds."""
    return [row | {"seconds": None} for row in json.loads((out / RESULT).read_text("utf-8"))["rows"]]


if __name__ == "__main__":
    main()
