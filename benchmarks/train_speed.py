"""Measure the speed of a training step, the cost of each of its parts, and the gain of each feature of the loop.

    python benchmarks/train_speed.py --task mrpc --data GLUE --model all-MiniLM-L6-v2 --out build/train-mrpc.json
    python benchmarks/train_speed.py                        # the embedded task and its small model
    python benchmarks/train_speed.py --device cuda --random-model 768x12 --batch 128 --steps 100

Every row is a setting of the product's own loop, run as its stage in a process of its own; rounds are interleaved, and
ratios are taken within a round. The row `published` does what the published code does: batches in random order padded
to `max_length`, attention maps of all layers, stand-in layers with dropout, AdamW one tensor at a time, masks applied
after every step, torch's own products. With one thread, time is the process's CPU time, so that a busy machine may be
used. Evaluations, prune events, loading and the first steps do not count.

The utilisation counts matrix products by their shapes: per padded token 2 operations for every weight of the layers,
zeros included, and attention; once for the teacher, three times for the student. `inside` is the speed within the
products, by their share of a profile. Teacher outputs are cached before the measured steps, once for all rounds; a row
without the cache shows what it saves.

On a GPU a timed round waits for the device only before the first and after the last measured step. The parts of a step
are measured in a separate round, which waits around each part. Memory is the peak that torch allocated in the measured
steps.
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
    rounds_by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.rounds):
        for row in options.rows:
            rounds_by_row[row].append(_child(options, row))
            print(".", end="", file=sys.stderr, flush=True)
    profiled_rows = options.rows if options.device == "cuda" else [row for row in options.rows if row in PROFILED]
    profiles = {row: _child(options, row, "--profile") for row in profiled_rows}
    report = {
        row: summary(row, rounds, rounds_by_row.get(options.against), peaks, profiles.get(row))
        for row, rounds in rounds_by_row.items()
    }
    _draw(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        header = {"task": options.task, "threads": options.threads, "machine": _machine(options.device), "peaks": peaks}
        options.out.write_text(json.dumps(header | {"rows": report, "rounds": rounds_by_row}, indent=1), "utf-8")


def summary(
    row: str, rounds: list[Any], base: list[Any] | None, peaks: dict[str, float], profile: dict[str, Any] | None
) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the row `base` within each round.

    Args:
        profile: a profiled round; it provides the parts of a step if the timed rounds have none.
    """
    median = {
        name: statistics.median(round_result[name] for round_result in rounds) for name in rounds[0] if name != "parts"
    }
    part_seconds = {
        name: statistics.median(round_result["parts"].get(name, 0.0) for round_result in rounds)
        for name in rounds[0]["parts"]
    }
    peak = peaks["bf16" if row.startswith("bf16") else "fp32"]
    of_peak = median["gflops"] / median["step_seconds"] / peak
    result = median | {"parts": part_seconds, "of_peak": of_peak}
    if base is not None:
        pairs = zip(rounds, base, strict=True)
        ratios = sorted(
            row_result["examples_per_second"] / base_result["examples_per_second"] for row_result, base_result in pairs
        )
        result["ratio"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    if profile is not None and "inside" in profile:
        result["inside"] = median["gflops"] / (profile["inside"] * median["step_seconds"]) / peak
    if profile is not None and part_seconds.keys() == {"rest"}:
        result["parts"] = profile["parts"]
    return result


def _draw(report: dict[str, dict[str, Any]]) -> None:
    names = ("data", "teacher", "student", "loss", "backward", "clip", "optimiser", "masks", "rest")
    print("\n| row | examples/s | tokens/s | ratio | of peak | inside | MB |", " | ".join(names), "|")
    print("|" + "---|" * (7 + len(names)))
    for row, row_report in report.items():
        middle, low, high = row_report.get("ratio", (float("nan"),) * 3)
        figures = [f"{row_report['examples_per_second']:.1f}", f"{row_report['tokens_per_second']:.0f}"]
        figures += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{row_report['of_peak']:.0%}"]
        figures += [
            f"{row_report['inside']:.0%}" if "inside" in row_report else "",
            f"{row_report['peak_megabytes']:.0f}",
        ]
        figures += [f"{1000 * row_report['parts'].get(name, 0.0):.1f}" for name in names]
        print("|", " | ".join([row, *figures]), "|")


def _child(options: argparse.Namespace, row: str, *extra: str) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), row, "--task", options.task, "--steps", str(options.steps), *extra]
    command += [f"--threads={options.threads}"] + [f"--data={options.data}"] * bool(options.data)
    command += [f"--model={options.model}"] * bool(options.model) + [f"--batch={options.batch}"] * bool(options.batch)
    command += [f"--random-model={options.random_model}"] * bool(options.random_model)
    command += [f"--device={options.device}", f"--warm={options.warm}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "XDG_CACHE_HOME": options.cache}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
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
