"""The one training loop: the teacher's fine-tuning and the student's three phases are it, with other schedules.

Everything that it needs to go on after `kill -9` is in a snapshot (`snapshot.py`); learning rate, replacing rate
and the order of the data are functions of the step, so they need no state.

Several processes run it together (`processes.py`): each takes its rows of every batch (`pieces.py`), the gradients are
summed (`collectives.py`), and everything after that is the same on all of them. The weights are those of one process
up to rounding, however many there are.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from spdtool import console
from spdtool import ranks as processes
from spdtool.console import OnEvent
from spdtool.data.batches import training_batches
from spdtool.data.tokens import Encoded
from spdtool.errors import DeviceError
from spdtool.models import collectives, fsdp
from spdtool.models.layers import select_trained_parameters
from spdtool.models.predict import to_device
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Prune, Recipe, Training
from spdtool.run.folder import Stage
from spdtool.run.records import FitResult, IntermediateStudent
from spdtool.training import prefetch
from spdtool.training.log import Journal
from spdtool.training.microbatches import LossWeight, Microbatch, MicrobatchSplitter
from spdtool.training.saliency import Saliency, calibration_batches
from spdtool.training.schedules import Schedule, rewound, warmup_then_linear

LossTerms = dict[str, Tensor]
LOGGED = 100  # log lines of a stage: each costs one synchronisation with the device


def accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerate front for the recipe's device and precision; where several ranks were launched, it joins them.

    Raises:
        DeviceError: CUDA was demanded and does not answer, fp16 was asked for on a CPU, or accelerate told to shard.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA was demanded and no CUDA device answers", "see `spdtool doctor`, or use --device cpu")
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and recipe.precision == "fp16":
        raise DeviceError("fp16 training needs a CUDA device", "use --set precision=bf16 or fp32")
    for asked in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{asked}", "false").lower() == "true":
            raise DeviceError(
                f"accelerate was told to use {asked}, which this training loop does not go through",
                "leave it out; --set shard=true keeps a part of the weights in each process",
            )
    if recipe.shard and processes.world_size() == 1:
        console.warn("shard is ignored: there is one process, which keeps everything")
    local = processes.local_rank()
    if not on_cpu and local >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local} of this machine has no device: there are {torch.cuda.device_count()} CUDA devices",
            "start fewer processes, or use --device cpu",
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may run stages of several recipes
    processes.die_with_parent()
    collectives.join_process_group("gloo" if on_cpu else "nccl")
    return Accelerator(cpu=on_cpu, mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision))


@dataclass
class Fit:
    """What a training run is made of, beside its section of the recipe.

    Attributes:
        model: trained in place; on return it holds the weights to hand over.
        loss: `loss(batch, progress, share)` gives the terms, the total under `loss`; progress is in [0, 1). Each term
            is a mean times the rows' share of the global batch, so that those of a batch's pieces add up.
        rows: the training split.
        evaluate: gives the dev metrics of the model as it is, the headline under `score`.
        evaluate_train: gives the same of training rows, to be held against each other; None: not asked.
        pruner: prunes at its events and holds the zeros; None for a dense model.
        save_student: saves an evaluated student, given the sparsity that it has reached and the step.
        bystanders: frozen parameters whose gradients count all the same when gradients are clipped.
        random_state, restore_random: the draws' generator, saved with the rest.
        facts: what to show beside the losses (replacing rate, layers of the draw).
        extra: parameters that are trained with the model and are no part of it.
        padding_counts: whether a term is a mean over padding too, so that all pieces of a batch must be padded alike.
    """

    model: nn.Module
    loss: Callable[[dict[str, Tensor], float, LossWeight], LossTerms]
    rows: Encoded
    evaluate: Callable[[], dict[str, float]]
    evaluate_train: Callable[[], dict[str, float]] | None = None
    pruner: Pruner | None = None
    save_student: Callable[[float, int], IntermediateStudent] | None = None
    bystanders: list[nn.Parameter] = field(default_factory=list)
    random_state: Callable[[], Any] = lambda: None
    restore_random: Callable[[Any], None] = lambda _: None
    facts: Callable[[float], dict[str, Any]] = lambda _: {}
    extra: dict[str, nn.Parameter] = field(default_factory=dict)
    padding_counts: bool = False


def fit(
    parts: Fit,
    section: Training,
    recipe: Recipe,
    work: Stage,
    fingerprint: str,
    accelerator: Accelerator,
    watch: OnEvent,
) -> FitResult:
    """Train for the section's steps, resuming from the work folder's snapshot if it has one that fits.

    Writes `metrics.jsonl` (one event a line) and the snapshots into the work folder.

    Args:
        fingerprint: hash of the recipe and of what was read; a snapshot with another one, or made from other rows, is
            discarded.

    Returns:
        `steps`, `epochs`, `best` (metrics and step of the weights handed over), `evaluations`, `examples_per_second`.
    """
    length = section.length(len(parts.rows))
    per_epoch, total = length.steps_per_epoch, length.steps
    model = parts.model
    trained = select_trained_parameters(model, section.train) | parts.extra  # type: ignore[arg-type]
    optimizer = adamw(trained, section, accelerator.device)
    journal = Journal(parts, section, trained, optimizer, work, f"{fingerprint} {parts.rows.digest}", watch)
    torch.manual_seed(recipe.seed)
    start = journal.restore()
    model = accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and no DDP: see collectives.py
    prepared = accelerator.prepare_optimizer(optimizer)
    collectives.broadcast(trained.values())
    for parameter in parts.bystanders:
        parameter.requires_grad_(True)
    saliency = _saliency(parts, section)
    cut = MicrobatchSplitter(
        section.accumulate,
        None if recipe.bucketing else recipe.max_length,
        parts.padding_counts,
        collectives.group_rank(),
        collectives.group_size(),
    )

    def terms_of(piece: Microbatch, progress: float) -> LossTerms:
        with accelerator.autocast():
            return parts.loss(to_device(piece.batch, accelerator.device), progress, piece.weight)

    def prune(step: int) -> None:
        journal.save_student(step)
        if saliency is not None and saliency.needs_calibration(step):
            batches = calibration_batches(parts.rows, saliency.section, recipe, step)
            shown = (_one_draw(parts, cut.split(parts.rows, batch)) for batch in batches)
            saliency.calibrate(model, lambda piece: terms_of(piece, step / total), shown)
        journal.prune(step)

    if parts.pruner is not None:
        parts.pruner.masks.attach(optimizer)
        if start == 0:
            prune(0)
    config: Any = parts.model.config
    peak, rate = section.peak(config.hidden_size), _learning_rate(section, parts.pruner, total)
    window = _Window()

    def learn(step: int, pieces: Iterable[Microbatch]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step / total)
        shown = saliency if saliency is not None and saliency.needs_step(step) else None
        if collectives.group_size() > 1:
            torch.manual_seed(_seed(recipe.seed, step, collectives.group_rank()))
        for piece in _one_draw(parts, pieces):
            terms = terms_of(piece, step / total)
            if shown is not None:
                shown.add_logit_gradients(terms)
            if terms["loss"].requires_grad:  # not when the draw holds nothing of what is trained
                accelerator.backward(terms["loss"])
            window.add(terms)
        window.steps += 1
        collectives.sum_over_ranks(collectives.gradients_to_sum([*trained.values(), *parts.bystanders]))
        if shown is not None:
            shown.observe_step(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
        _update(parts, section, trained, prepared, accelerator)

    def late(step: int) -> bool:
        """Whether a snapshot is due by the clock: the main process's, where all have a part in it."""
        due = time.monotonic() - saved >= 60 * recipe.save_minutes
        if not journal.sharded:
            return due
        return (step % every == 0 or recipe.save_minutes == 0) and collectives.broadcast_flag(due)

    evaluations = evaluation_steps(per_epoch, total, section.evaluations)
    every = max(1, total // LOGGED)
    model.train()
    saved = time.monotonic()
    steps = _steps(parts.rows, section, recipe, start, total)
    batches = ((step, len(rows), cut.split(parts.rows, rows)) for step, rows in steps)
    with prefetch.prefetch_batches(batches, accelerator.device) as made:
        for step, size, pieces in made:
            learn(step, pieces)
            done = step + 1
            prune(done)
            journal.examples += size
            if done % every == 0 or done == total:
                facts = parts.facts(step / total)
                journal.log(done, per_epoch, window.means(), optimizer.param_groups[0]["lr"], facts)
                window = _Window()
            with journal.clock.paused():
                if done in evaluations:
                    journal.evaluate(done)
                if done < total and (done in evaluations or late(done)):
                    journal.save(done)
                    saved = time.monotonic()
                    if (
                        done in evaluations or collectives.group_size() == 1
                    ):  # else the clocks of the ranks would decide
                        window = _Window()
    for patched in ("forward", "_original_forward"):  # autocast's; unwrap_model would strip more than its own
        vars(parts.model).pop(patched, None)
    return journal.finish(total, per_epoch)


def _update(
    parts: Fit, section: Training, trained: dict[str, nn.Parameter], optimizer: Any, accelerator: Accelerator
) -> None:
    """One optimiser step with the gradients as they are: pruned weights silenced, norm clipped, gradients dropped."""
    if parts.pruner is not None and section.clip_over == "trained":
        parts.pruner.zero_gradients()
    if any(parameter.grad is not None for parameter in trained.values()):
        if section.clip > 0:
            _clip([*trained.values(), *parts.bystanders], section.clip, accelerator)
        optimizer.step()
    optimizer.zero_grad()
    for parameter in parts.bystanders:
        parameter.grad = None


def _clip(parameters: list[nn.Parameter], most: float, accelerator: Accelerator) -> None:
    """Scale all gradients down until their common norm is `most`, if it is larger."""
    sharded = [parameter for parameter in parameters if fsdp.is_sharded(parameter)]
    if not sharded:
        accelerator.clip_grad_norm_(parameters, most)
        return
    found = [parameter for parameter in parameters if parameter.grad is not None]
    squares = {True: [torch.zeros((), device=accelerator.device)], False: [torch.zeros((), device=accelerator.device)]}
    for parameter in found:
        squares[fsdp.is_sharded(parameter)].append(fsdp.local_rows(parameter.grad).square().sum())  # type: ignore[arg-type]
    total = fsdp.sum_over_shards(torch.stack(squares[True]).sum(), sharded[0]) + torch.stack(squares[False]).sum()
    scale = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in found:
        fsdp.local_rows(parameter.grad).mul_(scale)  # type: ignore[arg-type]


def adamw(trained: dict[str, nn.Parameter], section: Training, device: torch.device) -> torch.optim.AdamW:
    """AdamW with no decay on biases and normalisation; fused where the device has it."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for weight in trained.values():  # the fused step takes sharded weights, or whole ones
        groups.setdefault((weight.dim() > 1, fsdp.is_sharded(weight)), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": section.weight_decay if matrices else 0.0}
            for (matrices, _), weights in groups.items()
        ],
        lr=1.0,  # set at every step
        eps=section.epsilon,
        fused=device.type in ("cuda", "cpu"),
    )


def _saliency(parts: Fit, section: Training) -> Saliency | None:
    """What shows the criterion its gradients; None where nothing is pruned any more."""
    if parts.pruner is None or not parts.pruner.events or not isinstance(section, Prune):
        return None
    return Saliency(parts.pruner, section)


def _learning_rate(section: Training, pruner: Pruner | None, total: int) -> Schedule:
    """The learning rate over the stage as a fraction of the peak: one decay, or one after each prune event."""
    initial, final = section.initial_learning_rate, section.final_learning_rate / section.initial_learning_rate
    if not isinstance(section, Prune) or section.rewind is None or pruner is None:
        decay = warmup_then_linear(section.warmup, final)
        return lambda progress: initial * decay(progress)
    events = [step / total for step in sorted(pruner.events) if 0 < step < total]
    cycles = rewound(section.warmup, events, section.rewind, final)
    return lambda progress: initial * cycles(progress)


def evaluation_steps(per_epoch: int, total: int, per_epoch_evaluations: int) -> set[int]:
    """After which optimiser steps the dev set is scored: evenly in each epoch, and after the last step."""
    every = per_epoch / per_epoch_evaluations
    count = math.floor(total / every)
    return {max(1, round(every * index)) for index in range(1, count + 1)} | {total}


def _steps(rows: Encoded, section: Training, recipe: Recipe, start: int, total: int) -> Iterator[tuple[int, Any]]:
    """`(step, row numbers)` from `start` on: the data's position is the step itself."""
    per_epoch = math.ceil(len(rows) / section.batch_size)
    epoch = -1
    for step in range(start, total):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = training_batches(rows, section.batch_size, recipe.seed, epoch, pool=recipe.pool)
        yield step, batches[step % per_epoch]


def _one_draw(parts: Fit, pieces: Iterable[Microbatch]) -> Iterator[Microbatch]:
    """The pieces of a batch, before each of which the generator of the draws stands where it stood before the first.

    A draw belongs to an optimiser step: cutting a batch for want of memory, or among processes, is no reason to learn
    another one.
    """
    before = parts.random_state()
    for number, piece in enumerate(pieces):
        if number:
            parts.restore_random(before)
        yield piece


def _seed(*parts: int) -> int:
    """A seed for torch's generators: dropout differs between the ranks, and comes back when a step does."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class _Window:
    """Keeps sums of the loss terms on their device, so that nothing waits for it between two log lines."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: LossTerms) -> None:
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()

    def means(self) -> dict[str, float]:
        """Each term's mean over the steps, of all ranks together."""
        collectives.sum_over_ranks(self.sums.values())
        return {name: float(value) / self.steps for name, value in self.sums.items()}
