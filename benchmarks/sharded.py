"""Measure memory per process and time per step with `shard=true`, on CPUs.

    python benchmarks/sharded.py FOLDER --data GLUE --tokenizer all-MiniLM-L6-v2 --width 768 --layers 12

Each row is a prune stage of a few steps (SST-2, batch 8, recipe `gmp`, a teacher of random weights). Memory is the
resident memory of the largest process: after an optimiser step, once the C library has returned its free memory to the
system (a third of the total, after loading), and at the peak, while models are loaded. Seconds are those of a step of
the slowest process. Needs the GLUE files and a tokenizer folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from cost import Point, spdtool, write_teacher

STEPS = 6
PLUGIN = """
import atexit, ctypes, json, os, time, torch
from pathlib import Path

original, steps, resident = torch.optim.AdamW.step, [], []

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) // 1024

def step(*args, **options):
    made = original(*args, **options)
    steps.append(time.monotonic())
    if len(steps) == {last}:
        ctypes.CDLL(None).malloc_trim(0)
        resident.append(field("VmRSS"))
    return made

def tell():
    if resident:
        seconds = (steps[-1] - steps[1]) / (len(steps) - 2)
        said = {{"in a step": resident[0], "peak": field("VmHWM"), "seconds": seconds}}
        Path({folder!r}, os.environ.get("RANK", "0") + ".json").write_text(json.dumps(said))

torch.optim.AdamW.step = step
atexit.register(tell)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--data", required=True, help="folder of the GLUE files")
    parser.add_argument("--tokenizer", required=True, help="encoder folder whose tokenizer is taken")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    root = options.folder.resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    write_teacher(root / "given", options.tokenizer, Point(layers=options.layers, width=options.width))
    sets = ["device=cpu", "max_rows=64", "max_length=32", f"prune.max_steps={STEPS}", "prune.batch_size=8"]
    sets += ["prune.scored_train_rows=0", "prune.events=1", "save_minutes=1000"]
    arguments = [
        "teacher",
        "--task",
        "sst2",
        "--data",
        options.data,
        "--teacher",
        str(root / "given"),
        "--recipe",
        "gmp",
    ]
    arguments += ["--run", str(root / "teacher"), *(word for assignment in sets for word in ("--set", assignment))]
    spdtool(arguments, root)
    print("| processes | sharded | MB in a step | MB peak | seconds a step |\n|---|---|---|---|---|")
    for count, sharded in ((1, False), (2, False), (2, True)):
        memory, longest = measure_run(root, count, sharded)
        print(f"| {count} | {sharded} | {memory['in a step']} | {memory['peak']} | {longest:.2f} |", flush=True)


def measure_run(root: Path, count: int, sharded: bool) -> tuple[dict[str, int], float]:
    """Run a prune stage; return the memory of the largest process in MB and the seconds of the slowest."""
    reports_folder, plugins = root / f"said-{count}-{sharded}", root / "plugins"
    reports_folder.mkdir()
    plugins.mkdir(exist_ok=True)
    (plugins / "look.py").write_text(PLUGIN.format(folder=str(reports_folder), last=STEPS))
    run = root / f"run-{count}-{sharded}"
    shutil.copytree(root / "teacher", run)
    arguments = ["prune", "--run", str(run), "--plugins-dir", str(plugins), "--processes", str(count)]
    spdtool([*arguments, "--set", f"shard={str(sharded).lower()}"], root)
    reports = [json.loads(file.read_text("utf-8")) for file in reports_folder.iterdir()]
    assert len(reports) == count, f"{len(reports)} of {count} processes told what they took"
    return {name: max(report[name] for report in reports) for name in ("in a step", "peak")}, max(
        report["seconds"] for report in reports
    )


if __name__ == "__main__":
    main()
