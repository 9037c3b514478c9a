"""CUDA graphs of steps: what keeps a stage out of them, and which batches are alike. See also test_step.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from spdtool.data.tokens import Encoded
from spdtool.distillation.lesson import Lesson
from spdtool.models.layers import find_prunable_weights
from spdtool.models.padding import PaddingMask
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Loss, Prune
from spdtool.training.graphs import copy_column, describe_batch, find_obstacle
from spdtool.training.microbatches import MicrobatchSplitter

GPU = torch.device("cuda")


def learner_on(device: torch.device, pruner: Pruner | None = None) -> Any:
    return SimpleNamespace(pruner=pruner, accelerator=SimpleNamespace(device=device))


class Grafted(Lesson):
    @property
    def has_grafting(self) -> bool:
        return True


def test_what_keeps_steps_out_of_graphs_is_named(toys: Any) -> None:
    lesson, gpu = Lesson(), learner_on(GPU)
    assert find_obstacle(Recipe(), Prune(), lesson, gpu) is None
    assert find_obstacle(Recipe(unlabeled="texts.txt"), Distilled(loss=Loss()), lesson, gpu) is None
    rows: list[tuple[str, tuple[Any, ...]]] = [
        ("the device is a CPU", (Recipe(), Prune(), lesson, learner_on(torch.device("cpu")))),
        ("cuda_graph=off", (Recipe(cuda_graph="off"), Prune(), lesson, learner_on(GPU))),
        ("compile=true", (Recipe(compile=True), Prune(), lesson, learner_on(GPU))),
        ("gradient_checkpointing=true", (Recipe(gradient_checkpointing=True), Prune(), lesson, learner_on(GPU))),
        ("precision=fp16", (Recipe(precision="fp16"), Prune(), lesson, learner_on(GPU))),
        ("grafting", (Recipe(), Prune(), Grafted(), learner_on(GPU))),
        ("accumulate=2", (Recipe(), Prune(accumulate=2), lesson, learner_on(GPU))),
        ("clip_over=all", (Recipe(), Prune(clip_over="all"), lesson, learner_on(GPU))),
        ("rows without a label", (Recipe(unlabeled="texts.txt"), Distilled(loss=Loss(hardness=0.5)), lesson, gpu)),
        ("the attention loss", (Recipe(), Distilled(loss=Loss(attention=1.0)), lesson, learner_on(GPU))),
    ]
    for expected, arguments in rows:
        assert (find_obstacle(*arguments) or "").startswith(expected), expected


def test_a_criterion_that_reads_every_step_keeps_it_out(toys: Any) -> None:
    def obstacle(**how: Any) -> str | None:
        section = Prune(**how)
        pruner = Pruner(Masks(find_prunable_weights(toys.bert(1))), [(1, 0.5)], section, 0.5)
        return find_obstacle(Recipe(), section, Lesson(), learner_on(GPU, pruner))

    assert obstacle(criterion="magnitude") is None
    assert obstacle(criterion="layerwise", calibration=4) is None
    assert obstacle(criterion="taylor", calibration=4) is None
    for how in ({"criterion": "taylor"}, {"criterion": "movement", "calibration": 4}):
        assert "gradients" in (obstacle(**how) or ""), how


def test_batches_are_alike_in_shape_and_in_whether_they_have_padding(toys: Any) -> None:
    full, padded = toys.batch(), toys.batch()
    full["attention_mask"] = torch.ones_like(full["attention_mask"])
    assert describe_batch(full) != describe_batch(padded)
    assert describe_batch(padded) == describe_batch(toys.batch(seed=1))
    assert describe_batch(padded) != describe_batch(toys.batch(length=9))


def test_a_buffer_of_a_mask_knows_whether_there_is_padding() -> None:
    mask = PaddingMask.of(torch.ones(2, 3, dtype=torch.long), unpadded=False)
    buffer = copy_column(mask)
    assert buffer.data_ptr() != mask.data_ptr()
    buffer.copy_(torch.zeros(2, 3, dtype=torch.long))
    assert isinstance(buffer, PaddingMask)
    assert not buffer.all()
    assert int(buffer.sum()) == 0


def test_batches_are_padded_to_fewer_lengths_within_what_the_model_reads() -> None:
    lengths = np.array([3, 9, 20])
    rows = Encoded(
        columns={"input_ids": np.arange(32)},
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.zeros(3, np.int64),
        pad_values={"input_ids": 0},
        pad_left=False,
    )
    for numbers, longest, expected in (([0], 64, 8), ([0, 1], 64, 16), ([2], 22, 22), ([2], 8, 20)):
        splitter = MicrobatchSplitter(pad_multiple=8, longest=longest)
        (microbatch,) = splitter.split(rows, np.array(numbers))
        assert microbatch.batch["input_ids"].shape[1] == expected, numbers
