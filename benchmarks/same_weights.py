"""Check that a change alters no result: run the demo task from two installs and compare every weight and file.

    python benchmarks/same_weights.py BEFORE/.venv/bin/spdtool .venv/bin/spdtool
    python benchmarks/same_weights.py .venv/bin/spdtool --save before.json       # then change the code
    python benchmarks/same_weights.py .venv/bin/spdtool --against before.json

Each run goes through teacher, prune, distill, finetune and export, on one thread. Compared by sha256: the weights of
every stage and every exported model. Exits with 1 if one differs. Needs only the installs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = "default,spd,obert,reference"
# The published schedule has 60 epochs of batches padded to 128 tokens; a tenth of it takes the same path.
# the reference recipe trains 60 epochs; a few show a difference as well
SHORTENED = {"reference": ("prune.epochs=3", "distill.epochs=1", "finetune.epochs=2")}
STAGES = ("teacher", "prune", "distill", "finetune", "export")
RESULTS = ("*.safetensors", "*.onnx", "*.onnx_data")


def digests(spdtool: Path, recipe: str, folder: Path) -> dict[str, str]:
    """Run the demo task up to the export; return sha256 by file, relative to the run folder."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    run = folder / recipe
    for stage in STAGES:
        options = []
        if stage == "teacher":
            options = ["--task", "demo", "--recipe", recipe]
            for setting in SHORTENED.get(recipe, ()):
                options += ["--set", setting]
        command = [str(spdtool), stage, "--run", str(run), *options]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            sys.exit(f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    files = sorted({file for pattern in RESULTS for file in run.rglob(pattern)})
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def measure(spdtool: Path, recipes: list[str], save: Path | None = None) -> dict[str, str]:
    """Return the digests of every recipe from one install; write them to `save` after each recipe."""
    digest_by_file: dict[str, str] = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            digest_by_file |= digests(spdtool.absolute(), recipe, Path(folder))
        if save is not None:
            save.write_text(json.dumps(digest_by_file, indent=1) + "\n", "utf-8")
        print(f"{spdtool}: {recipe} done", flush=True)
    return digest_by_file


def report(before: dict[str, str], after: dict[str, str]) -> int:
    """Print the files that differ; return their number."""
    different = [file for file in before | after if before.get(file) != after.get(file)]
    for file in different:
        print(f"differs: {file}")
    print(f"{len(before | after) - len(different)} files are the same to the last bit, {len(different)} differ")
    return len(different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("spdtool", type=Path, nargs="+", help="one or two spdtool commands")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--save", type=Path, help="write the digests of the first install here")
    parser.add_argument("--against", type=Path, help="compare the first install with digests written by --save")
    arguments = parser.parse_args()
    recipes = arguments.recipes.split(",")
    results = [measure(arguments.spdtool[0], recipes, arguments.save)]
    results += [measure(spdtool, recipes) for spdtool in arguments.spdtool[1:]]
    if arguments.against:
        saved = json.loads(arguments.against.read_text("utf-8"))
        wanted = {file: digest for file, digest in saved.items() if file.split("/")[0] in recipes}
        results.insert(0, wanted)
    if len(results) == 2:
        sys.exit(min(report(*results), 1))


if __name__ == "__main__":
    main()
