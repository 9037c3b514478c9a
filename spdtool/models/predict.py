"""Logits of a torch model or an ONNX session over many rows, on one rank or shared among several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from spdtool.data.batches import evaluation_batches
from spdtool.data.tokens import Batch, Encoded
from spdtool.models import collectives
from spdtool.models.padding import PaddingMask
from spdtool.tasks.head import SEQUENCE_CLASSIFIER, Head, head_of_model
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BATCH_SIZE = 64  # rows; a forward pass without gradients is as fast with more


class Forward(Protocol):
    """What computes the logits of a batch."""

    def __call__(self, batch: Batch, /) -> np.ndarray:
        """Return float logits of a batch of int64 arrays [rows, tokens].

        They are [rows, labels], or [rows, tokens, labels] with zeros where there is padding: see `tasks.head`.
        """


def predict(forward: Forward, rows: Encoded, batch_size: int = BATCH_SIZE, *, across_ranks: bool = False) -> np.ndarray:
    """Return the logits in the order of the rows, computed in batches of like length.

    They are [rows, labels], or [all tokens, labels] for a head with an output for each token.

    Args:
        forward: a model.
        rows: at least one.
        batch_size: rows of a batch.
        across_ranks: share the batches among the ranks; collective: call on every rank. Each row is
            computed in the batch in which one rank alone would compute it.
    """
    batches = list(evaluation_batches(rows, batch_size))
    # With fewer batches than ranks, a rank without one would not know the number of labels.
    shared = across_ranks and len(batches) >= collectives.group_size()
    rank, rank_count = (collectives.group_rank(), collectives.group_size()) if shared else (0, 1)
    turns = -(-len(batches) // rank_count)
    # As many batches for each rank, a repeated one if need be: a sharded model needs every rank in
    # each forward pass.
    my_batches = (batches[rank::rank_count] + batches[:1])[:turns]
    logits: np.ndarray | None = None
    for batch in my_batches:
        batch_logits = forward(rows.collate(batch))
        if logits is None:
            logits = rows.make_outputs(batch_logits)
        rows.store_outputs(logits, batch, batch_logits)
    assert logits is not None, "an empty split"
    return collectives.sum_array_over_ranks(logits) if rank_count > 1 else logits


def evaluate(
    task: Task, forward: Forward, splits: Mapping[str, Encoded], *, across_ranks: bool = False
) -> dict[str, float]:
    """Predict every dev set, and let the task score them; `across_ranks` as in `predict`."""
    return task.score_splits(predict_dev_sets(forward, splits, across_ranks=across_ranks), splits)


def predict_dev_sets(
    forward: Forward, splits: Mapping[str, Encoded], *, across_ranks: bool = False
) -> dict[str, np.ndarray]:
    """Return the logits of every dev set by its name; `across_ranks` as in `predict`."""
    logits = {}
    for name, rows in splits.items():
        if name == "dev" or name.startswith("dev_"):
            logits[name] = predict(forward, rows, across_ranks=across_ranks)
    return logits


def evaluate_split(task: Task, forward: Forward, rows: Encoded, *, across_ranks: bool = False) -> dict[str, float]:
    """Predict and score one split, such as a sample of the training rows; `across_ranks` as in `predict`."""
    return task.score(predict(forward, rows, across_ranks=across_ranks), rows)


def to_device(batch: Batch | dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return the batch as tensors on `device`; copies from page-locked memory are not waited for."""
    moved = {name: torch.as_tensor(column).to(device, non_blocking=True) for name, column in batch.items()}
    if "attention_mask" in moved:
        # Asked of the batch on the processor: the same question on the device would wait for all
        # that is queued there.
        unpadded = bool(batch["attention_mask"].all())
        moved["attention_mask"] = PaddingMask.of(moved["attention_mask"], unpadded=unpadded)
    return moved


def torch_forward(model: torch.nn.Module, device: torch.device | str = "cpu") -> Forward:
    """Wrap a torch model as a `Forward`; each call puts it into eval mode, and back into its mode."""
    head = head_of_model(model)

    def forward(batch: Batch) -> np.ndarray:
        inputs = to_device({name: column for name, column in batch.items() if name != "labels"}, device)
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = head.collect(model(**inputs), inputs)
        model.train(training)
        array: np.ndarray = logits.float().cpu().numpy()
        return array

    return forward


def onnx_forward(session: InferenceSession, head: Head = SEQUENCE_CLASSIFIER) -> Forward:
    """Wrap an onnxruntime session, whose outputs are those of a head, as a `Forward`."""
    input_names = [node.name for node in session.get_inputs()]

    def forward(batch: Batch) -> np.ndarray:
        return head.collect_arrays(session.run(None, {name: batch[name] for name in input_names}), batch)

    return forward
