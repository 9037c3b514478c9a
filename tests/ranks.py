"""Run by `test_processes.py` as a process of its own: toy stages on several ranks, which are forks of it.

    python tests/ranks.py FOLDER < calls.json > results.json

This process imports everything and computes nothing. A call names a run folder, a stage, the number of ranks and
settings of the recipe; it may have ranks killed after some optimiser step.
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
    """No dropout, and an epsilon under which gradients that are nothing but rounding stay small."""
    exact = [f"{stage}.{what}" for stage in STAGES for what in ("epsilon=1e-4", "keep_best=false")]
    return toys.recipe(*exact, *settings, name=name, sparsity=0.8)


def die_after(step: int) -> None:
    original, calls = torch.optim.AdamW.step, 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        made = original(*args, **options)
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    torch.optim.AdamW.step = call  # type: ignore[method-assign]


def work(call: dict[str, Any]) -> None:
    """One rank's part in a stage."""
    from spdtool.errors import SpdError

    console.configure()
    toys.register(toys.dataset(train=call.get("rows", 44), dev=20, pairs=True))
    run = Run.for_recipe(call["folder"], recipe(call.get("recipe", "default"), call["sets"]))
    written = []
    for owner, what in ((Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        spy(owner, what, written)
    stage = importlib.import_module(f"spdtool.stages.{call['stage']}")
    try:
        getattr(stage, call["stage"])(run)
    except SpdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(error.exit_code)
    if os.environ.get("RANK", "0") != "0":
        assert written == [], f"rank {os.environ['RANK']} has touched {written}"


def spy(owner: Any, what: str, seen: list[Any]) -> None:
    original = getattr(owner, what)

    def call(*args: Any, **options: Any) -> Any:
        seen.append((what, str(args[0])))
        return original(*args, **options)

    setattr(owner, what, call)


def start(call: dict[str, Any], rank: int, address: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        if call["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(call["ranks"])}
            os.environ |= {"LOCAL_WORLD_SIZE": str(call["ranks"]), "OMP_NUM_THREADS": "1"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(address)}
        if call.get("dies") == rank:
            die_after(call["after"])
        work(call)
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
        results.append({"ends": ends, "said": [log.read_text("utf-8") for log in logs]})
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
