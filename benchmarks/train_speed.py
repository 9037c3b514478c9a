"""How fast is a training step, what does each of its parts cost, and what does each feature of the loop buy?

    python benchmarks/train_speed.py --task mrpc --data GLUE --model all-MiniLM-L6-v2 --out build/train-mrpc.json
    python benchmarks/train_speed.py                        # the embedded task and its small model
    python benchmarks/train_speed.py --device cuda --random-model 768x12 --batch 128 --steps 100

Every row is a setting of the product's own loop, run as its stage in a process of its own; rounds are interleaved, and
ratios are taken within a round. The row `published` does what the published code does: batches in random order padded
to `max_length`, attention maps of all layers, stand-in layers with dropout, AdamW one tensor at a time, masks applied
after every step, torch's own products. With one thread, time is the process's CPU time, so that a busy machine may be
used. Evaluations, prune events, loading and the first steps do not count.

The utilisation is that of matrix products by their shapes: per padded token 2 multiply-adds of every weight of the
layers, zeros too, and attention; once for the teacher, three times for the student. `inside` is the speed within the
products, by their share of a profile. What the teacher shows is computed before the steps that count, once for all
rounds; a row without that tells what it saves.

On a GPU a timed round waits for the device before the first step that counts and after the last one, and nowhere else;
what the parts of a step take is measured in a round of its own, which waits around each. Memory is the most that torch
had allocated in the steps that count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from train_speed_rows import ON_CPU, ON_GPU, ROWS

WORKER = Path(__file__).with_name("train_speed_worker.py")
PROFILED = ("fp32, dense products", "bf16")  # a profile does not see the products of a plugin
WARM = {"cpu": 4, "cuda": 30}  # steps that do not count: in the first ones layers are compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", help="folder of the GLUE files")
    parser.add_argument("--model", help="encoder folder")
    parser.add_argument("--steps", type=int, default=16, help="steps that count, of each row in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, help="steps before those; in them layers are compiled")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--against", default="published", help="the row that ratios are to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=list(WARM), default="cpu")
    parser.add_argument("--batch", type=int, help="rows of a batch; the recipe's 32 leave a large GPU waiting")
    parser.add_argument("--random-model", metavar="768x12", help="a BERT of that width and depth, without a file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.warm = WARM[options.device] if options.warm is None else options.warm
    options.rows = options.rows or list(ON_GPU if options.device == "cuda" else ON_CPU)
    with tempfile.TemporaryDirectory() as options.cache:  # shared by the rounds
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure the rows in turn, round after round, and print the table."""
    peaks = _child(options, "peak")
    print(f"peak, GFLOP/s: {', '.join(f'{name} {value:.0f}' for name, value in peaks.items())}", flush=True)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.rounds):
        for row in options.rows:
            found[row].append(_child(options, row))
            print(".", end="", file=sys.stderr, flush=True)
    looked_into = options.rows if options.device == "cuda" else [row for row in options.rows if row in PROFILED]
    profiles = {row: _child(options, row, "--profile") for row in looked_into}
    report = {
        row: summary(row, rounds, found.get(options.against), peaks, profiles.get(row)) for row, rounds in found.items()
    }
    _draw(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": options.task, "threads": options.threads, "machine": _machine(options.device), "peaks": peaks}
        options.out.write_text(json.dumps(about | {"rows": report, "rounds": found}, indent=1), "utf-8")


def summary(
    row: str, rounds: list[Any], base: list[Any] | None, peaks: dict[str, float], profile: dict[str, Any] | None
) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the row `base` within each round.

    Args:
        profile: a round that was looked into; the parts of a step are its own where the timed rounds have none.
    """
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0] if name != "parts"}
    parts = {name: statistics.median(each["parts"].get(name, 0.0) for each in rounds) for name in rounds[0]["parts"]}
    peak = peaks["bf16" if row.startswith("bf16") else "fp32"]
    of_peak = median["gflops"] / median["step_seconds"] / peak
    result = median | {"parts": parts, "of_peak": of_peak}
    if base is not None:
        pairs = zip(rounds, base, strict=True)
        ratios = sorted(mine["examples_per_second"] / its["examples_per_second"] for mine, its in pairs)
        result["ratio"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    if profile is not None and "inside" in profile:
        result["inside"] = median["gflops"] / (profile["inside"] * median["step_seconds"]) / peak
    if profile is not None and parts.keys() == {"rest"}:
        result["parts"] = profile["parts"]
    return result


def _draw(report: dict[str, dict[str, Any]]) -> None:
    names = ("data", "teacher", "student", "loss", "backward", "clip", "optimiser", "masks", "rest")
    print("\n| row | examples/s | tokens/s | ratio | of peak | inside | MB |", " | ".join(names), "|")
    print("|" + "---|" * (7 + len(names)))
    for row, found in report.items():
        middle, low, high = found.get("ratio", (float("nan"),) * 3)
        figures = [f"{found['examples_per_second']:.1f}", f"{found['tokens_per_second']:.0f}"]
        figures += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{found['of_peak']:.0%}"]
        figures += [f"{found['inside']:.0%}" if "inside" in found else "", f"{found['peak_megabytes']:.0f}"]
        figures += [f"{1000 * found['parts'].get(name, 0.0):.1f}" for name in names]
        print("|", " | ".join([row, *figures]), "|")


def _child(options: argparse.Namespace, row: str, *more: str) -> dict[str, Any]:
    words = [sys.executable, str(WORKER), row, "--task", options.task, "--steps", str(options.steps), *more]
    words += [f"--threads={options.threads}"] + [f"--data={options.data}"] * bool(options.data)
    words += [f"--model={options.model}"] * bool(options.model) + [f"--batch={options.batch}"] * bool(options.batch)
    words += [f"--random-model={options.random_model}"] * bool(options.random_model)
    words += [f"--device={options.device}", f"--warm={options.warm}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "XDG_CACHE_HOME": options.cache}
    process = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{row}:\n{process.stderr}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _machine(device: str) -> str:
    if device == "cpu":
        return platform.processor()
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
