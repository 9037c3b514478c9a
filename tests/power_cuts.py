"""Script of `test_power_cut.py`: simulate a power cut at every moment of a stage, and run it again.

python tests/power_cuts.py FOLDER > result.json
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import killed
import power
import toys

from spdtool import console
from spdtool.errors import SpdError
from spdtool.run.folder import Run

STAGE = "prune"
SNAPSHOT_MINUTES = 1e9  # at evaluations only: four in a stage


# a resumed stage removes these unread, so states that differ only in them are tried once
UNREAD = ("writing", "spent", ".mode.tmp")


def train(folder: Path) -> None:
    toys.register(toys.dataset(train=24, dev=16, dropout=0.2))
    killed.run_stage(Run.for_recipe(folder, killed.recipe(SNAPSHOT_MINUTES)), STAGE)


def record_cuts(folder: Path, states: Path, *, flushing: bool) -> None:
    """Run the stage in a fork, and write each state that a power cut could leave into its own folder."""

    def record() -> None:
        with power.recording(folder) as cuts:
            if not flushing:
                vars(os)["fsync"] = lambda _: None  # only in the fork
            train(folder)
        states.mkdir()
        written: list[power.Node] = []
        for number, (moment, state) in enumerate(cuts.states.items()):
            read = power.leave_out(state, UNREAD)
            if read in written:
                continue
            written.append(read)
            power.write_state(state, states / f"{number:03d}")
            (states / f"{number:03d}.txt").write_text(moment)

    exit_code = killed.run_in_fork(record)
    if exit_code != 0:
        raise SystemExit(f"the recorded stage ended with {exit_code}")


def try_state(folder: Path) -> dict[str, Any]:
    """Run the stage again in a fork; report its exit code, the step it resumed at, and its notes."""
    report = folder.with_suffix(".json")

    def resume_stage() -> None:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            console.configure()
            error = None
            if not (folder / STAGE / "stage.json").exists():
                try:
                    train(folder)
                except SpdError as exception:
                    error = exception
        report.write_text(json.dumps({"output": f"{output.getvalue()}{error or ''}"}))
        if error is not None:
            os._exit(error.exit_code)

    exit_code = killed.run_in_fork(resume_stage)
    output = json.loads(report.read_text())["output"] if report.exists() else "it crashed"
    resume = re.search(rf"{STAGE} (\d+)/12  resumed", output)
    step = int(resume[1]) if resume else 0
    is_committed = "pruned" not in output and step == 0  # it had nothing to do
    return {
        "ended": exit_code,
        "weights": digest(folder),
        "resumed": killed.STEPS if is_committed else step,
        "notes": " ".join(line for line in output.splitlines() if line.startswith("note:")),
    }


def digest(folder: Path) -> str:
    file = folder / STAGE / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else "none"


def main(root: Path) -> dict[str, Any]:
    uninterrupted = root / "uninterrupted"
    for stage in ("teacher", STAGE):
        if killed.stage(uninterrupted, stage, SNAPSHOT_MINUTES) != 0:
            raise SystemExit(f"the uninterrupted {stage} failed")
    results: dict[str, Any] = {"uninterrupted": digest(uninterrupted)}
    for name, flushing in (("states", True), ("unflushed", False)):
        folder, states = root / name / "run", root / name / "cuts"
        shutil.copytree(uninterrupted, folder)
        shutil.rmtree(folder / STAGE)
        record_cuts(folder, states, flushing=flushing)
        numbers = sorted(path for path in states.iterdir() if path.is_dir())
        # without flushing a sample of the states is enough to show that losses are detected
        sampled = numbers if flushing else numbers[:: max(1, len(numbers) // 8)]
        results[name] = {path.with_suffix(".txt").read_text(): try_state(path) for path in sampled}
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
