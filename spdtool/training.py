"""The one training loop: the teacher's fine-tuning and the student's three phases are it, with other schedules.

Everything that it needs to go on after `kill -9` is in a snapshot (`snapshot.py`); learning rate, replacing rate
and the order of the data are functions of the step, so they need no state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from spdtool import encoders
from spdtool.console import Watch
from spdtool.data import Encoded, training_batches
from spdtool.errors import DeviceError
from spdtool.evaluation import to_device
from spdtool.journal import Journal
from spdtool.pruning.gradual import Pruner
from spdtool.recipe import Prune, Recipe, Training
from spdtool.run import Work
from spdtool.saliency import Saliency, calibration_batches
from spdtool.schedules import Schedule, rewound, warmup_then_linear

LossTerms = dict[str, Tensor]
LOGGED = 100  # log lines of a stage: each costs one synchronisation with the device


def accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerate front for the recipe's device and precision.

    Raises:
        DeviceError: CUDA was demanded and does not answer, or fp16 was asked for on a CPU.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA was demanded and no CUDA device answers", "see `spdtool doctor`, or use --device cpu")
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and recipe.precision == "fp16":
        raise DeviceError("fp16 training needs a CUDA device", "use --set precision=bf16 or fp32")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may run stages of several recipes
    return Accelerator(cpu=on_cpu, mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision))


@dataclass
class Fit:
    """What a training run is made of, beside its section of the recipe.

    Attributes:
        model: trained in place; on return it holds the weights to hand over.
        loss: `loss(batch, progress)` gives the terms, the total under `loss`; progress is in [0, 1).
        rows: the training split.
        evaluate: gives the dev metrics of the model as it is, the headline under `score`.
        evaluate_train: gives the same of training rows, to be held against each other; None: not asked.
        pruner: prunes at its events and holds the zeros; None for a dense model.
        leave: keeps the student as it is, at a sparsity on the way; gives what stage.json shall say of it.
        bystanders: frozen parameters whose gradients count all the same when gradients are clipped.
        random_state, restore_random: the draws' generator, saved with the rest.
        facts: what to show beside the losses (replacing rate, layers of the draw).
        extra: parameters that are trained with the model and are no part of it.
    """

    model: nn.Module
    loss: Callable[[dict[str, Tensor], float], LossTerms]
    rows: Encoded
    evaluate: Callable[[], dict[str, float]]
    evaluate_train: Callable[[], dict[str, float]] | None = None
    pruner: Pruner | None = None
    leave: Callable[[float], dict[str, Any]] | None = None
    bystanders: list[nn.Parameter] = field(default_factory=list)
    random_state: Callable[[], Any] = lambda: None
    restore_random: Callable[[Any], None] = lambda _: None
    facts: Callable[[float], dict[str, Any]] = lambda _: {}
    extra: dict[str, nn.Parameter] = field(default_factory=dict)


def fit(
    parts: Fit, section: Training, recipe: Recipe, work: Work, fingerprint: str, accelerator: Accelerator, watch: Watch
) -> dict[str, Any]:
    """Train for the section's steps, resuming from the work folder's snapshot if it has one that fits.

    Writes `metrics.jsonl` (one event a line) and the snapshots into the work folder.

    Args:
        fingerprint: hash of the recipe and of what was read; a snapshot with another one, or made from other rows, is
            discarded.

    Returns:
        `steps`, `epochs`, `best` (metrics and step of the weights handed over), `evaluations`, `examples_per_second`.
    """
    per_epoch = math.ceil(len(parts.rows) / section.batch_size)
    total = section.steps_for(len(parts.rows))
    model = parts.model
    trained = encoders.trained_parameters(model, section.train) | parts.extra  # type: ignore[arg-type]
    optimizer = adamw(trained, section, accelerator.device)
    journal = Journal(parts, section, trained, optimizer, work, f"{fingerprint} {parts.rows.digest}", watch)
    torch.manual_seed(recipe.seed)
    start = journal.restore()
    model, prepared = accelerator.prepare(model, optimizer)
    for parameter in parts.bystanders:
        parameter.requires_grad_(True)
    saliency = _saliency(parts, section)

    def terms_of(piece: dict[str, Any], progress: float) -> LossTerms:
        with accelerator.autocast():
            return parts.loss(to_device(piece, accelerator.device), progress)

    def prune(step: int) -> None:
        journal.leave(step)
        if saliency is not None and saliency.calibrates(step):
            batches = calibration_batches(parts.rows, saliency.section, recipe, step)
            pieces = (piece for batch in batches for piece, _ in _pieces(parts.rows, batch, section.accumulate, recipe))
            saliency.calibrate(model, lambda piece: terms_of(piece, step / total), pieces)
        journal.prune(step)

    if parts.pruner is not None:
        parts.pruner.masks.hold(optimizer)
        if start == 0:
            prune(0)
    config: Any = parts.model.config
    peak, rate = section.peak(config.hidden_size), _learning_rate(section, parts.pruner, total)
    evaluations = evaluation_steps(per_epoch, total, section.evaluations)
    every = max(1, total // LOGGED)
    model.train()
    window, saved = _Window(), time.monotonic()
    for step, batch in _steps(parts.rows, section, recipe, start, total):
        progress, done = step / total, step + 1
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(progress)
        shown = saliency if saliency is not None and saliency.follows(step) else None
        for piece, share in _pieces(parts.rows, batch, section.accumulate, recipe):
            terms = terms_of(piece, progress)
            if shown is not None:
                shown.note(terms, share)
            if terms["loss"].requires_grad:  # not when the draw holds nothing of what is trained
                accelerator.backward(terms["loss"] * share)
            window.add(terms, share)
        if shown is not None:
            shown.observe(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
        _update(parts, section, trained, prepared, accelerator)
        prune(done)
        journal.examples += len(batch)
        if done % every == 0 or done == total:
            journal.log(done, per_epoch, window.means(), optimizer.param_groups[0]["lr"], parts.facts(progress))
            window = _Window()
        with journal.clock.paused():
            if done in evaluations:
                journal.evaluate(done)
            if done < total and (done in evaluations or time.monotonic() - saved >= 60 * recipe.save_minutes):
                journal.save(done)
                window, saved = _Window(), time.monotonic()
    for patched in ("forward", "_original_forward"):  # autocast's; unwrap_model would strip more than its own
        vars(parts.model).pop(patched, None)
    return journal.finish(total, per_epoch)


def _update(
    parts: Fit, section: Training, trained: dict[str, nn.Parameter], optimizer: Any, accelerator: Accelerator
) -> None:
    """One optimiser step with the gradients as they are: pruned weights silenced, norm clipped, gradients dropped."""
    if parts.pruner is not None and section.clip_over == "trained":
        parts.pruner.silence()
    if any(parameter.grad is not None for parameter in trained.values()):
        if section.clip > 0:
            accelerator.clip_grad_norm_([*trained.values(), *parts.bystanders], section.clip)
        optimizer.step()
    optimizer.zero_grad()
    for parameter in parts.bystanders:
        parameter.grad = None


def adamw(trained: dict[str, nn.Parameter], section: Training, device: torch.device) -> torch.optim.AdamW:
    """AdamW with no decay on biases and normalisation; fused where the device has it."""
    matrices = [weight for weight in trained.values() if weight.dim() > 1]
    vectors = [weight for weight in trained.values() if weight.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
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
    epoch, batches = -1, []
    for step in range(start, total):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = training_batches(rows, section.batch_size, recipe.seed, epoch, bucketing=recipe.bucketing)
        yield step, batches[step % per_epoch]


def _pieces(rows: Encoded, batch: Any, pieces: int, recipe: Recipe) -> Iterator[tuple[dict[str, Any], float]]:
    """The batch in `pieces` collated parts, each with its share of the batch's rows."""
    size = math.ceil(len(batch) / pieces)
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        yield rows.collate(part, None if recipe.bucketing else recipe.max_length), len(part) / len(batch)


class _Window:
    """Keeps sums of the loss terms on their device, so that nothing waits for it between two log lines."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, terms: LossTerms, share: float) -> None:
        self.weight += share
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach() * share

    def means(self) -> dict[str, float]:
        return {name: float(value) / self.weight for name, value in self.sums.items()}
