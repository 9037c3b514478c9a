"""Script of `test_ranks.py`: run toy stages on several ranks, each in a fork.

    python tests/ranks.py FOLDER < calls.json > results.json

This process imports everything and computes nothing. A call names a run folder, a stage, the number of ranks and
settings of the recipe, and optionally a rank to kill after an optimiser step.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import toys

from spdtool import console
from spdtool.run.folder import Run

STAGES = ("teacher", "prune", "distill", "finetune")
for name in STAGES:
    importlib.import_module(f"spdtool.stages.{name}")
torch.set_num_threads(1)


def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def recipe(name: str, settings: list[str]) -> Any:
    """Build a recipe without dropout, with an epsilon that keeps steps from rounding noise small."""
    exact = [f"{stage}.{assignment}" for stage in STAGES for assignment in ("epsilon=1e-4", "keep_best=false")]
    return toys.recipe(*exact, *settings, name=name, sparsity=0.8)


def die_after(step: int) -> None:
    original, calls = torch.optim.AdamW.step, 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **options)
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.optim.AdamW.step = call  # type: ignore[method-assign]


def run_rank(call: dict[str, Any]) -> None:
    """Run a stage as one rank; fail if a rank other than 0 touched a file."""
    from spdtool.errors import SpdError

    console.configure()
    toys.register(toys.dataset(train=call.get("rows", 44), dev=20, pairs=True))
    run = Run.for_recipe(call["folder"], recipe(call.get("recipe", "default"), call["sets"]))
    written = []
    for owner, method in ((Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        spy(owner, method, written)
    stage = importlib.import_module(f"spdtool.stages.{call['stage']}")
    try:
        getattr(stage, call["stage"])(run)
    except SpdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(error.exit_code)
    if os.environ.get("RANK", "0") != "0":
        assert written == [], f"rank {os.environ['RANK']} has touched {written}"


def spy(owner: Any, method: str, calls: list[Any]) -> None:
    original = getattr(owner, method)

    def call(*args: Any, **options: Any) -> Any:
        calls.append((method, str(args[0])))
        return original(*args, **options)

    setattr(owner, method, call)


def start(call: dict[str, Any], rank: int, address: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    try:
        if call["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(call["ranks"])}
            os.environ |= {"LOCAL_WORLD_SIZE": str(call["ranks"]), "OMP_NUM_THREADS": "1"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(address)}
        if call.get("dies") == rank:
            die_after(call["after"])
        run_rank(call)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(root: Path, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for number, call in enumerate(calls):
        address = port()
        logs = [root / f"{number}-{rank}.log" for rank in range(call["ranks"])]
        if "copy" in call and not Path(call["folder"]).exists():
            shutil.copytree(call["copy"], call["folder"])
        ranks = [start(call, rank, address, log) for rank, log in enumerate(logs)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        results.append({"ends": ends, "output": [log.read_text("utf-8") for log in logs]})
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
