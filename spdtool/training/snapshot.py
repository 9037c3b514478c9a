"""Snapshots: the resumable state of a training stage, on disk whole or not at all.

A snapshot is a folder `step-000000123` with `state.safetensors` (every tensor), `state.json`
(everything else) and `contents.json` (size and sha256 of both). It is written under another name,
flushed to the disk and renamed. Only then is the oldest removed, so two are always there. A damaged
snapshot is passed over in favour of the one before it. No pickle is written or read.

On a GPU the loop waits for a copy alone: a side stream copies into page-locked memory, and a thread writes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spdtool import console, ranks
from spdtool.distillation.lesson import Lesson
from spdtool.errors import first_line
from spdtool.models import collectives, fsdp
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import STUDENTS, Stage
from spdtool.run.records import FileDigest, Record
from spdtool.run.storage import (
    create_folder,
    publish_folder,
    remove_path,
    settle_folder,
    sync_file,
    sync_folder,
    write_json,
)
from spdtool.training.log import LogState, TrainingLog

TENSORS, NOTES, CONTENTS = "state.safetensors", "state.json", "contents.json"
SNAPSHOT_PATTERN = "step-*"
KEPT_SNAPSHOTS = 2  # the older one is read where a disk has damaged the newer
CPU = torch.device("cpu")

TensorGroups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """Contents of a snapshot.

    Attributes:
        step: number of optimiser steps done.
        tensors: group to name to tensor.
        notes: what JSON can hold.
    """

    step: int
    tensors: TensorGroups
    notes: dict[str, JsonValue]


class SnapshotContents(Record):
    """Contents of a snapshot's contents.json; written last."""

    format: Literal[1] = 1  # of the snapshot: another layout, another number
    files: dict[str, FileDigest]


def write_snapshot(root: Path, snapshot: Snapshot) -> None:
    """Write `snapshot` under `root`, then remove all but the newest two; if that fails, the older ones stay."""
    partial, final = root / "writing", root / f"step-{snapshot.step:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    create_folder(root)
    try:
        write_snapshot_files(partial, snapshot)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
        raise
    remove_snapshot(final)  # of the same step, by a run that has resumed from an older one
    publish_folder(partial, final)
    for folder in sorted(root.glob(SNAPSHOT_PATTERN))[:-KEPT_SNAPSHOTS]:
        remove_snapshot(folder)


