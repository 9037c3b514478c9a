"""Measure whether memory stays flat as the data grow: ten million rows in Parquet files against a hundred thousand.

    python benchmarks/flat_memory.py FOLDER --rows 100000 10000000 --model all-MiniLM-L6-v2

Writes the files and the cache under FOLDER (about 100 bytes a row). For each number of rows a separate process measures
the largest anonymous memory (RssAnon, sampled every 10 ms) while it reads, tokenises and iterates the files in batches
of 32. Pages of mapped files are not counted, because the system can reclaim them. Needs pyarrow and a tokenizer folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

FILE_ROWS = 100_000
WORDS = [a + b for a in ("ba", "do", "ki", "lu", "me", "no", "pa", "ri") for b in ("ta", "so", "ve", "n", "ck", "sh")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--model", required=True, help="folder of the tokenizer")
    parser.add_argument("--batches", type=int, default=50_000, help="most batches that are iterated")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.folder / str(options.child), options.model, options.batches)))
        return
    print("| rows | reading MB | tokenising MB | iterating MB | seconds | again, seconds |\n|---|---|---|---|---|---|")
    for rows in options.rows:
        write(options.folder / str(rows), rows)
        command = [sys.executable, __file__, str(options.folder), "--model", options.model, "--child", str(rows)]
        command += ["--batches", str(options.batches)]
        environment = os.environ | {"XDG_CACHE_HOME": str((options.folder / "cache").resolve())}
        first, cached = (
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
            for _ in range(2)
        )
        figures = [f"{first[step]:.0f}" for step in ("reading", "tokenising", "iterating")]
        print("|", rows, "|", " | ".join(figures), f"| {first['seconds']:.1f} | {cached['seconds']:.1f} |", flush=True)


def write(folder: Path, rows: int) -> None:
    """Write `train/*.parquet` of `FILE_ROWS` rows each and a small dev file, unless they exist."""
    import pyarrow
    from pyarrow import parquet

    draw = random.Random(0)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    sizes = [min(FILE_ROWS // 2, rows - start) for start in range(0, rows, FILE_ROWS // 2)]
    for name, size in [*((f"train/{i:05d}.parquet", size) for i, size in enumerate(sizes)), ("dev.parquet", 1000)]:
        if not (folder / name).exists():
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(size)]
            labels = [draw.randrange(2) for _ in range(size)]
            parquet.write_table(pyarrow.table({"text": texts, "label": labels}), folder / name)


class Anonymous:
    """Samples the anonymous memory of this process; `take` returns the largest since the last call, in MB."""

    def __init__(self) -> None:
        self._most = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> float:
        self._look()
        largest, self._most = self._most, 0.0
        return largest

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text("utf-8")
        self._most = max(self._most, float(status.split("RssAnon:")[1].split()[0]) / 1024)

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(0.01)


def measure(folder: Path, model: str, batches: int) -> dict[str, float]:
    """Return the largest anonymous memory of each step in MB, and the seconds until the first batch."""
    from spdtool.data import tokens as data
    from spdtool.data.batches import training_batches
    from spdtool.models.load import load_tokenizer
    from spdtool.recipe.reading import build_recipe
    from spdtool.tasks.prepare import find_task

    recipe, start = build_recipe("default", {"task": "local", "data": str(folder)}), time.monotonic()
    anonymous, tokenizer = Anonymous(), load_tokenizer(model)
    splits = find_task(recipe).read_rows(recipe)
    results = {"reading": anonymous.take()}
    rows = data.encode_splits(tokenizer, splits, recipe.max_length)["train"]
    results["tokenising"] = anonymous.take()
    epoch = training_batches(rows, 32, recipe.seed, 0, pool=recipe.pool)
    rows.collate(epoch[0])
    results["seconds"] = time.monotonic() - start
    for index in range(min(len(epoch), batches)):
        rows.collate(epoch[index])
    return results | {"iterating": anonymous.take()}


if __name__ == "__main__":
    main()
