"""What a training stage will cost: a trial of the model's matrix products on this machine, times the work to do.

The trial takes well under a second: it multiplies matrices of the model's own shapes, and lets a
second-order criterion solve two rows of each. All else of a step (attention, normalisation, the
loss) is a share of the products.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdtool import plugins
from spdtool.distillation.teacher_cache import needs_hidden_states
from spdtool.models.layers import find_prunable_weights
from spdtool.pruning.statistics import Stats
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Prune, Training
from spdtool.run.forecast import StageCost
from spdtool.training.loop import choose_evaluation_steps
from spdtool.training.schedules import plan_prune_events

Shape = tuple[int, int]

TRIAL_TOKENS = 512
TRIAL_SECONDS = 0.03  # of each shape
TRIAL_ROWS = 2  # of a matrix that a second-order criterion solves: the others take as long
# Measured against whole runs (docs/log.md).
OVERHEAD = 1.2  # time of a step over the time of its matrix products
STEP_SECONDS = 0.025  # of every step, however small its products
BACKWARD = 2.0  # products of the backward pass for one of the forward pass
LEAST, MOST = 0.5, 2.0  # bounds of the true time over the estimate


@dataclass(frozen=True)
class Workload:
    """What the stages of a run go over.

    Attributes:
        rows: number of training rows in an epoch.
        dev_rows: number of rows in all dev sets.
        tokens: mean number of tokens of a row, padding included.
    """

    rows: int
    dev_rows: int
    tokens: float


class CostModel:
    """Seconds of the stages of a recipe, from one trial on a device.

    Args:
        student, teacher: without weights; their shapes count.
        final: sparsity of the shape of a structured student; None: that of the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        workload: Workload,
        device: torch.device,
        final: float | None = None,
    ) -> None:
        self.recipe, self.workload, self.device, self.final = recipe, workload, device, final
        self._student_shapes, self._teacher_shapes = count_shapes(student), count_shapes(teacher)
        shapes = {*self._student_shapes, *self._teacher_shapes}
        self._products = {shape: time_product(shape, device) for shape in shapes}
        self._flops_per_second = sum(map(_count_flops, shapes)) / sum(self._products.values())
        self.student_forward = self._forward(self._student_shapes)
        self.teacher_forward = self._forward(self._teacher_shapes)

    def estimate_stage(self, stage: str, section: Training) -> StageCost:
        """Return the cost of a training stage."""
        length = section.length(self.workload.rows)
        forward = self.teacher_forward if stage == "teacher" else self.student_forward
        tokens = section.batch_size * self.workload.tokens
        step_seconds = STEP_SECONDS + tokens * forward * (1 + BACKWARD) * OVERHEAD
        evaluated_rows = self.workload.dev_rows + section.scored_train_rows
        evaluations = len(choose_evaluation_steps(length, section.evaluations)) + 1
        other_seconds = evaluations * self._pass_seconds(evaluated_rows, forward)
        if isinstance(section, Distilled):
            if not self._caches_teacher(section):
                step_seconds += tokens * self.teacher_forward * OVERHEAD
            elif stage == "prune":  # the phases after it read the same cache
                other_seconds += self._pass_seconds(self.workload.rows, self.teacher_forward)
        events: list[tuple[int, float]] = []
        if isinstance(section, Prune):
            for step, sparsity in plan_prune_events(self.recipe, length.steps, final=self.final):
                events.append((step, self._estimate_event(section, sparsity)))
        return StageCost(length.steps, step_seconds, tuple(events), other_seconds)

    def dev_pass_seconds(self, role: str) -> float:
        """Return the seconds in which a role's checkpoint answers all dev rows."""
        forward = self.teacher_forward if role == "teacher" else self.student_forward
        return self._pass_seconds(self.workload.dev_rows, forward)

    def _forward(self, shapes: Counter[Shape]) -> float:
        """Return the seconds of one token through all matrices."""
        return sum(count * self._products[shape] for shape, count in shapes.items())

    def _pass_seconds(self, rows: int, forward: float) -> float:
        return rows * self.workload.tokens * forward * OVERHEAD

    def _caches_teacher(self, section: Distilled) -> bool:
        """Whether the teacher's outputs probably come from the cache; see `distillation.teacher_cache`."""
        if section.loss.attention > 0 or section.grafting.enabled:
            return False
        on_cpu = self.device.type == "cpu" and self.recipe.teacher_states_gb > 0
        return on_cpu or not needs_hidden_states(section.loss)

    def _estimate_event(self, section: Prune, sparsity: float) -> float:
        """Return the seconds of a prune event: calibration batches, then what its criterion solves."""
        entry = plugins.criteria.entry(section.criterion)
        needs = entry.meta.get("needs", ())
        tokens = section.calibration * section.batch_size * self.workload.tokens
        seconds = tokens * self.student_forward * OVERHEAD
        if "input_gram" in needs:
            for (_, inputs), count in self._student_shapes.items():
                # A token's outer product, and the inverse of their sum.
                seconds += count * (2 * tokens * inputs**2 + 2 * inputs**3) / self._flops_per_second
        elif needs:
            seconds += tokens * self.student_forward * BACKWARD * OVERHEAD
        update = entry.meta.get("update")
        # heads and neurons are solved for in the time of an inverse, which is counted
        if update is not None and section.update and not section.is_structured:
            for shape, count in self._student_shapes.items():
                seconds += count * time_update(update, needs, shape, sparsity, section, self.device)
        return seconds


