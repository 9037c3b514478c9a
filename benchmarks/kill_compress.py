"""Kill `spdtool compress` and `spdtool report` with SIGKILL at random moments, and see whether anything is lost.

    python benchmarks/kill_compress.py /tmp/kills --kills 50

The embedded task is compressed once without disturbance. Then it is compressed again and again: each call is killed
after a random time, and the next call goes on with the same folder. After each kill every stage that has a stage.json
must be whole. A run that has come to its end must hold the same weights and exported models as the undisturbed one, to
the last bit. The page of a report must be the older one or the newer one, never a part.
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
COMPARED = ("*.safetensors", "*.onnx", "tokenizer.json", "golden.json")


@dataclass
class Tally:
    """What the kills did.

    Attributes:
        during: number of kills by what was running, a stage or `report`.
        faults: one line for each thing that was lost.
    """

    during: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Number of all kills."""
        return self.during.total()


def main() -> int:
    """Kill as often as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    draw, tally = random.Random(options.seed), Tally()

    undisturbed = options.folder / "undisturbed"
    started = time.monotonic()
    finish(compress(undisturbed))
    seconds = time.monotonic() - started
    expected = digests(undisturbed)

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
    """The words of the compression; the same for the first call and for those that go on."""
    return ["compress", "--task", "demo", "--smoke", "--run", str(run), *SETTINGS]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that its children can be killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "spdtool", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(words: list[str]) -> None:
    """Run a command that must end well."""
    process = start(words)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"spdtool {' '.join(words)} ended with {process.returncode}:\n{output[-3000:]}")


def kill_after(words: list[str], seconds: float) -> bool:
    """Kill a command and its children after so long; return False if it had ended by then."""
    process = start(words)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def kill_compressions(run: Path, draw: random.Random, seconds: float, kills: int, tally: Tally) -> None:
    """Kill the compression up to `kills` times, at moments anywhere in the time that an undisturbed one takes."""
    for _ in range(kills):
        if not kill_after(compress(run), draw.uniform(0.5, seconds)):
            return
        running = next((stage for stage in STAGES if not (run / stage / "stage.json").exists()), "after the bench")
        tally.during[running] += 1
        check_stages(run, tally)


def kill_report(run: Path, draw: random.Random, tally: Tally) -> None:
    """Write a page, kill the writing of it again, and compare."""
    page = run / "page.html"
    started = time.monotonic()
    finish(["report", str(run), "--to", str(page)])
    seconds, before = time.monotonic() - started, page.read_bytes()
    if kill_after(["report", str(run), "--to", str(page)], draw.uniform(0.5, 1) * seconds):
        tally.during["report"] += 1
        after = page.read_bytes() if page.exists() else b""
        if not after.rstrip().endswith(b"</html>") or abs(len(after) - len(before)) > len(before) // 10:
            tally.faults.append(f"{run.name}: the page has {len(after)} bytes after a kill; before it {len(before)}")


def check_stages(run: Path, tally: Tally) -> None:
    """Note every stage that says it is finished and is not whole."""
    if not (run / "run.json").exists():
        return
    opened = Run.open(run)
    for stage in STAGES:
        if not (run / stage).exists():
            continue
        try:
            opened.use_input(stage)
        except Exception as error:  # whatever it is, something was lost
            tally.faults.append(f"{run.name}: {stage} is there and not whole: {error}")


def digests(run: Path) -> dict[str, str]:
    """The sha256 of every file that must be the same in two runs of one recipe, by its path in the run."""
    sums = {}
    for pattern in COMPARED:
        for file in run.rglob(pattern):
            sums[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


if __name__ == "__main__":
    sys.exit(main())
