"""Snapshots: the resumable state of a training stage, on disk whole or not at all.

A snapshot is a folder `step-000000123` with `state.safetensors` (every tensor) and `state.json` (everything else). It
is written under another name and renamed; only then is the older one removed. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdtool import ranks as processes
from spdtool.errors import Corrupt
from spdtool.models import fsdp
from spdtool.run.folder import write_json

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot holds.

    Attributes:
        step: optimiser steps done.
        tensors: group to name to tensor.
        notes: what JSON can hold.
    """

    step: int
    tensors: Groups
    notes: dict[str, Any]


def write(root: Path, snapshot: Snapshot) -> None:
    """Write `snapshot` under `root`, then remove the older ones; if that fails, the older ones stay."""
    partial, final = root / "writing", root / f"step-{snapshot.step:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, snapshot)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
        raise
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in root.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def _write(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True)
    flat = {
        f"{group}/{name}": tensor.detach().contiguous()
        for group, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }
    save_file(flat, folder / "state.safetensors")
    write_json(folder / "state.json", {"step": snapshot.step} | snapshot.notes)


def newest(root: Path, fingerprint: str) -> Snapshot | None:
    """The latest snapshot under `root` whose notes carry `fingerprint`; others are of no use and are removed.

    Raises:
        Corrupt: it cannot be read.
    """
    found = sorted(root.glob("step-*")) if root.exists() else []
    if not found:
        return None
    try:
        notes = json.loads((found[-1] / "state.json").read_text("utf-8"))
        if notes["fingerprint"] != fingerprint:
            shutil.rmtree(root.rename(root.with_name("stale")))  # in one piece: a half-removed one would look damaged
            return None
        flat = load_file(found[-1] / "state.safetensors")
    except Exception as error:  # safetensors has its own kinds
        raise Corrupt(
            f"the snapshot {found[-1]} cannot be read: {error}", "remove that folder to start the stage anew"
        ) from None
    groups: Groups = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return Snapshot(int(notes["step"]), groups, notes)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name instead of by position: `layer.0.weight/exp_avg`; sharded or not."""
    return {
        f"{name}/{key}": value
        for name, weight in trained.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors as they are, those that are sharded whole, on the main process; all of them call this together."""
    made = {}
    for name, tensor in tensors:
        full = fsdp.gather_rows(fsdp.local_rows(tensor), tensor)
        if processes.is_main():
            made[name] = full.cpu() if fsdp.is_sharded(tensor) else full
    return made


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trained: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Take over what `optimizer_tensors` gave."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        weight = trained[name]
        made = fsdp.shard_like(value, weight) if value.shape == weight.shape else value.to(weight.device)
        optimizer.state[weight][entry] = made


def random_tensors() -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and of every CUDA device; other ranks' devices are left alone."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and processes.world_size() == 1:
        states |= {f"cuda{index:03d}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Take over what `random_tensors` gave."""
    torch.set_rng_state(tensors["cpu"])
    states = [tensors[key] for key in sorted(tensors) if key.startswith("cuda")]
    if states and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)
