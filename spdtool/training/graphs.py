"""Whole optimiser steps as CUDA graphs: the processor launches one graph in place of a thousand operations.

A graph repeats the same operations on the same memory. So there is one for each shape of a batch,
batches are copied into buffers that stay, the optimiser counts its steps on the device
(`capturable`), and its learning rate is a tensor. What is not the same in every step cannot be in a
graph: `find_obstacle` names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spdtool import ranks
from spdtool.data.tokens import Batch
from spdtool.distillation.lesson import Lesson
from spdtool.distillation.losses import LossTerms
from spdtool.models import device
from spdtool.models.padding import PaddingMask
from spdtool.models.predict import to_device
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Prune, Training
from spdtool.training.learner import Learner

PAD_MULTIPLE = 8  # tokens: fewer lengths, so fewer graphs; tensor cores want it too
# Steps of a shape that are launched as usual before it is recorded: libraries choose kernels, AdamW makes its moments.
WARM_UP_STEPS = 1
MOST_GRAPHS = 64  # lengths of up to 512 tokens; each takes its time to record, and the drivers' memory

Step = Callable[[dict[str, Tensor]], LossTerms]
Columns = Batch | dict[str, Tensor]


class Recording(Protocol):
    """A recorded step."""

    def replay(self) -> LossTerms:
        """Run it on what its buffers hold; the terms are valid until the next call."""


class Recorder(Protocol):
    """Records steps; that of the tests repeats them on the CPU."""

    def warm_up(self, step: Callable[[], LossTerms]) -> LossTerms:
        """Run a step as it runs before its like is recorded."""

    def record(self, step: Callable[[], LossTerms]) -> Recording:
        """Record a step and run nothing; raises RuntimeError if it has an operation that cannot be recorded."""


@dataclass
class _Recorded:
    """A step for batches of one shape, and the buffers that it reads."""

    buffers: dict[str, Tensor]
    recording: Recording


@dataclass
class StepGraphs:
    """Runs steps: each as a graph, once its shape has come before.

    Attributes:
        target: device of the buffers.
        recorder: records steps.
        say: tells the user why steps are launched one by one from now on.
    """

    target: torch.device
    recorder: Recorder
    say: Callable[[str], None]
    _launches: Counter[Hashable] = field(default_factory=Counter)
    _recorded: dict[Hashable, _Recorded] = field(default_factory=dict)
    _is_off: bool = False

    def run(self, columns: Columns, step: Step, *, variant: Hashable = None) -> LossTerms:
        """Run one step on a batch of the processor's memory.

        Args:
            columns: a batch as `Encoded.collate` or `prefetch.pin_batch` returns it.
            step: takes tensors on the device.
            variant: recorded apart; it stands for whatever else decides which operations the step has.
        """
        key = describe_batch(columns), variant
        if key in self._recorded:
            recorded = self._recorded[key]
            for name, column in columns.items():
                recorded.buffers[name].copy_(torch.as_tensor(column), non_blocking=True)
            return recorded.recording.replay()
        self._launches[key] += 1
        is_new = self._launches[key] <= WARM_UP_STEPS
        if self._is_off or len(self._recorded) == MOST_GRAPHS:
            return step(to_device(columns, self.target))
        if is_new:
            batch = to_device(columns, self.target)
            return self.recorder.warm_up(lambda: step(batch))
        buffers = {}
        for name, column in to_device(columns, self.target).items():
            buffers[name] = copy_column(column)
        try:
            # a copy of the dict: a lesson takes columns out of it
            recording = self.recorder.record(lambda: step(dict(buffers)))
        except RuntimeError as error:  # torch names the operation that may not be recorded
            self._is_off = True
            # the graphs before draw from a generator that this failure has replaced
            self._recorded.clear()
            self.say(f"no CUDA graphs: {str(error).splitlines()[0]}")
            return step(to_device(columns, self.target))
        self._recorded[key] = _Recorded(buffers, recording)
        return recording.replay()  # recording has run nothing


def find_obstacle(recipe: Recipe, section: Training, lesson: Lesson, learner: Learner) -> str | None:
    """Say what keeps the steps of a stage out of graphs; None: nothing."""
    pruner = learner.pruner
    obstacles = {
        "the device is a CPU": not device.is_gpu(learner.accelerator.device),
        "cuda_graph=off": recipe.cuda_graph == "off",
        "several processes exchange gradients": ranks.world_size() > 1,
        "compile=true has graphs of its own": recipe.compile,
        "gradient_checkpointing=true reads the random state": recipe.gradient_checkpointing,
        "precision=fp16 is of older GPUs": recipe.precision == "fp16",
        "grafting draws other layers in each step": lesson.has_grafting,
        f"accumulate={section.accumulate}": section.accumulate > 1,
        "clip_over=all": section.clip_over == "all",
    }
    if isinstance(section, Distilled):
        learns_labels = min(section.loss.hardness, section.loss.regression_hardness) < 1
        obstacles["rows without a label are picked out of each batch"] = recipe.unlabeled is not None and learns_labels
    if pruner is not None and isinstance(section, Prune):
        learns_from_steps = pruner.reads_gradients and (pruner.learns or section.calibration == 0)
        obstacles["the criterion reads the gradients of the steps"] = bool(pruner.events) and learns_from_steps
    if pruner is not None:  # their moments are cleared after each step, by masks that change at events
        obstacles["the criterion keeps the gradients of pruned weights"] = pruner.has_dense_gradients
    if isinstance(section, Distilled):
        obstacles["the attention loss"] = section.loss.attention > 0
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def describe_batch(columns: Columns) -> Hashable:
    """Describe what a recorded step depends on: shapes, types, and whether there is padding at all."""
    shapes = tuple((name, tuple(column.shape), str(column.dtype)) for name, column in columns.items())
    mask = columns.get("attention_mask")
    # asked on the processor, where nothing is waited for; without padding a model computes without a mask
    return shapes, mask is None or bool(mask.all())


def copy_column(column: Tensor) -> Tensor:
    """Copy a column into memory of its own; a mask stays one that knows whether there is padding."""
    if isinstance(column, PaddingMask):
        return PaddingMask.of(column.as_subclass(Tensor).clone(), unpadded=column.unpadded)
    return column.clone()


class CudaRecorder:
    """Records steps as CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def warm_up(self, step: Callable[[], LossTerms]) -> LossTerms:
        """Run a step on a side stream, as it will be recorded: libraries make their workspaces for each stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            terms = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return terms

    def record(self, step: Callable[[], LossTerms]) -> Recording:
        """Record a step; raises RuntimeError if it has an operation that cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread of prefetch.py takes page-locked memory meanwhile, which is no part
        # of the graph
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with device.recorded_in(graph, **options):
            terms = step()
        return _CudaRecording(graph, terms)


@dataclass
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    terms: LossTerms

    def replay(self) -> LossTerms:
        self.graph.replay()
        return self.terms
