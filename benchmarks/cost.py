"""Measure how the cost of a prune stage grows with rows, layers, width and sparsity: CPU seconds on one thread.

    python benchmarks/cost.py FOLDER --task sst2 --data GLUE --tokenizer all-MiniLM-L6-v2

Each point is one epoch of `spdtool prune` with a teacher of random weights, which costs as much as a trained one. One
quantity varies at a time, from a base of 2,000 rows, three layers of width 384 and 90 % zeros. A least-squares line is
fitted over the rows. Recipe `gmp` ranks by magnitude; width also varies with `default`, which prunes by second-order
scores. Needs the GLUE files and a tokenizer folder.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LENGTH = 32


@dataclass(frozen=True)
class Point:
    """The settings of one measured command."""

    rows: int = 2000
    layers: int = 3
    width: int = 384
    sparsity: float = 0.9
    recipe: str = "gmp"


BASE = Point()
GRID = {
    "rows": [replace(BASE, rows=rows) for rows in (1000, 2000, 4000, 8000)],
    "layers": [replace(BASE, layers=layers) for layers in (3, 6, 12)],
    "width": [replace(BASE, width=width) for width in (192, 384, 768)],
    "sparsity": [replace(BASE, sparsity=sparsity) for sparsity in (0.5, 0.9, 0.97)],
    "recipe": [replace(BASE, recipe="default", rows=1000, width=width) for width in (192, 384, 768)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to work in; it is emptied")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", required=True, help="folder of the GLUE files")
    parser.add_argument("--tokenizer", required=True, help="encoder folder whose tokenizer is taken")
    parser.add_argument("--vary", nargs="*", default=list(GRID), choices=list(GRID))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    seconds: dict[Point, float] = {}
    for varied in options.vary:
        print(f"\n| {varied} | recipe | rows | layers | width | sparsity | seconds |\n|---|---|---|---|---|---|---|")
        for point in GRID[varied]:
            if point not in seconds:
                seconds[point] = measure(point, options)
            figures = [point.recipe, point.rows, point.layers, point.width, point.sparsity, f"{seconds[point]:.1f}"]
            print("|", getattr(point, varied), "|", " | ".join(map(str, figures)), "|", flush=True)
        if varied == "rows":
            start, slope = fit_line([(point.rows, seconds[point]) for point in GRID[varied]])
            print(f"\n{start:.1f} s and {1000 * slope:.2f} ms a row")


def measure(point: Point, options: argparse.Namespace) -> float:
    """Measure the CPU seconds, user and system, of the whole `spdtool prune` command."""
    teacher = options.folder / f"teacher-{point.layers}x{point.width}"
    if not teacher.exists():
        write_teacher(teacher, options.tokenizer, point)
    run = options.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    sets = ["device=cpu", "teacher.accept=true", f"max_rows={point.rows}", f"max_length={LENGTH}", "prune.epochs=1"]
    sets += ["prune.scored_train_rows=0"]
    arguments = [
        "teacher",
        "--task",
        options.task,
        "--data",
        options.data,
        "--teacher",
        str(teacher),
        "--run",
        str(run),
    ]
    arguments += ["--recipe", point.recipe, "--sparsity", str(point.sparsity)]
    spdtool([*arguments, *(word for assignment in sets for word in ("--set", assignment))], options.folder)
    before = children_seconds()
    spdtool(["prune", "--run", str(run)], options.folder)
    return children_seconds() - before


def spdtool(words: list[str], folder: Path) -> None:
    """Run a command on one thread with its cache in `folder`; fail if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str((folder / "cache").resolve())}
    process = subprocess.run([sys.executable, "-m", "spdtool", *words], env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise SystemExit(f"spdtool {' '.join(words)}:\n{process.stderr[-3000:]}")


def children_seconds() -> float:
    """Return the CPU seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_teacher(folder: Path, tokenizer: str, point: Point) -> None:
    """Save a BERT classifier of random weights with two labels, and its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    shape: dict[str, Any] = {"num_hidden_layers": point.layers, "hidden_size": point.width, "num_labels": 2}
    shape |= {"intermediate_size": 4 * point.width, "num_attention_heads": point.width // 32}
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def fit_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Fit a line by least squares; return its intercept and slope."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope


if __name__ == "__main__":
    main()
