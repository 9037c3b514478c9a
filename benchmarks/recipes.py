"""Compare recipes on one task at equal epochs: one teacher per seed, every recipe from it, mean and deviation.

    python benchmarks/recipes.py --task demo --seeds 0,1,2 --epochs 3,1,1 --set max_length=15

Writes the runs under --out (they resume), prints one line per run and a table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from spdtool import console, recipe
from spdtool.run import Run
from spdtool.stages.distill import distill
from spdtool.stages.finetune import finetune
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher

STAGES = {"teacher": teacher, "prune": prune, "distill": distill, "finetune": finetune}


def finished(run: Run) -> dict[str, float]:
    """Dev score after each training stage, making what is missing; and the seconds of the student's phases."""
    for name, stage in STAGES.items():
        if not run.done(name):
            stage(run)
    scores = {name: run.record(name)["metrics"]["dev"]["score"] for name in STAGES}
    return scores | {"seconds": sum(run.record(name)["seconds"] for name in list(STAGES)[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="demo")
    parser.add_argument("--recipes", default="default,reference,no-distillation")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", help="of prune, distill and finetune, for every recipe: 3,1,1")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    chosen = parser.parse_args()
    console.setup(as_json=True)  # keep standard output for the table
    if chosen.epochs:
        phases = zip(("prune", "distill", "finetune"), chosen.epochs.split(","), strict=True)
        chosen.sets += [f"{phase}.epochs={epochs}" for phase, epochs in phases]
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    table = {}
    for name in chosen.recipes.split(","):
        scores = []
        for seed in seeds:
            flags = {"task": chosen.task, "data": chosen.data, "model": chosen.model, "seed": seed}
            dense = Run.at(
                chosen.out / f"{chosen.task}-teacher-seed{seed}", recipe.resolve("default", flags, chosen.sets)
            )
            if not dense.done("teacher"):
                teacher(dense)
            flags |= {"given_teacher": str(dense.path / "teacher"), "sparsity": chosen.sparsity}
            path = chosen.out / f"{chosen.task}-{chosen.sparsity:g}-{Path(name).stem}-seed{seed}"
            started = time.time()
            score = finished(Run.at(path, recipe.resolve(name, flags, chosen.sets)))
            scores.append(score)
            line = "  ".join(f"{key} {value:.4f}" for key, value in score.items() if key != "seconds")
            print(
                f"{name} seed {seed}: {line}  ({score['seconds']:.0f} s; {time.time() - started:.0f} s now)", flush=True
            )
        table[name] = scores
    print("\n| recipe | teacher | after prune | after distill | student | kept |\n|---|---|---|---|---|---|")
    for name, scores in table.items():
        cells = [_spread([score[stage] for score in scores]) for stage in STAGES]
        kept = statistics.mean(score["finetune"] / score["teacher"] for score in scores)
        print(f"| {name} | {' | '.join(cells)} | {100 * kept:.1f} % |")


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