def write_snapshot_files(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a snapshot into a new folder, and flush them to the disk."""
    folder.mkdir()
    flat = {}
    for group, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            flat[f"{group}/{name}"] = tensor.detach().contiguous()  # safetensors refuses views
    save_file(flat, folder / TENSORS)
    write_json(folder / NOTES, {"step": snapshot.step, **snapshot.notes})
    files = {name: _digest_file(folder / name) for name in (TENSORS, NOTES)}
    write_json(folder / CONTENTS, SnapshotContents(files=files))
    settle_folder(folder)


def remove_snapshot(folder: Path) -> None:
    """Remove a snapshot, if it is there. It is renamed first: half removed it would look damaged."""
    spent = folder.with_name("spent")
    remove_path(spent)
    if folder.exists():
        folder.rename(spent)
        remove_path(spent)


def read_newest_snapshot(root: Path, fingerprint: str, warn: Callable[[str], None] | None = None) -> Snapshot | None:
    """Read the latest intact snapshot under `root`, if it has this fingerprint.

    Args:
        warn: called with the reason why a snapshot cannot be used, which is then removed. None: only look;
            nothing is removed.

    Returns:
        None if the stage begins anew.
    """
    folders = sorted(root.glob(SNAPSHOT_PATTERN), reverse=True)
    for folder in folders:
        damage = find_damage(folder)
        if damage is not None:
            if warn is not None:
                warn(f"the snapshot {folder} is damaged and passed over: {damage}")
                remove_snapshot(folder)
            continue
        notes = json.loads((folder / NOTES).read_text("utf-8"))
        if notes["fingerprint"] != fingerprint:
            if warn is not None:
                warn("the stage begins anew: its snapshot belongs to other settings or other rows")
                shutil.rmtree(root.rename(root.with_name("stale")))  # a half-removed snapshot would look damaged
            return None
        tensors: TensorGroups = {}
        for key, tensor in load_file(folder / TENSORS).items():
            group, _, name = key.partition("/")
            tensors.setdefault(group, {})[name] = tensor
        return Snapshot(int(notes["step"]), tensors, notes)
    if folders and warn is not None:
        warn("the stage begins anew: none of its snapshots is intact")
    return None


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with the files of a snapshot; None if they are what was written."""
    try:
        contents = SnapshotContents.model_validate_json((folder / CONTENTS).read_bytes())
        if contents.files.keys() != {TENSORS, NOTES}:
            return f"{CONTENTS} names other files"
        for name, digest in contents.files.items():
            size = (folder / name).stat().st_size
            if size != digest.bytes:
                return f"{name} holds {size} bytes, and {digest.bytes} were written"
            if _digest_file(folder / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        return first_line(error)
    return None


def _digest_file(file: Path) -> FileDigest:
    return FileDigest(bytes=file.stat().st_size, sha256=sha256(file))


def collect_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name instead of by position: `layer.0.weight/exp_avg`."""
    state = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Restore what `collect_optimizer_state` returned, with the layout of the parameters (sharded or not)."""
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        is_moment = value.shape == parameter.shape  # the count of steps is a scalar, whole on every rank
        local = fsdp.shard_like(value, parameter) if is_moment else value.to(parameter.device)
        optimizer.state[parameter][entry] = local


def gather_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors on rank 0, sharded ones whole and in the CPU's memory. Collective: call on every rank."""
    gathered = {}
    for name, tensor in tensors:
        whole = fsdp.gather_rows(fsdp.local_rows(tensor), tensor)
        if ranks.is_main():
            gathered[name] = whole.cpu() if fsdp.is_sharded(tensor) else whole
    return gathered


def collect_random_state(device: torch.device = CPU) -> dict[str, Tensor]:
    """Return the states of torch's generators: of the CPU, and of the GPU if `device` is one."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(states: Mapping[str, Tensor], device: torch.device = CPU) -> str | None:
    """Restore what `collect_random_state` returned; say what could not be restored, None: nothing is missing."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if (device.type == "cuda") == ("cuda" in states):
        return None
    return "the snapshot was saved on another kind of device: dropout draws other numbers from here on"


@dataclass(frozen=True)
class CopiedTensors:
    """Copies that training does not change any more; `wait` returns once they are complete."""

    tensors: TensorGroups
    wait: Callable[[], None]


def copy_tensors(tensors: TensorGroups) -> CopiedTensors:
    """Copy tensors while training goes on: those of a GPU on a side stream into page-locked memory."""
    devices = {tensor.device for group in tensors.values() for tensor in group.values()}
    on_gpu = [device for device in devices if device.type == "cuda"]
    if not on_gpu:
        return CopiedTensors(_map_tensors(tensors, torch.clone), lambda: None)
    training = torch.cuda.current_stream(on_gpu[0])
    side = torch.cuda.Stream(on_gpu[0])  # type: ignore[no-untyped-call]
    side.wait_stream(training)
    with torch.cuda.stream(side):
        copies = _map_tensors(tensors, _copy_to_pinned)
    # the device waits, not the processor: the next step must not change what is being copied
    training.wait_stream(side)
    return CopiedTensors(copies, side.record_event().synchronize)


def _map_tensors(tensors: TensorGroups, copy: Callable[[Tensor], Tensor]) -> TensorGroups:
    """Copy every tensor of every group."""
    copies: TensorGroups = {}
    for group, members in tensors.items():
        copies[group] = {name: copy(tensor.detach()) for name, tensor in members.items()}
    return copies


def _copy_to_pinned(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Stateful(Protocol):
    """Something whose state is tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class Snapshotter:
    """Saves and restores everything that decides how a training stage continues, and the best weights up to now.

    Args:
        stage: the snapshots lie in its `state` folder.
        fingerprint: hash of the recipe and of all that was read; a snapshot with another one is
            discarded.
        parameters: what is trained, by name.
        states: by the name of a group in the snapshot: the pruner with its masks and what was
            observed since the last event, and the loss scale of fp16.
    """

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lesson: Lesson,
        states: Mapping[str, Stateful],
        log: TrainingLog,
    ) -> None:
        self.stage, self.fingerprint = stage, fingerprint
        self.parameters, self.optimizer = parameters, optimizer
        self.lesson, self.states, self.log = lesson, states, log
        self.best_weights: dict[str, Tensor] = {}
        self._settled_students = 0  # how many of the log's are on the disk for sure
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None  # the last snapshot that the thread has got

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only some rows of what is trained."""
        return any(map(fsdp.is_sharded, self.parameters.values()))

    def keep_weights(self) -> None:
        """Keep a copy of the weights as they are: they are the best up to now."""
        for name, parameter in self.parameters.items():
            # cloned: on a CPU, `cpu()` is the weight itself, which goes on changing
            self.best_weights[name] = fsdp.local_rows(parameter).cpu().clone()

    @torch.no_grad()
    def restore_best_weights(self) -> None:
        """Put the best weights back into the model, if any were kept."""
        for name, weight in self.best_weights.items():
            fsdp.local_rows(self.parameters[name]).copy_(weight)

    @contextmanager
    def write_aside(self) -> Iterator[None]:
        """Let a thread write snapshots inside the block; at its end they are on the disk."""
        with ThreadPoolExecutor(1, "snapshots") as self._writer:
            yield
        self._wait()

    def save(self, step: int, *, aside: bool = False) -> None:
        """Write a snapshot after optimiser step `step`, from rank 0. Sharded weights: collective.

        Args:
            aside: return once all is copied, and let the thread of `write_aside` write it.
        """
        self._wait()  # one after the other, so that two are always there; and a full disk is reported here
        if not ranks.is_main() and not self.is_sharded:
            return
        optimizer_state = collect_optimizer_state(self.optimizer, self.parameters)
        best_weights = {}
        for name, weight in self.best_weights.items():
            best_weights[name] = fsdp.gather_rows(weight, self.parameters[name]).cpu()
        tensors: TensorGroups = {
            "model": gather_tensors(self.parameters.items()),
            "adam": gather_tensors(optimizer_state.items()),
            "best": best_weights,
            "random": collect_random_state(self._device) if ranks.world_size() == 1 else collect_random_state(),
        }
        for name, stateful in self.states.items():
            tensors[name] = stateful.state_dict()
        if not ranks.is_main():  # it has given its rows
            return
        notes: dict[str, JsonValue] = {
            "fingerprint": self.fingerprint,
            "arithmetic": self.stage.arithmetic,
            "log": self.log.state_dict().model_dump(mode="json"),
            "lesson": self.lesson.state_dict(),
        }
        if not aside:
            self._write(Snapshot(step, tensors, notes))
            return
        assert self._writer is not None
        best = tensors.pop("best")  # on the CPU, and replaced rather than changed
        copied = copy_tensors(tensors)

        def write() -> None:
            copied.wait()
            self._write(Snapshot(step, copied.tensors | {"best": best}, notes))

        self._written = self._writer.submit(write)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _write(self, snapshot: Snapshot) -> None:
        self._settle_log()
        write_snapshot(self.stage.state, snapshot)

    def _wait(self) -> None:
        """Wait for the snapshot that is being written; raises what its thread raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _settle_log(self) -> None:
        """Flush what the notes of a snapshot refer to: the log, and students at intermediate sparsities."""
        for student in self.log.students[self._settled_students :]:
            settle_folder(self.stage.folder / student.folder)
            sync_folder(self.stage.folder / STUDENTS)
        self._settled_students = len(self.log.students)
        if self.log.file.exists():
            sync_file(self.log.file)
            sync_folder(self.stage.folder)

    @torch.no_grad()
    def restore(self) -> int:
        """Restore the newest snapshot; return the number of steps done, 0 without one."""
        snapshot = self._read_newest()
        if snapshot is None:
            return 0
        tensors = snapshot.tensors
        for name, parameter in self.parameters.items():
            fsdp.local_rows(parameter).copy_(fsdp.take_local_rows(tensors["model"][name], parameter))
        load_optimizer_state(self.optimizer, self.parameters, tensors.get("adam", {}))
        if collectives.group_size() == 1:  # several ranks seed their generators at every step
            missing = load_random_state(tensors["random"], self._device)
            if missing is not None:
                self._warn(missing)
        for name, stateful in self.states.items():
            if tensors.get(name):  # of a CPU's run there is no loss scale
                stateful.load_state_dict(tensors[name])
        for name, weight in tensors.get("best", {}).items():
            self.best_weights[name] = fsdp.take_local_rows(weight, self.parameters[name])
        self.log.load_state_dict(LogState.model_validate(snapshot.notes["log"]))
        lesson_state = snapshot.notes["lesson"]
        assert isinstance(lesson_state, list)
        self.lesson.load_state_dict(lesson_state)
        self.log.on_event({"event": "resume", "step": snapshot.step})
        return snapshot.step

    def _read_newest(self) -> Snapshot | None:
        """Read the snapshot to resume from. Rank 0 removes one that does not fit, then the other ranks read."""
        folder = self.stage.state
        if not ranks.is_main():
            collectives.barrier()
            return read_newest_snapshot(folder, self.fingerprint)
        snapshot = read_newest_snapshot(folder, self.fingerprint, self._warn)
        if snapshot is not None and snapshot.notes["arithmetic"] != self.stage.arithmetic:
            self._warn(
                "this process does not compute the same last bits as the one that saved the snapshot (another "
                "processor, another number of threads, or a switch such as MKL_CBWR): the weights will differ in their "
                "last bits"
            )
        self.log.cut(0 if snapshot is None else LogState.model_validate(snapshot.notes["log"]).bytes)
        collectives.barrier()
        return snapshot

    def _warn(self, text: str) -> None:
        console.warn(f"{self.stage.name}: {text}")
