"""Scores: predict with a torch model or an ONNX session alike, and the official metric of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from spdtool.data.tokens import Batch, Encoded, evaluation_batches
from spdtool.models import collectives
from spdtool.models.padding import PaddingMask
from spdtool.tasks import Task

Forward = Callable[[Batch], np.ndarray]
"""Takes a batch of int64 arrays [rows, tokens]; gives float logits [rows, labels]."""

BATCH = 64


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(gold: np.ndarray, predicted: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(gold) == 0 or np.ptp(predicted) == 0 or not np.isfinite(predicted).all():
            return 0.0  # undefined for a constant: a model that says the same of everything knows nothing
        return float(getattr(stats, name)(gold, predicted)[0])

    return score


def _classification(name: str, **options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(gold: np.ndarray, predicted: np.ndarray) -> float:
        from sklearn import metrics  # most of a second, and accuracy does without

        return float(getattr(metrics, name)(gold, predicted, **options))

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda gold, predicted: float((gold == predicted).mean()),
    "f1": _classification("f1_score", zero_division=0.0),
    "f1_macro": _classification("f1_score", average="macro", zero_division=0.0),
    "matthews": _classification("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
"""Name to `(gold [rows], predicted [rows]) -> number`; predictions are class indices, or floats for regression."""


def predict(forward: Forward, rows: Encoded, batch_size: int = BATCH, *, together: bool = False) -> np.ndarray:
    """Logits [rows, labels] in the order of the rows, computed in batches of like length.

    Args:
        together: several processes, all of which call this, share the batches out; each row is computed as by one.
    """
    batches = list(evaluation_batches(rows, batch_size))
    shared = (
        together and len(batches) >= collectives.world_size()
    )  # with fewer, a process would not know the labels' number
    rank, count = (collectives.current_rank(), collectives.world_size()) if shared else (0, 1)
    logits: np.ndarray | None = None
    turns = -(-len(batches) // count)  # as many for each process: a sharded model needs them all
    for batch in (batches[rank::count] + batches[:1])[:turns]:
        part = forward(rows.collate(batch))
        if logits is None:
            logits = np.zeros((len(rows), part.shape[1]), dtype=np.float32)
        logits[batch] = part
    assert logits is not None, "an empty split"
    return collectives.sum_array_over_ranks(logits) if count > 1 else logits


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    """Predictions [rows]: the class of the largest logit, or the value itself for regression."""
    return logits[:, 0] if task.regression else logits.argmax(axis=1)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of the task, and `score`: their mean, the task's headline as GLUE reports it."""
    predicted = decide(task, logits)
    values = {name: METRICS[name](labels, predicted) for name in task.metrics}
    return {"score": float(np.mean(list(values.values())))} | values


def baseline(task: Task, labels: np.ndarray) -> dict[str, float]:
    """What `score` gives for always saying the commonest of these labels; of a regression, their mean."""
    if task.regression:
        return score(task, np.full((len(labels), 1), np.mean(labels)), labels)
    logits = np.zeros((len(labels), len(task.labels)))
    logits[:, np.bincount(labels).argmax()] = 1
    return score(task, logits, labels)


def score_all(task: Task, logits: Mapping[str, np.ndarray], splits: Mapping[str, Encoded]) -> dict[str, float]:
    """Metrics over `dev`; those of a further dev set carry its suffix (`accuracy_mm`) and do not enter `score`.

    Args:
        logits: by name of the dev set, [rows, labels].
    """
    result = score(task, logits["dev"], splits["dev"].labels)
    for name in [name for name in logits if name != "dev"]:
        extra = score(task, logits[name], splits[name].labels)
        result |= {f"{metric}{name[3:]}": extra[metric] for metric in task.metrics}
    return result


def evaluate(
    task: Task, forward: Forward, splits: Mapping[str, Encoded], *, together: bool = False
) -> dict[str, float]:
    """Predict every dev set, and score them all; `together` as in `predict`."""
    dev = {name: rows for name, rows in splits.items() if name == "dev" or name.startswith("dev_")}
    return score_all(task, {name: predict(forward, rows, together=together) for name, rows in dev.items()}, dev)


def evaluate_rows(task: Task, forward: Forward, rows: Encoded, *, together: bool = False) -> dict[str, float]:
    """Predict and score one split, such as a sample of the training rows; `together` as in `predict`."""
    return score(task, predict(forward, rows, together=together), rows.labels)


def to_device(batch: Batch | dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The batch as tensors on `device`; nothing waits for the copies of what is in page-locked memory."""
    moved = {name: torch.as_tensor(column).to(device, non_blocking=True) for name, column in batch.items()}
    if "attention_mask" in moved:
        unpadded = bool(batch["attention_mask"].all())
        moved["attention_mask"] = PaddingMask.of(moved["attention_mask"], unpadded=unpadded)
    return moved


def torch_forward(model: torch.nn.Module, device: torch.device | str = "cpu") -> Forward:
    """A `Forward` of a torch model; it is put into eval mode for each call and back."""

    def forward(batch: Batch) -> np.ndarray:
        inputs = to_device({name: column for name, column in batch.items() if name != "labels"}, device)
        mode = model.training
        model.eval()
        with torch.no_grad():
            logits = model(**inputs).logits
        model.train(mode)
        return logits.float().cpu().numpy()

    return forward


def onnx_forward(session: Any) -> Forward:
    """A `Forward` of an onnxruntime session whose first output is the logits."""
    wanted = [value.name for value in session.get_inputs()]

    def forward(batch: Batch) -> np.ndarray:
        return session.run(None, {name: batch[name] for name in wanted})[0]

    return forward
