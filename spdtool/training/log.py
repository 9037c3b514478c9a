"""The journal of a training stage: what it has measured, its best weights, its log, and the snapshots of all that."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spdtool import console
from spdtool import ranks as processes
from spdtool.console import OnEvent
from spdtool.models import collectives, fsdp
from spdtool.recipe.fields import Training
from spdtool.run.folder import LOG, Stage
from spdtool.run.records import Evaluation, FitResult, IntermediateStudent
from spdtool.training import checkpoint as snapshot

if TYPE_CHECKING:
    from spdtool.training.loop import Fit


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


class Journal:
    """Keeps what a training loop has learnt so far: best weights, evaluations, time; saves it all as a snapshot.

    Of several processes each keeps the same; only the main one tells and writes.
    """

    def __init__(
        self,
        parts: Fit,
        section: Training,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        work: Stage,
        fingerprint: str,
        watch: OnEvent,
    ) -> None:
        self.parts, self.section, self.trained, self.optimizer = parts, section, trained, optimizer
        self.work, self.fingerprint, self.watch = work, fingerprint, watch
        self.epochs = section.length(len(parts.rows)).epochs
        self.evaluations: list[Evaluation] = []
        self.students: list[IntermediateStudent] = []
        self.best: Evaluation | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.examples, self.clock = 0, _Clock()
        self._log = work.folder / LOG

    def prune(self, step: int) -> None:
        """Let the pruner prune if an event is due, and say so."""
        sparsity = self.parts.pruner.prune(step) if self.parts.pruner is not None else None
        if sparsity is not None:
            self._tell({"event": "prune", "step": step, "sparsity": sparsity} | self._clamped())

    def _clamped(self) -> dict[str, Any]:
        """What `least` changed at the event: matrix to its zeros before and after, and where it had to give way."""
        pruner = self.parts.pruner
        assert pruner is not None
        found = {"clamped": pruner.clamped, "lowered": pruner.lowered}
        return {name: value for name, value in found.items() if value}

    def save_student(self, step: int) -> None:
        """Before a prune event: save the student, if its sparsity is one of `prune.save_at`."""
        pruner, save = self.parts.pruner, self.parts.save_student
        if save is None or pruner is None or not pruner.is_due(step):
            return
        before = [sparsity for event, sparsity in sorted(pruner.events.items()) if event < step]
        wanted = getattr(self.section, "save_at", ())
        if before and before[-1] in wanted and before[-1] not in [student.sparsity for student in self.students]:
            with self.clock.paused():
                self.students.append(save(before[-1], step))
            self._tell({"event": "student"} | self.students[-1].model_dump(mode="json", exclude_none=True))

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
        train = None if self.parts.evaluate_train is None else self.parts.evaluate_train()
        evaluation = Evaluation(step=step, metrics=metrics, train=train)
        allowed = self.parts.pruner is None or self.parts.pruner.is_done(step)
        best = allowed and (self.best is None or evaluation.score > self.best.score)
        if best:
            self.best = evaluation
            if self.section.keep_best:
                self.best_weights = {n: fsdp.local_rows(weight).cpu().clone() for n, weight in self.trained.items()}
        self.evaluations.append(evaluation)
        event = {"event": "eval", "step": step, "metrics": metrics, "best": best}
        self._tell(event if train is None else event | {"train": train})

    def finish(self, steps: int, per_epoch: int) -> FitResult:
        """Put the weights to hand over into the model, and sum up."""
        handed = self.evaluations[-1] if self.evaluations else None
        if self.section.keep_best and self.best is not None:
            handed = self.best
            with torch.no_grad():
                for name, weight in self.best_weights.items():
                    fsdp.local_rows(self.trained[name]).copy_(weight)
        return FitResult(
            steps=steps,
            epochs=steps / per_epoch,
            best=handed,
            evaluations=self.evaluations,
            students=self.students,
            examples_per_second=self.examples / self.clock.seconds,
        )

    def save(self, step: int) -> None:
        """Write a snapshot of everything that decides the rest of the stage; of sharded weights all have a part."""
        if not processes.is_main() and not self.sharded:
            return
        pruner = self.parts.pruner
        if pruner is not None:
            pruner.masks.check_dead()
        tensors: snapshot.Groups = {
            "model": snapshot.gathered(self.trained.items()),
            "adam": snapshot.gathered(snapshot.optimizer_tensors(self.optimizer, self.trained).items()),
            "best": {n: fsdp.gather_rows(kept, self.trained[n]).cpu() for n, kept in self.best_weights.items()},
            "pruner": {} if pruner is None else pruner.state_dict(),
            "random": snapshot.random_tensors(),
        }
        if not processes.is_main():
            return
        notes = {
            "fingerprint": self.fingerprint,
            "evaluations": [evaluation.model_dump(mode="json") for evaluation in self.evaluations],
            "students": [student.model_dump(mode="json") for student in self.students],
            "best": None if self.best is None else self.best.model_dump(mode="json"),
            "examples": self.examples,
            "seconds": self.clock.seconds,
            "draws": self.parts.random_state(),
            "logged_bytes": self._log.stat().st_size if self._log.exists() else 0,
        }
        snapshot.write(self.work.state, snapshot.Snapshot(step, tensors, notes))

    @torch.no_grad()
    def restore(self) -> int:
        """Take over the newest snapshot; return the step to go on from, 0 without one."""
        found = self._newest()
        if found is None:
            return 0
        for name, weight in self.trained.items():
            fsdp.local_rows(weight).copy_(fsdp.take_local_rows(found.tensors["model"][name], weight))
        snapshot.restore_optimizer(self.optimizer, self.trained, found.tensors.get("adam", {}))
        if collectives.group_size() == 1:  # several seed their generators at every step
            snapshot.restore_random(found.tensors["random"])
        if self.parts.pruner is not None:
            self.parts.pruner.load_state_dict(found.tensors["pruner"])
        best = found.tensors.get("best", {})
        self.best_weights = {name: fsdp.take_local_rows(weight, self.trained[name]) for name, weight in best.items()}
        self.evaluations = [Evaluation.model_validate(each) for each in found.notes["evaluations"]]
        self.best = found.notes["best"] and Evaluation.model_validate(found.notes["best"])
        self.students = [IntermediateStudent.model_validate(each) for each in found.notes["students"]]
        self.examples, self.clock.before = found.notes["examples"], found.notes["seconds"]
        self.parts.restore_random(found.notes["draws"])
        self.watch({"event": "resume", "step": found.step})
        return found.step

    @property
    def sharded(self) -> bool:
        """Whether each process holds only some rows of what is trained."""
        return any(map(fsdp.is_sharded, self.trained.values()))

    def _newest(self) -> snapshot.Snapshot | None:
        """The snapshot to go on from. The main process clears away what is of no use, then the others read."""
        if not processes.is_main():
            collectives.barrier()
            return snapshot.newest(self.work.state, self.fingerprint)
        begun = any(self.work.state.glob("step-*"))
        found = snapshot.newest(self.work.state, self.fingerprint)
        if begun and found is None:
            console.warn(f"{self.work.name} begins anew: its snapshot belongs to other settings or other rows")
        if found is None:
            self._log.unlink(missing_ok=True)
        else:
            with self._log.open("ab") as log:
                log.truncate(found.notes["logged_bytes"])
        collectives.barrier()
        return found

    def _tell(self, event: dict[str, Any]) -> None:
        if not processes.is_main():
            return
        self.watch(event)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")
