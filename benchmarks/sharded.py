"""How much memory does each of several processes take with `shard=true`, and what does it cost in time? On CPUs.

    python benchmarks/sharded.py FOLDER --data GLUE --tokenizer all-MiniLM-L6-v2 --width 768 --layers 12

Each row is a prune stage of a few steps (SST-2, batch 8, recipe `gmp`, a teacher of random weights), with AdamW's
state. Memory is the resident one of the largest process, after an optimiser step and once the C library has given back
what it holds in reserve (a third of it, after loading), and at its peak, when models are loaded. Seconds are those of a
step of the slowest process.
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
    words = ["teacher", "--task", "sst2", "--data", options.data, "--teacher", str(root / "given"), "--recipe", "gmp"]
    words += ["--run", str(root / "teacher"), *(word for each in sets for word in ("--set", each))]
    spdtool(words, root)
    print("| processes | sharded | MB in a step | MB peak | seconds a step |\n|---|---|---|---|---|")
    for count, sharded in ((1, False), (2, False), (2, True)):
        most, longest = measured(root, count, sharded)
        print(f"| {count} | {sharded} | {most['in a step']} | {most['peak']} | {longest:.2f} |", flush=True)


def measured(root: Path, count: int, sharded: bool) -> tuple[dict[str, int], float]:
    """The memory of the largest process, and the seconds of the slowest."""
    said, plugins = root / f"said-{count}-{sharded}", root / "plugins"
    said.mkdir()
    plugins.mkdir(exist_ok=True)
    (plugins / "look.py").write_text(PLUGIN.format(folder=str(said), last=STEPS))
    run = root / f"run-{count}-{sharded}"
    shutil.copytree(root / "teacher", run)
    words = ["prune", "--run", str(run), "--plugins-dir", str(plugins), "--processes", str(count)]
    spdtool([*words, "--set", f"shard={str(sharded).lower()}"], root)
    told = [json.loads(file.read_text("utf-8")) for file in said.iterdir()]
    assert len(told) == count, f"{len(told)} of {count} processes told what they took"
    return {name: max(each[name] for each in told) for name in ("in a step", "peak")}, max(t["seconds"] for t in told)


if __name__ == "__main__":
    main()
