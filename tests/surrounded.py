"""Script of `test_same_weights.py`: train toy stages in its environment, print hashes of their weights as JSON.

python tests/surrounded.py FOLDER STAGE...
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import toys

from spdtool.run.folder import Run


def main(folder: Path, stages: list[str]) -> dict[str, list[str | int | None]]:
    os.umask(int(os.environ.get("TEST_UMASK", "022"), 8))
    toys.register(toys.dataset(train=24, dev=16, dropout=0.2))
    run = Run.for_recipe(folder, toys.recipe(*os.environ.get("TEST_SETS", "").split(), sparsity=0.8))
    result: dict[str, list[str | int | None]] = {}
    for name in stages:
        getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(run)
        weights = hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
        machine = run.record(name).machine
        assert machine is not None
        result[name] = [weights, machine.training_threads, machine.arithmetic]
    return result


if __name__ == "__main__":
    real_output, sys.stdout = sys.stdout, sys.stderr  # the stages print as well
    json.dump(main(Path(sys.argv[1]).absolute(), sys.argv[2:]), real_output)
