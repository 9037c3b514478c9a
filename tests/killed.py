"""Script of `test_resume.py`: kill toy stages with SIGKILL at chosen moments, and run them again.

    python tests/killed.py FOLDER [TASK] < scenarios.json > results.json

This process imports everything and computes nothing; each stage runs in a fork, which may die.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import toys

from spdtool.errors import Stopped
from spdtool.models import load
from spdtool.run import folder as runs
from spdtool.run.folder import Run
from spdtool.training import snapshot

STEPS = 12  # of every stage
STAGES = ("teacher", "prune", "distill", "finetune")
for name in STAGES:
    importlib.import_module(f"spdtool.stages.{name}")
torch.set_num_threads(1)


TASK = sys.argv[2] if len(sys.argv) > 2 else "toy"
DATASETS = {
    "toy": lambda: toys.dataset(train=24, dev=16, dropout=0.2),
    "toy-tags": lambda: toys.tag_dataset(train=24, dev=16),
    "toy-questions": lambda: toys.question_dataset(train=24, dev=16, without=3),
    "toy-ranking": lambda: toys.ranking_dataset(train=24, dev=16, dropout=0.2),
    "toy-unlabeled": lambda: toys.dataset("toy-unlabeled", train=16, dev=16, dropout=0.2),
    "toy-unlabeled-tags": lambda: toys.tag_dataset("toy-unlabeled-tags", train=16, dev=16),
}
UNLABELED = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "unlabeled.txt"


def recipe(minutes: float) -> Any:
    """Build a recipe that needs all of a training state: dropout, grafting, every loss, the best weights."""
    students = [f"{s}.loss.attention=0.5" for s in STAGES[1:]] + [f"{s}.weight_decay=0.1" for s in STAGES[1:]]
    return toys.recipe(
        *[f"{stage}.batch_size=4" for stage in STAGES],
        *[f"{stage}.evaluations=2" for stage in STAGES],
        *students,
        "prune.grafting.start=0.6",
        "distill.grafting={schedule='linear', start=0.3}",
        "finetune.grafting.start=0.9",
        "finetune.quantize=int8",
        f"save_minutes={minutes}",
        sparsity=0.8,
        task=TASK,
        unlabeled=str(UNLABELED) if TASK.startswith("toy-unlabeled") else None,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, count: int, instead: Callable[..., None]) -> None:
    """Replace call number `count` of `owner.name` by `instead(original, *args)`, which ends the process."""
    original, calls = getattr(owner, name), 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return instead(original, *args, **options) if calls == count else original(*args, **options)

    setattr(owner, name, call)


def before(original: Any, *args: Any, **options: Any) -> None:
    die()


def after(original: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    die()


def signalling(name: str) -> Callable[..., None]:
    """Return a replacement that runs the original step and then sends this process the signal `name`."""

    def act(original: Any, *args: Any, **options: Any) -> None:
        original(*args, **options)
        os.kill(os.getpid(), getattr(signal, name))

    return act


def write_half(original: Any, tensors: Any, path: Path) -> None:
    original(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


def save_half(original: Any, model: Any, tokenizer: Any, folder: Path, weights: Any = None) -> None:
    model.save_pretrained(folder)
    die()


def remove_half(original: Any, root: Path, pattern: str) -> None:
    oldest = sorted(original(root, pattern))[0]
    next(iter(sorted(oldest.iterdir()))).unlink()
    die()


def plan(moment: str, count: int) -> None:
    """Make this process die the `count`-th time that `moment` comes."""
    step = torch.optim.AdamW
    if moment == "before the optimiser's step":
        patch(step, "step", count, before)
    elif moment == "after the optimiser's step":
        patch(step, "step", count, after)
    elif moment.startswith("SIG"):
        patch(step, "step", count, signalling(moment))
    elif moment == "snapshot half written":
        patch(snapshot, "save_file", count, write_half)
    elif moment == "snapshot written, not renamed":
        patch(snapshot, "write_snapshot_files", count, after)
    elif moment == "older snapshot half removed":
        patch(
            Path, "glob", count + 1, remove_half
        )  # a resuming stage looks once, then every write looks for older ones
    elif moment == "checkpoint half written":
        patch(load, "save_model", count, save_half)
    elif moment == "checkpoint written":
        patch(load, "save_model", count, after)
    elif moment == "record written":
        patch(runs, "write_json", count, after)
    elif moment in ("state put away", "committed"):
        patch(Path, "rename", count, after)
    else:
        raise ValueError(moment)


def run_in_fork(function: Callable[[], None]) -> int:
    """Call `function` in a fork; return its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        try:
            function()
        except Stopped as error:
            os._exit(error.exit_code)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_stage(run: Run, name: str) -> None:
    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(run)


def stage(folder: Path, name: str, minutes: float, deaths: tuple[str, int] | None = None) -> int:
    def train() -> None:
        toys.register(DATASETS[TASK]())
        run = Run.for_recipe(folder, recipe(minutes))
        if deaths is not None:
            plan_for(run, *deaths)
        run_stage(run, name)

    def plan_for(run: Run, moment: str, count: int) -> None:
        if moment in ("record written", "state put away", "committed"):
            original = Run._commit

            def commit(*args: Any, **options: Any) -> None:
                plan(moment, count)
                original(*args, **options)

            Run._commit = commit  # type: ignore[method-assign]
        else:
            plan(moment, count)

    return run_in_fork(train)


def main(root: Path, scenarios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    UNLABELED.write_text("\n".join(toys.rows(8, 7).first), "utf-8")
    results = []
    uninterrupted = root / "uninterrupted"
    for name in STAGES:
        exit_code = stage(uninterrupted, name, 0)
        if exit_code != 0:
            raise SystemExit(f"the uninterrupted {name} ended with {exit_code}")
    for number, scenario in enumerate(scenarios):
        folder, name = root / str(number), scenario["stage"]
        folder.mkdir()
        shutil.copy(uninterrupted / "run.json", folder)
        for earlier in STAGES[: STAGES.index(name)]:
            shutil.copytree(uninterrupted / earlier, folder / earlier)
        ends = [stage(folder, name, scenario["minutes"], tuple(death)) for death in scenario["deaths"]]
        is_done = (folder / name / "stage.json").exists()
        last = 0 if is_done else stage(folder, name, scenario["minutes"])
        results.append({"folder": str(folder), "ends": ends, "done": is_done, "last": last})
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
