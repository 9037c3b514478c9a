"""Kill `spdtool compress` and `spdtool report` with SIGKILL at random moments, and check that nothing is lost.

    python benchmarks/kill_compress.py /tmp/kills --kills 50

The embedded task is compressed once without kills. Then it is compressed repeatedly: each call is killed after a random
time, and the next call resumes in the same folder. After each kill every stage with a stage.json must be complete. A
finished run must have the same weights and exported models as the uninterrupted one, to the last bit. The page of a
report must be the old or the new one, never a part. Needs only spdtool.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from spdtool.run.folder import Run

STAGES = ("teacher", "prune", "distill", "finetune", "export", "bench")
KILLS_A_RUN = 6  # then it is left alone, so that its weights are compared
SETTINGS = ("--set", "bench.rounds=1", "--set", "save_minutes=0")  # a snapshot at every step: most to go wrong
# files that do not depend on times, so two runs of one recipe must have the same bytes
COMPARED = ("*.safetensors", "*.onnx", "tokenizer.json", "golden.json")


@dataclass
class Tally:
    """Counts of kills, and the faults that they caused.

    Attributes:
        during: number of kills by the stage that was running, or `report`.
        faults: one line for each loss.
    """

    during: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Number of all kills."""
        return self.during.total()


def main() -> int:
    """Run the kills and print the faults; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    draw, tally = random.Random(options.seed), Tally()

    uninterrupted = options.folder / "undisturbed"
    start_time = time.monotonic()
    finish(compress(uninterrupted))
    seconds = time.monotonic() - start_time
    expected = digests(uninterrupted)

    number = 0
    while tally.kills < options.kills:
        run = options.folder / str(number)
        kill_compressions(run, draw, seconds, min(KILLS_A_RUN, options.kills - tally.kills), tally)
        finish(compress(run))
        check_stages(run, tally)
        for name in sorted(expected.items() ^ digests(run).items()):
            tally.faults.append(f"{run.name}: {name[0]} differs from the undisturbed run's")
        if tally.kills < options.kills:
            kill_report(run, draw, tally)
        print(f"run {number}: {tally.kills} kills so far, {len(tally.faults)} faults", flush=True)
        shutil.rmtree(run)
        number += 1
    print(f"{tally.kills} kills: " + ", ".join(f"{count} in {name}" for name, count in tally.during.items()))
    print("\n".join(tally.faults) or "nothing was lost")
    return int(bool(tally.faults))


def compress(run: Path) -> list[str]:
    """Return the arguments of the compression; the first call and the resuming ones use the same."""
    return ["compress", "--task", "demo", "--smoke", "--run", str(run), *SETTINGS]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command in a new session, so that its children can be killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "spdtool", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(arguments: list[str]) -> None:
    """Run a command; fail if it fails."""
    process = start(arguments)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"spdtool {' '.join(arguments)} ended with {process.returncode}:\n{output[-3000:]}")


def kill_after(arguments: list[str], seconds: float) -> bool:
    """Kill a command and its children after `seconds`; return False if it had already ended."""
    process = start(arguments)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def kill_compressions(run: Path, draw: random.Random, seconds: float, kills: int, tally: Tally) -> None:
    """Kill the compression up to `kills` times, each after a random share of the time of a whole run."""
    for _ in range(kills):
        if not kill_after(compress(run), draw.uniform(0.5, seconds)):
            return
        running = next((stage for stage in STAGES if not (run / stage / "stage.json").exists()), "after the bench")
        tally.during[running] += 1
        check_stages(run, tally)


def kill_report(run: Path, draw: random.Random, tally: Tally) -> None:
    """Write a page, kill a second writing of it, and check the page."""
    page = run / "page.html"
    start_time = time.monotonic()
    finish(["report", str(run), "--to", str(page)])
    seconds, before = time.monotonic() - start_time, page.read_bytes()
    if kill_after(["report", str(run), "--to", str(page)], draw.uniform(0.5, 1) * seconds):
        tally.during["report"] += 1
        after = page.read_bytes() if page.exists() else b""
        if not after.rstrip().endswith(b"</html>") or abs(len(after) - len(before)) > len(before) // 10:
            tally.faults.append(f"{run.name}: the page has {len(after)} bytes after a kill; before it {len(before)}")


def check_stages(run: Path, tally: Tally) -> None:
    """Record a fault for every finished stage whose files do not verify."""
    if not (run / "run.json").exists():
        return
    opened_run = Run.open(run)
    for stage in STAGES:
        if not (run / stage).exists():
            continue
        try:
            opened_run.use_input(stage)
        except Exception as error:  # whatever it is, something was lost
            tally.faults.append(f"{run.name}: {stage} is there and not whole: {error}")


def digests(run: Path) -> dict[str, str]:
    """Return the sha256 of every file that must be equal in two runs of one recipe, by path."""
    sums = {}
    for pattern in COMPARED:
        for file in run.rglob(pattern):
            sums[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


if __name__ == "__main__":
    sys.exit(main())
