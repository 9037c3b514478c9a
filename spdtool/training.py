"""The one training loop: the teacher's fine-tuning and the student's three phases are it, with other schedules.

Everything that it needs to go on after `kill -9` is in a snapshot (`snapshot.py`); learning rate, replacing rate
and the order of the data are functions of the step, so they need no state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from spdtool import encoders, snapshot
from spdtool.console import Watch
from spdtool.data import Encoded, training_batches
from spdtool.errors import DeviceError
from spdtool.evaluation import to_device
from spdtool.pruning.gradual import Pruner
from spdtool.recipe import Recipe, Training
from spdtool.run import Work
from spdtool.schedules import warmup_then_linear

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
        pruner: prunes at its events and holds the zeros; None for a dense model.
        bystanders: frozen parameters whose gradients count all the same when gradients are clipped.
        random_state, restore_random: the draws' generator, saved with the rest.
        facts: what to show beside the losses (replacing rate, layers of the draw).
    """

    model: nn.Module
    loss: Callable[[dict[str, Tensor], float], LossTerms]
    rows: Encoded
    evaluate: Callable[[], dict[str, float]]
    pruner: Pruner | None = None
    bystanders: list[nn.Parameter] = field(default_factory=list)
    random_state: Callable[[], Any] = lambda: None
    restore_random: Callable[[Any], None] = lambda _: None
    facts: Callable[[float], dict[str, Any]] = lambda _: {}


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
    trained = encoders.trained_parameters(model, section.train)  # type: ignore[arg-type]
    optimizer = adamw(trained, section, accelerator.device)
    loop = _Loop(parts, section, trained, optimizer, work, f"{fingerprint} {parts.rows.digest}", watch)
    torch.manual_seed(recipe.seed)
    start = loop.restore()
    model, prepared = accelerator.prepare(model, optimizer)
    for parameter in parts.bystanders:
        parameter.requires_grad_(True)
    if parts.pruner is not None:
        parts.pruner.masks.hold(optimizer)
        if start == 0:
            loop.prune(0)
    rate = warmup_then_linear(section.warmup, section.final_learning_rate)
    evaluations = evaluation_steps(per_epoch, total, section.evaluations)
    every = max(1, total // LOGGED)
    model.train()
    window, saved = _Window(), time.monotonic()
    for step, batch in _steps(parts.rows, section, recipe, start, total):
        progress, done = step / total, step + 1
        for group in optimizer.param_groups:
            group["lr"] = section.learning_rate * rate(progress)
        for piece, share in _pieces(parts.rows, batch, section.accumulate, recipe):
            with accelerator.autocast():
                terms = parts.loss(to_device(piece, accelerator.device), progress)
            if terms["loss"].requires_grad:  # not when the draw holds nothing of what is trained
                accelerator.backward(terms["loss"] * share)
            window.add(terms, share)
        _update(parts, section, trained, prepared, accelerator)
        loop.prune(done)
        loop.examples += len(batch)
        if done % every == 0 or done == total:
            loop.log(done, per_epoch, window.means(), optimizer.param_groups[0]["lr"], parts.facts(progress))
            window = _Window()
        with loop.clock.paused():
            if done in evaluations:
                loop.evaluate(done)
            if done < total and (done in evaluations or time.monotonic() - saved >= 60 * recipe.save_minutes):
                loop.save(done)
                window, saved = _Window(), time.monotonic()
    for patched in ("forward", "_original_forward"):  # autocast's; unwrap_model would strip more than its own
        vars(parts.model).pop(patched, None)
    return loop.finish(total, per_epoch)


def _update(
    parts: Fit, section: Training, trained: dict[str, nn.Parameter], optimizer: Any, accelerator: Accelerator
) -> None:
    """One optimiser step with the gradients as they are: pruned weights silenced, norm clipped, gradients dropped."""
    if parts.pruner is not None:
        parts.pruner.observe(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
        if section.clip_over == "trained":
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
        lr=section.learning_rate,
        eps=section.epsilon,
        fused=device.type in ("cuda", "cpu"),
    )


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


class _Clock:
    """Keeps the seconds spent in training proper: without evaluations and snapshots, over all resumptions."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused = time.monotonic()
        yield
        self.started += time.monotonic() - paused


class _Loop:
    """Keeps what the loop has learnt so far (best weights, evaluations, time); writes and reads it as a snapshot."""

    def __init__(
        self,
        parts: Fit,
        section: Training,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        work: Work,
        fingerprint: str,
        watch: Watch,
    ) -> None:
        self.parts, self.section, self.trained, self.optimizer = parts, section, trained, optimizer
        self.work, self.fingerprint, self.watch = work, fingerprint, watch
        self.epochs = section.epochs_for(len(parts.rows))[0]
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.examples, self.clock = 0, _Clock()
        self._log = work.folder / "metrics.jsonl"

    def prune(self, step: int) -> None:
        """Let the pruner prune if an event is due, and say so."""
        sparsity = self.parts.pruner.step(step) if self.parts.pruner is not None else None
        if sparsity is not None:
            self._tell({"event": "prune", "step": step, "sparsity": sparsity})

    def log(self, step: int, per_epoch: int, losses: dict[str, float], rate: float, facts: dict[str, Any]) -> None:
        pruner = self.parts.pruner
        self._tell(
            {
                "event": "step",
                "step": step,
                "epoch": step / per_epoch,
                "epochs": self.epochs,
                "losses": losses,
                "learning_rate": rate,
                "examples_per_second": self.examples / self.clock.seconds,
                "sparsity": None if pruner is None else pruner.masks.sparsity(),
            }
            | facts
        )

    def evaluate(self, step: int) -> None:
        """Score the dev set; keep the weights if they are the best so far and may be handed over."""
        metrics = self.parts.evaluate()
        allowed = self.parts.pruner is None or self.parts.pruner.reached(step)
        best = allowed and (self.best is None or metrics["score"] > self.best["metrics"]["score"])
        if best:
            self.best = {"step": step, "metrics": metrics}
            if self.section.keep_best:
                self.best_weights = {name: weight.detach().cpu().clone() for name, weight in self.trained.items()}
        self.evaluations.append({"step": step, "metrics": metrics})
        self._tell({"event": "eval", "step": step, "metrics": metrics, "best": best})

    def finish(self, steps: int, per_epoch: int) -> dict[str, Any]:
        """Put the weights to hand over into the model, and sum up."""
        handed = {"step": steps, "metrics": self.evaluations[-1]["metrics"]} if self.evaluations else None
        if self.section.keep_best and self.best is not None:
            handed = self.best
            with torch.no_grad():
                for name, weight in self.best_weights.items():
                    self.trained[name].copy_(weight)
        return {
            "steps": steps,
            "epochs": steps / per_epoch,
            "best": handed,
            "evaluations": self.evaluations,
            "examples_per_second": self.examples / self.clock.seconds,
        }

    def save(self, step: int) -> None:
        """Write a snapshot of everything that decides the rest of the stage."""
        pruner = self.parts.pruner
        if pruner is not None:
            pruner.masks.check_dead()
        tensors: snapshot.Groups = {
            "model": {name: weight.detach() for name, weight in self.trained.items()},
            "adam": snapshot.optimizer_tensors(self.optimizer, self.trained),
            "best": self.best_weights,
            "pruner": {} if pruner is None else pruner.state_dict(),
            "random": snapshot.random_tensors(),
        }
        notes = {
            "fingerprint": self.fingerprint,
            "evaluations": self.evaluations,
            "best": self.best,
            "examples": self.examples,
            "seconds": self.clock.seconds,
            "draws": self.parts.random_state(),
            "logged_bytes": self._log.stat().st_size if self._log.exists() else 0,
        }
        snapshot.write(self.work.state, snapshot.Snapshot(step, tensors, notes))

    @torch.no_grad()
    def restore(self) -> int:
        """Take over the newest snapshot; return the step to go on from, 0 without one."""
        found = snapshot.newest(self.work.state, self.fingerprint)
        if found is None:
            self._log.unlink(missing_ok=True)
            return 0
        for name, weight in self.trained.items():
            weight.copy_(found.tensors["model"][name])
        snapshot.restore_optimizer(self.optimizer, self.trained, found.tensors.get("adam", {}))
        snapshot.restore_random(found.tensors["random"])
        if self.parts.pruner is not None:
            self.parts.pruner.load_state_dict(found.tensors["pruner"])
        self.best_weights = found.tensors.get("best", {})
        self.evaluations, self.best = found.notes["evaluations"], found.notes["best"]
        self.examples, self.clock.before = found.notes["examples"], found.notes["seconds"]
        self.parts.restore_random(found.notes["draws"])
        with self._log.open("ab") as log:
            log.truncate(found.notes["logged_bytes"])
        self.watch({"event": "resume", "step": found.step})
        return found.step

    def _tell(self, event: dict[str, Any]) -> None:
        self.watch(event)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")
