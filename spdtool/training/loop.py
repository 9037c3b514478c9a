"""The one training loop: the teacher's fine-tuning and the student's three phases, with different lessons.

Everything that it needs to continue after `kill -9` is in a snapshot (`snapshot.py`), which is
also saved when a signal asks the process to end (`signals.py`); learning
rate, replacing rate and the order of the data are functions of the step, so they need no state.

Several ranks run it together (`ranks.py`): each takes its rows of every batch (`microbatches.py`),
the gradients are summed (`collectives.py`), and everything after that is the same on all of them.
The weights are those of one process up to rounding, however many there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from spdtool.console import OnEvent
from spdtool.data.batches import training_batches
from spdtool.data.tokens import Encoded
from spdtool.distillation.lesson import Lesson
from spdtool.distillation.losses import LossTerms
from spdtool.models import collectives
from spdtool.models.arithmetic import probe_arithmetic
from spdtool.models.layers import select_trained_parameters
from spdtool.models.predict import to_device
from spdtool.recipe.fields import Prune, Recipe, Training, TrainingLength
from spdtool.run.folder import LOG, STUDENTS, Stage
from spdtool.run.records import Evaluation, FitResult
from spdtool.training import prefetch
from spdtool.training.learner import Learner
from spdtool.training.log import TrainingLog
from spdtool.training.microbatches import Microbatch, MicrobatchSplitter
from spdtool.training.optimizer import clip_gradients, create_adamw, create_learning_rate, set_learning_rate
from spdtool.training.schedules import Schedule
from spdtool.training.signals import watch_signals
from spdtool.training.snapshot import Snapshotter
from spdtool.training.statistics_collector import StatisticsCollector, calibration_batches

LOG_LINES = 100  # of a stage: each costs one synchronisation with the device


@dataclass(frozen=True)
class _Job:
    """The values that every step of one training stage reads."""

    learner: Learner
    lesson: Lesson
    rows: Encoded
    section: Training
    recipe: Recipe
    stage: Stage
    steps: int
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: Schedule
    splitter: MicrobatchSplitter
    collector: StatisticsCollector | None
    log: TrainingLog
    snapshotter: Snapshotter


def fit(
    learner: Learner,
    lesson: Lesson,
    rows: Encoded,
    section: Training,
    length: TrainingLength,
    recipe: Recipe,
    stage: Stage,
    on_event: OnEvent,
) -> FitResult:
    """Train the learner's model in place, resuming from the stage's snapshot if it has one that fits.

    Writes `metrics.jsonl` and the snapshots into the folder of the stage. Afterwards the model has
    the weights to hand over: the best or the last, as `section.keep_best` says.

    Args:
        rows: the training split; it may have the teacher's outputs beside the rows.
        length: of the stage, for these rows.
        on_event: displays the events of the log.
    """
    job = _create_job(learner, lesson, rows, section, length, recipe, stage, on_event)
    torch.manual_seed(recipe.seed)  # before the snapshot, which has a later state of the generator
    start = job.snapshotter.restore()
    optimizer = _prepare(job)
    if start == 0:
        _prune_if_due(job, 0)
    evaluation_steps = choose_evaluation_steps(length, section.evaluations)
    log_interval = max(1, job.steps // LOG_LINES)
    window, saved_at = LossWindow(), time.monotonic()
    learner.model.train()  # calibration and evaluation put it back
    batches = _iterate_batches(job, length.steps_per_epoch, start)
    with (
        watch_signals() as stop,
        prefetch.prefetch_batches(batches, learner.accelerator.device) as step_batches,
    ):
        for step, size, microbatches in step_batches:
            if learner.rounding is not None:
                learner.rounding.switch(step)
            _train_step(job, optimizer, step, microbatches, window)
            done = step + 1
            _prune_if_due(job, done)
            job.log.examples += size
            is_logged = done % log_interval == 0 or done == job.steps
            if is_logged:
                _log_step(job, length, done, window)  # reads numbers back from the device
                window = LossWindow()
            with job.log.stopwatch.paused():
                is_evaluated = done in evaluation_steps
                if is_evaluated:
                    _evaluate(job, done)
                is_due = is_evaluated or _is_snapshot_due(job, done, saved_at, log_interval)
                # on a GPU several ranks agree where they log: in between no step waits for the device
                is_waiting = collectives.group_size() == 1 or learner.accelerator.device.type == "cpu"
                is_stopped = (is_logged or is_waiting) and stop.agree()
                if is_stopped or (done < job.steps and is_due):
                    _save_snapshot(job, done)
                    saved_at = time.monotonic()
                    if is_stopped:
                        stop.raise_stopped(stage.name, done, job.steps)
                    # a resumed run begins a window here; several ranks agree on the evaluations, not on the clock
                    if is_evaluated or collectives.group_size() == 1:
                        window = LossWindow()
    _remove_autocast(learner.model)
    if section.keep_best:
        job.snapshotter.restore_best_weights()
    return job.log.summarise(job.steps, job.steps / length.steps_per_epoch, best=section.keep_best)


def choose_evaluation_steps(length: TrainingLength, evaluations: int) -> set[int]:
    """Choose the optimiser steps after which the dev set is scored: evenly in each epoch, and after the last step.

    Args:
        evaluations: number of them in an epoch.
    """
    interval = length.steps_per_epoch / evaluations
    steps = {length.steps}
    for index in range(1, math.floor(length.steps / interval) + 1):
        steps.add(max(1, round(interval * index)))
    return steps


def _create_job(
    learner: Learner,
    lesson: Lesson,
    rows: Encoded,
    section: Training,
    length: TrainingLength,
    recipe: Recipe,
    stage: Stage,
    on_event: OnEvent,
) -> _Job:
    """Create the optimiser and all that belongs to it."""
    pruner = learner.pruner
    trained = select_trained_parameters(learner.model, section.train) | lesson.parameters
    optimizer = create_adamw(trained.values(), section, learner.accelerator.device)
    log = TrainingLog(stage.folder / LOG, on_event)
    stage.training_threads = torch.get_num_threads()
    stage.arithmetic = probe_arithmetic(learner.accelerator.device)
    # what the teacher shows is computed in other batches where it is cached: the same up to rounding
    cached = [*rows.per_row, *rows.per_token]
    fingerprint = f"{stage.fingerprint} {rows.digest} {cached}"
    peak = section.peak(learner.model.config.hidden_size)
    events: list[int] = []
    collector = None
    if pruner is not None and pruner.events and isinstance(section, Prune):
        events, collector = list(pruner.events), StatisticsCollector(pruner, section)
    return _Job(
        learner=learner,
        lesson=lesson,
        rows=rows,
        section=section,
        recipe=recipe,
        stage=stage,
        steps=length.steps,
        trained=trained,
        optimizer=optimizer,
        learning_rate=create_learning_rate(section, events, length.steps, peak),
        splitter=MicrobatchSplitter(
            accumulate=section.accumulate,
            pad_to=None if recipe.bucketing else recipe.max_length,
            pad_alike=lesson.counts_padding,
            rank=collectives.group_rank(),
            ranks=collectives.group_size(),
        ),
        collector=collector,
        log=log,
        snapshotter=Snapshotter(stage, fingerprint, trained, optimizer, lesson, pruner, log),
    )


def _prepare(job: _Job) -> AcceleratedOptimizer:
    """Make model and optimiser ready for the precision and the ranks; return what steps the optimiser."""
    accelerator = job.learner.accelerator
    accelerator.prepare_model(job.learner.model, evaluation_mode=True)  # autocast, and no DDP: see collectives.py
    # after the snapshot was restored: accelerate moves the optimiser's state to the device
    optimizer: AcceleratedOptimizer = accelerator.prepare_optimizer(job.optimizer)
    collectives.broadcast(job.trained.values())
    for parameter in job.lesson.clipped_parameters:
        parameter.requires_grad_(True)
    if job.learner.pruner is not None:
        job.learner.pruner.masks.attach(job.optimizer)
    return optimizer


def _remove_autocast(model: nn.Module) -> None:
    """Undo what `prepare_model` did to the model; accelerate's own `unwrap_model` would strip more than that."""
    for attribute in ("forward", "_original_forward"):
        vars(model).pop(attribute, None)


