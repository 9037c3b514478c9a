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

from spdtool import console
from spdtool.console import OnEvent
from spdtool.data.batches import training_batches
from spdtool.data.tokens import Encoded
from spdtool.distillation.device_states import ROW_NUMBERS
from spdtool.distillation.lesson import Lesson
from spdtool.models import collectives, device
from spdtool.models.arithmetic import probe_arithmetic
from spdtool.models.layers import select_trained_parameters
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Prune, Training, TrainingLength
from spdtool.run.folder import LOG, STUDENTS, Stage
from spdtool.run.records import Evaluation, FitResult
from spdtool.training import prefetch
from spdtool.training.graphs import PAD_MULTIPLE, CudaRecorder, StepGraphs, find_obstacle
from spdtool.training.learner import Learner
from spdtool.training.log import TrainingLog
from spdtool.training.microbatches import Microbatch, MicrobatchSplitter
from spdtool.training.optimizer import create_adamw, create_learning_rate
from spdtool.training.precision import CastWeights, LossScale
from spdtool.training.signals import watch_signals
from spdtool.training.snapshot import Snapshotter, Stateful
from spdtool.training.statistics_collector import StatisticsCollector, calibration_batches
from spdtool.training.step import LossWindow, Stepper, repeat_draw

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    stepper: Stepper
    splitter: MicrobatchSplitter
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
    _prepare(job)
    if start == 0:
        _prune_if_due(job, 0)
    evaluation_steps = choose_evaluation_steps(length, section.evaluations)
    log_interval = max(1, job.steps // LOG_LINES)
    window, saved_at = LossWindow(), time.monotonic()
    on_gpu = device.is_gpu(learner.accelerator.device)
    learner.model.train()  # calibration and evaluation put it back
    batches = _iterate_batches(job, length.steps_per_epoch, start)
    with (
        watch_signals() as stop,
        job.snapshotter.write_aside(),
        prefetch.prefetch_batches(batches, learner.accelerator.device) as step_batches,
    ):
        for step, size, microbatches in step_batches:
            if learner.rounding is not None:
                learner.rounding.switch(step)
            job.stepper.take(step, microbatches, window)
            done = step + 1
            _prune_if_due(job, done)
            job.log.examples += size
            is_logged = done % log_interval == 0 or done == job.steps
            if is_logged:
                _log_step(job, length, done, window)  # reads numbers back from the device
                window = LossWindow()
            is_evaluated = done in evaluation_steps
            if is_evaluated:
                with job.log.stopwatch.paused():
                    _evaluate(job, done)
            # on a GPU by the clock alone: a snapshot of BERT-base has 1.8 GB
            is_due = (is_evaluated and not on_gpu) or _is_snapshot_due(job, done, saved_at, log_interval)
            # on a GPU several ranks agree where they log: in between no step waits for the device
            is_waiting = collectives.group_size() == 1 or not on_gpu
            is_stopped = (is_logged or is_waiting) and stop.agree()
            if is_stopped or (done < job.steps and is_due):
                # its time counts in the examples a second: on a GPU it is that of a copy
                _save_snapshot(job, done, aside=on_gpu and not is_stopped)
                saved_at = time.monotonic()
                if is_stopped:
                    stop.raise_stopped(stage.name, done, job.steps)
                # a resumed run begins a window here; several ranks agree on the evaluations, not on the clock
                if collectives.group_size() == 1 or (is_evaluated and not on_gpu):
                    window = LossWindow()
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
    """Create the optimiser, the log, the snapshotter and all else that every step reads."""
    pruner, target = learner.pruner, learner.accelerator.device
    trained = select_trained_parameters(learner.model, section.train) | lesson.parameters
    graphs = _create_graphs(recipe, section, lesson, learner, stage.name)
    optimizer = create_adamw(trained.values(), section, target, capturable=graphs is not None)
    log = TrainingLog(stage.folder / LOG, on_event)
    _describe_machine(stage, learner)
    # a cached output of the teacher differs in its last bits: it was computed in another batch
    cached = [name for name in (*rows.per_row, *rows.per_token) if name != ROW_NUMBERS]
    fingerprint = f"{stage.fingerprint} {rows.digest} {cached}"
    peak = section.peak(learner.model.config.hidden_size)
    events: list[int] = []
    collector = None
    if pruner is not None and pruner.events and isinstance(section, Prune):
        events, collector = list(pruner.events), StatisticsCollector(pruner, section)
    loss_scale = LossScale(target) if stage.precision == "fp16" else None
    states: dict[str, Stateful] = {}
    if pruner is not None:
        states["pruner"] = pruner
    if loss_scale is not None:
        states["loss_scale"] = loss_scale
    return _Job(
        learner=learner,
        lesson=lesson,
        rows=rows,
        section=section,
        recipe=recipe,
        stage=stage,
        steps=length.steps,
        stepper=Stepper(
            learner=learner,
            lesson=lesson,
            section=section,
            recipe=recipe,
            steps=length.steps,
            trained=trained,
            optimizer=optimizer,
            learning_rate=create_learning_rate(section, events, length.steps, peak),
            collector=collector,
            loss_scale=loss_scale,
            cast_weights=_cast_together(recipe, learner),
            graphs=graphs,
        ),
        splitter=MicrobatchSplitter(
            accumulate=section.accumulate,
            pad_to=None if recipe.bucketing else recipe.max_length,
            pad_alike=lesson.counts_padding,
            # padding that counts in a loss changes it
            pad_multiple=1 if graphs is None or lesson.counts_padding else PAD_MULTIPLE,
            longest=recipe.max_length,
            rank=collectives.group_rank(),
            ranks=collectives.group_size(),
        ),
        log=log,
        snapshotter=Snapshotter(stage, fingerprint, trained, optimizer, lesson, states, log),
    )


def _describe_machine(stage: Stage, learner: Learner) -> None:
    """Note in the stage how this process computes."""
    accelerator = learner.accelerator
    stage.training_threads = torch.get_num_threads()
    stage.arithmetic = probe_arithmetic(accelerator.device)
    stage.precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    stage.device = accelerator.device.type
    if accelerator.device.type == "cuda":
        stage.device = torch.cuda.get_device_name(accelerator.device)


def _create_graphs(
    recipe: Recipe, section: Training, lesson: Lesson, learner: Learner, stage: str
) -> StepGraphs | None:
    """Create the CUDA graphs of the stage's steps; None where they cannot be recorded, with a line that says why."""
    obstacle, target = find_obstacle(recipe, section, lesson, learner), learner.accelerator.device
    if obstacle is None:
        return StepGraphs(target, CudaRecorder(), lambda text: console.say(f"{stage}: {text}"))
    if device.is_gpu(target) and recipe.cuda_graph == "auto":
        console.say(f"{stage}: no CUDA graphs: {obstacle}")
    return None


def _cast_together(recipe: Recipe, learner: Learner) -> CastWeights | None:
    """Create the student's `CastWeights`; None in float32, and where layers are compiled or recomputed."""
    dtype = HALF_TYPES.get(learner.accelerator.mixed_precision)
    # a recomputed layer casts again, after its weights are back
    if dtype is None or recipe.compile or recipe.gradient_checkpointing:
        return None
    return CastWeights(learner.model, dtype)


def _prepare(job: _Job) -> None:
    """Give every rank the weights of rank 0, and attach the masks to the optimiser."""
    collectives.broadcast(job.stepper.trained.values())
    for parameter in job.lesson.clipped_parameters:
        parameter.requires_grad_(True)
    if job.learner.pruner is not None:
        job.learner.pruner.masks.attach(job.stepper.optimizer)


def _iterate_batches(job: _Job, steps_per_epoch: int, start: int) -> Iterator[prefetch.StepBatch]:
    """Yield the batches from step `start` on: the position in the data is the step itself."""
    epoch = -1
    for step in range(start, job.steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            batches = training_batches(job.rows, job.section.batch_size, job.recipe.seed, epoch, pool=job.recipe.pool)
        numbers = batches[step % steps_per_epoch]
        yield step, len(numbers), job.splitter.split(job.rows, numbers)


def _prune_if_due(job: _Job, step: int) -> None:
    """Prune if an event falls after optimiser step `step`, and save the student of the event before if requested."""
    pruner, collector = job.learner.pruner, job.stepper.collector
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
        collector.calibrate(
            job.learner.model, lambda each: job.stepper.compute_calibration_terms(each, step), microbatches
        )
    sparsity = pruner.prune(step, show_work)
    event: dict[str, object] = {"step": step, "sparsity": sparsity}
    # where `prune.least` changed the zeros of a matrix, and where it had to be lowered; see `Pruner`
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
        yield repeat_draw(job.lesson, job.splitter.split(job.rows, batch))


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
        with job.learner.accelerator.autocast():
            student = job.learner.save_intermediate(folder, sparsity, step)
    job.log.write_student(student)


def _log_step(job: _Job, length: TrainingLength, done: int, window: LossWindow) -> None:
    """Log the losses since the last line."""
    pruner = job.learner.pruner
    values: dict[str, object] = {
        "epoch": done / length.steps_per_epoch,
        "epochs": length.epochs,
        "losses": window.compute_means(),
        "learning_rate": job.stepper.learning_rate((done - 1) / job.steps),  # the optimiser's may be on the device
        "sparsity": None if pruner is None else pruner.masks.sparsity(),
    }
    job.log.write_step(done, values | job.lesson.log_values((done - 1) / job.steps))


def _evaluate(job: _Job, done: int) -> None:
    """Score the model; keep its weights if they are the best up to now and may be handed over."""
    with job.learner.accelerator.autocast():
        dev, train = job.learner.score()
    pruner, rounding = job.learner.pruner, job.learner.rounding
    # A score before the last event, or before weights are rounded, is that of another student than
    # the final one.
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


def _save_snapshot(job: _Job, done: int, *, aside: bool) -> None:
    """Save a snapshot, unless a pruned weight has come alive (GateError)."""
    if job.learner.pruner is not None:
        job.learner.pruner.masks.check_dead()
    job.snapshotter.save(done, aside=aside)