def count_shapes(model: PreTrainedModel) -> Counter[Shape]:
    """Count the prunable matrices of each shape, (outputs, inputs)."""
    shapes: Counter[Shape] = Counter()
    for weight in find_prunable_weights(model).values():
        outputs, inputs = weight.shape
        shapes[outputs, inputs] += 1
    return shapes


def time_product(shape: Shape, device: torch.device) -> float:
    """Return the seconds of one token times a matrix of this shape, the fastest of a few tries."""
    inputs = torch.ones(TRIAL_TOKENS, shape[1], device=device)
    weight = torch.ones(shape, device=device)
    return _time(lambda: inputs @ weight.T, device) / TRIAL_TOKENS


def time_update(
    update: Callable[[Tensor, Tensor, Stats], Tensor],
    needs: Sequence[str],
    shape: Shape,
    sparsity: float,
    section: Prune,
    device: torch.device,
) -> float:
    """Return the seconds in which a second-order criterion solves a matrix, from `TRIAL_ROWS` of its rows.

    Args:
        update: the criterion's function, see `pruning.criteria`.
        needs: names of the statistics that the criterion reads.
    """
    outputs, inputs = shape
    rows = min(TRIAL_ROWS, outputs)
    weight = torch.ones(rows, inputs, device=device)
    alive = torch.arange(inputs, device=device).expand(rows, inputs) >= round(sparsity * inputs)
    stats = Stats()
    if "input_gram" in needs:
        stats = Stats(input_gram=torch.eye(inputs, device=device))
    elif "fisher_blocks" in needs:
        blocks = -(-rows * inputs // section.fisher_block)
        stats = Stats(fisher_blocks=torch.eye(section.fisher_block, device=device).expand(blocks, -1, -1).contiguous())
    try:
        return _time(lambda: update(weight, alive, stats), device, least_tries=1) * outputs / rows
    except Exception:  # a plugin's criterion may need more than this; it is then not counted
        return 0.0


def _time(work: Callable[[], Tensor], device: torch.device, least_tries: int = 3) -> float:
    """Return the fastest of several tries in seconds."""
    tries: list[float] = []
    with torch.no_grad():
        while len(tries) < least_tries or sum(tries) < TRIAL_SECONDS:
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            tries.append(time.perf_counter() - started)
    return min(tries)


def _count_flops(shape: Shape) -> float:
    """Count the floating-point operations of one token times a matrix of this shape."""
    return 2.0 * shape[0] * shape[1]
