"""Check the task `demo`: learnable in seconds, not solvable by word counts, hurt by one-shot pruning.

    python benchmarks/demo_task.py [--seeds 5]

Prints for every seed the dev accuracy and training time of the teacher, its dev accuracy with 50-90 % of the encoder's
matrices pruned by magnitude without training, and the accuracy of classifiers of word counts. Needs scikit-learn;
reads no files and writes only temporary ones.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import hstack
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from spdtool.data.dataset import Rows, find_dataset
from spdtool.models import predict as evaluation
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import label_names, load_model, load_tokenizer
from spdtool.recipe import reading as recipe
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run
from spdtool.stages.teacher import teacher
from spdtool.tasks.prepare import prepare_data

SETTINGS = (
    "teacher.epochs=12",
    "teacher.learning_rate=7e-4",
    "teacher.batch_size=32",
    "teacher.warmup=0.06",
    "teacher.weight_decay=0.01",
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def word_counts(seed: int) -> dict[str, float]:
    """Return the dev accuracy of classifiers of the word counts of premise and hypothesis."""
    splits = find_dataset(Recipe()).load(None, seed)
    first, second = splits["train"].first, splits["train"].second
    assert second is not None  # the demo's rows are pairs
    counters = [CountVectorizer().fit([*first, *second]) for _ in range(2)]

    def features(rows: Rows) -> np.ndarray:
        columns = zip(counters, (rows.first, rows.second), strict=True)
        counts: np.ndarray = hstack([counter.transform(column) for counter, column in columns]).toarray()
        return counts.astype(float)

    models = {
        "logistic regression": LogisticRegression(max_iter=1000),
        "perceptron": MLPClassifier((128,), max_iter=20, random_state=seed),
        "boosted trees": HistGradientBoostingClassifier(max_iter=50, random_state=seed),
    }
    x, y, dev_x, dev_y = (f(splits[s]) for s in ("train", "dev") for f in (features, lambda rows: rows.labels))
    return {name: float(model.fit(x, y).score(dev_x, dev_y)) for name, model in models.items()}


def train_and_prune(seed: int, sets: list[str]) -> tuple[float, float, int, dict[float, float]]:
    """Train a teacher; return its dev accuracy, seconds, steps, and accuracy after one-shot pruning by sparsity."""
    settings = recipe.build_recipe(flags={"task": "demo", "seed": seed, "device": "cpu"}, sets=[*SETTINGS, *sets])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", settings)
        start = time.perf_counter()
        result = teacher(run)
        seconds = time.perf_counter() - start
        model, tokenizer = load_model(run.use_input("teacher")), load_tokenizer(run.use_input("teacher"))
    task, encoded = prepare_data(settings, tokenizer, label_names(model))

    def accuracy(sparsity: float) -> float:
        pruned = copy.deepcopy(model).eval()  # type: ignore[no-untyped-call]
        for weight in find_prunable_weights(pruned).values():
            cut = weight.detach().abs().flatten().kthvalue(round(sparsity * weight.numel())).values
            weight.data.mul_(weight.abs() > cut)
        return evaluation.evaluate(task, evaluation.torch_forward(pruned, "cpu"), encoded)["accuracy"]

    assert result.fit is not None
    return result.dev["accuracy"], seconds, result.fit.steps, {s: accuracy(s) for s in SPARSITIES}


def main() -> None:
    """Measure, and print one line a seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a recipe setting, as in spdtool --set")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for seed in options.seeds:
        counts = ", ".join(f"{name} {100 * score:.1f} %" for name, score in word_counts(seed).items())
        print(f"seed {seed}: word counts: {counts}", flush=True)
    scores = []
    for seed in options.seeds:
        score, seconds, steps, pruned = train_and_prune(seed, options.set)
        scores.append(score)
        cuts = ", ".join(f"{100 * value:.1f} % at {sparsity:.0%}" for sparsity, value in pruned.items())
        print(
            f"seed {seed}: teacher {100 * score:.1f} %, {seconds:.0f} s, {1000 * seconds / steps:.1f} ms a step; "
            f"pruned in one shot: {cuts}",
            flush=True,
        )
    print(f"teacher: mean {100 * np.mean(scores):.1f} %, least {100 * min(scores):.1f} %")


if __name__ == "__main__":
    main()