def _iterate_batches(job: _Job, steps_per_epoch: int, start: int) -> Iterator[prefetch.StepBatch]:
    """Yield the batches from step `start` on: the position in the data is the step itself."""
    epoch = -1
    for step in range(start, job.steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            batches = training_batches(job.rows, job.section.batch_size, job.recipe.seed, epoch, pool=job.recipe.pool)
        numbers = batches[step % steps_per_epoch]
        yield step, len(numbers), job.splitter.split(job.rows, numbers)


def _train_step(
    job: _Job, optimizer: AcceleratedOptimizer, step: int, microbatches: Iterable[Microbatch], window: LossWindow
) -> None:
    """Take one optimiser step. Nothing here reads a number back from the device."""
    accelerator = job.learner.accelerator
    set_learning_rate(job.optimizer, job.learning_rate(step / job.steps))
    collector = job.collector if job.collector is not None and job.collector.needs_step(step) else None
    if collectives.group_size() > 1:
        # alone, the state of the generator is in the snapshot instead
        torch.manual_seed(derive_seed(job.recipe.seed, step, collectives.group_rank()))
    for microbatch in _repeat_draw(job.lesson, microbatches):
        terms = _compute_terms(job, microbatch, step)
        if collector is not None:
            collector.add_logit_gradients(terms)
        if terms["loss"].requires_grad:  # not when the draw has no layer that is trained
            accelerator.backward(terms["loss"])
        window.add(terms)
    window.steps += 1
    counted = [*job.trained.values(), *job.lesson.clipped_parameters]
    collectives.sum_over_ranks(collectives.gradients_to_sum(counted))
    if collector is not None:
        collector.observe_step(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
    if job.learner.pruner is not None and job.section.clip_over == "trained":
        job.learner.pruner.zero_gradients()  # before clipping: dead weights have no part in the norm
    if any(parameter.grad is not None for parameter in job.trained.values()):
        if job.section.clip > 0:
            clip_gradients(counted, job.section.clip, accelerator)
        optimizer.step()
    optimizer.zero_grad()
    # the optimiser does not know them
    for parameter in job.lesson.clipped_parameters:
        parameter.grad = None


def _compute_terms(job: _Job, microbatch: Microbatch, step: int) -> LossTerms:
    """Compute the loss terms of a micro-batch."""
    accelerator = job.learner.accelerator
    with accelerator.autocast():
        batch = to_device(microbatch.batch, accelerator.device)
        return job.lesson.loss(batch, step / job.steps, microbatch.weight)


def _repeat_draw(lesson: Lesson, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
    """Yield the micro-batches of a batch; every one sees the same draw of grafted layers.

    A draw belongs to an optimiser step: splitting a batch, for lack of memory or among ranks, must
    not change it.
    """
    state = lesson.state_dict()
    for index, microbatch in enumerate(microbatches):
        if index:
            lesson.load_state_dict(state)
        yield microbatch


def _prune_if_due(job: _Job, step: int) -> None:
    """Prune if an event falls after optimiser step `step`, and save the student of the event before if requested."""
    pruner, collector = job.learner.pruner, job.collector
    if pruner is None or not pruner.is_due(step):
        return
    _save_student_if_requested(job, step)

    number = sum(event <= step for event in pruner.events)

    def show_work(text: str) -> None:
        work = f"event {number} of {len(pruner.events)}, {text}"
        job.log.on_event({"event": "pruning", "step": step, "work": work})  # for the display alone, not in the log

    show_work("looking at rows")
    if collector is not None and collector.needs_calibration(step):
        batches = calibration_batches(job.rows, collector.section, job.recipe, step)
        microbatches = _split_calibration(job, batches, show_work)
        collector.calibrate(job.learner.model, lambda each: _compute_terms(job, each, step), microbatches)
    sparsity = pruner.prune(step, show_work)
    event: dict[str, object] = {"step": step, "sparsity": sparsity}
    # what `prune.least` changed: zeros of a matrix before and after, and groups for which it had to give way
    if pruner.clamped:
        event["clamped"] = pruner.clamped
    if pruner.lowered:
        event["lowered"] = pruner.lowered
    job.log.write("prune", event)


def _split_calibration(
    job: _Job, batches: Iterable[np.ndarray], show_work: Callable[[str], None]
) -> Iterator[Iterator[Microbatch]]:
    """Yield the micro-batches of each calibration batch, and say which one it is."""
    for number, batch in enumerate(batches, 1):
        show_work(f"calibration batch {number} of {job.recipe.prune.calibration}")
        yield _repeat_draw(job.lesson, job.splitter.split(job.rows, batch))


def _save_student_if_requested(job: _Job, step: int) -> None:
    """Save the student as trained since the last event, if `prune.save_at` names the sparsity of that event."""
    section, pruner = job.section, job.learner.pruner
    if not isinstance(section, Prune) or pruner is None:
        return
    # the student is saved as late as possible: trained up to the event that changes its zeros
    earlier = [event for event in pruner.events if event < step]
    if not earlier:
        return
    sparsity = pruner.events[max(earlier)]
    if sparsity not in section.save_at or sparsity in [student.sparsity for student in job.log.students]:
        return
    with job.log.stopwatch.paused():
        folder = job.stage.folder / STUDENTS / f"{sparsity:g}"
        student = job.learner.save_intermediate(folder, sparsity, step)
    job.log.write_student(student)


def _log_step(job: _Job, length: TrainingLength, done: int, window: LossWindow) -> None:
    """Log the losses since the last line."""
    pruner = job.learner.pruner
    values: dict[str, object] = {
        "epoch": done / length.steps_per_epoch,
        "epochs": length.epochs,
        "losses": window.compute_means(),
        "learning_rate": job.optimizer.param_groups[0]["lr"],
        "sparsity": None if pruner is None else pruner.masks.sparsity(),
    }
    job.log.write_step(done, values | job.lesson.log_values((done - 1) / job.steps))


def _evaluate(job: _Job, done: int) -> None:
    """Score the model; keep its weights if they are the best up to now and may be handed over."""
    dev, train = job.learner.score()
    pruner, rounding = job.learner.pruner, job.learner.rounding
    # A score before the last event, or before weights are rounded, is that of another student than the final one.
    may_be_best = (pruner is None or pruner.is_done(done)) and (rounding is None or rounding.was_on(done))
    is_best = job.log.write_evaluation(Evaluation(step=done, metrics=dev, train=train), may_be_best=may_be_best)
    if is_best and job.section.keep_best:
        job.snapshotter.keep_weights()


def _is_snapshot_due(job: _Job, done: int, saved_at: float, interval: int) -> bool:
    """Whether the clock asks for a snapshot. Sharded weights: rank 0's clock, since all ranks take part in saving."""
    is_due = time.monotonic() - saved_at >= 60 * job.recipe.save_minutes
    if not job.snapshotter.is_sharded:
        return is_due
    # asking rank 0 costs a synchronisation
    return (done % interval == 0 or job.recipe.save_minutes == 0) and collectives.broadcast_flag(is_due)


def _save_snapshot(job: _Job, done: int) -> None:
    """Save a snapshot, unless a pruned weight has come alive (GateError)."""
    if job.learner.pruner is not None:
        job.learner.pruner.masks.check_dead()
    job.snapshotter.save(done)


def derive_seed(*numbers: int) -> int:
    """Derive a seed for torch's generators: dropout differs between ranks and steps, and repeats when a step does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class LossWindow:
    """Sums of the loss terms on their device, so that nothing waits for the device between two log lines."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: LossTerms) -> None:
        """Add the terms of a micro-batch."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()

    def compute_means(self) -> dict[str, float]:
        """Compute each term's mean over the steps, of all ranks together. Collective: call on every rank."""
        collectives.sum_over_ranks(self.sums.values())
        return {name: float(value) / self.steps for name, value in self.sums.items()}
