"""Snapshots: whole or not at all, and what they hold comes back to the last bit."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spdtool.errors import Corrupt
from spdtool.training import checkpoint
from spdtool.training.checkpoint import (
    Snapshot,
    collect_optimizer_state,
    collect_random_state,
    load_optimizer_state,
    load_random_state,
    read_newest_snapshot,
    write_snapshot,
)


def made(step: int, **notes: Any) -> Snapshot:
    torch.manual_seed(step)
    tensors = {
        "model": {"layer.0.weight": torch.randn(3, 4), "half": torch.randn(5).bfloat16()},
        "random": {"cpu": torch.get_rng_state()},
        "pruner": {"dead.w": torch.tensor([True, False]), "observed": torch.tensor(3)},
        "best": {},
    }
    return Snapshot(step, tensors, {"fingerprint": "f"} | notes)


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_what_was_written_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    kept = made(7, draws=[3, [1, 2], None])
    write_snapshot(tmp_path / "state", kept)
    found = read_newest_snapshot(tmp_path / "state", "f")
    assert found is not None
    assert found.step == 7
    assert found.notes["draws"] == [3, [1, 2], None]
    assert found.tensors.get("best", {}) == {}
    for group in ("model", "random", "pruner"):
        assert found.tensors[group].keys() == kept.tensors[group].keys()
        for name, tensor in kept.tensors[group].items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write_snapshot(tmp_path, made(step))
    assert names(tmp_path) == ["step-000000100/state.json", "step-000000100/state.safetensors"]


def test_without_a_snapshot_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert read_newest_snapshot(tmp_path / "none", "f") is None
    (tmp_path / "writing").mkdir()  # killed while the first one was written
    assert read_newest_snapshot(tmp_path, "f") is None


def test_a_half_written_one_is_not_seen(tmp_path: Path) -> None:
    write_snapshot(tmp_path, made(3))
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / "state.safetensors").write_bytes(b"half")
    found = read_newest_snapshot(tmp_path, "f")
    assert found is not None
    assert found.step == 3
    write_snapshot(tmp_path, made(4))
    assert names(tmp_path) == ["step-000000004/state.json", "step-000000004/state.safetensors"]


def test_of_two_the_later_counts_even_if_the_older_is_half_removed(tmp_path: Path) -> None:
    write_snapshot(tmp_path, made(3))
    (tmp_path / "step-000000002").mkdir()
    found = read_newest_snapshot(tmp_path, "f")
    assert found is not None
    assert found.step == 3


def test_one_that_belongs_to_something_else_is_removed(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "state", made(3))
    assert read_newest_snapshot(tmp_path / "state", "another") is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_one_is_named(tmp_path: Path, file: str, damage: str) -> None:
    write_snapshot(tmp_path, made(3))
    path = tmp_path / "step-000000003" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(Corrupt, match="step-000000003"):
        read_newest_snapshot(tmp_path, "f")


def test_a_full_disk_leaves_the_older_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path, made(3))

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(tmp_path, made(4))
    assert names(tmp_path) == ["step-000000003/state.json", "step-000000003/state.safetensors"]
    assert read_newest_snapshot(tmp_path, "f") is not None


def test_nothing_is_pickled(tmp_path: Path) -> None:
    write_snapshot(tmp_path, made(3))
    assert json.loads((tmp_path / "step-000000003/state.json").read_text("utf-8"))["step"] == 3
    assert not (tmp_path / "step-000000003/state.safetensors").read_bytes().startswith((b"PK", b"\x80"))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(fused: bool) -> None:
    def setup() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        weights = {
            "a": nn.Parameter(torch.randn(4, 3)),
            "b": nn.Parameter(torch.randn(3)),
            "idle": nn.Parameter(torch.randn(2)),
        }
        groups = [{"params": [weights["a"]], "weight_decay": 0.1}, {"params": [weights["b"], weights["idle"]]}]
        return weights, torch.optim.AdamW(groups, lr=0.1, fused=fused)

    def step(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        weights["a"].grad, weights["b"].grad = weights["a"].detach().sin(), weights["b"].detach().cos()
        optimizer.step()

    weights, optimizer = setup()
    for _ in range(3):
        step(weights, optimizer)
    kept = {name: tensor.clone() for name, tensor in collect_optimizer_state(optimizer, weights).items()}
    assert "idle/exp_avg" not in kept, "a parameter without gradients has no state to keep"
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    step(weights, optimizer)

    others, other = setup()
    with torch.no_grad():
        for name, weight in others.items():
            weight.copy_(values[name])
    load_optimizer_state(other, others, kept)
    step(others, other)
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_the_random_state_comes_back() -> None:
    torch.manual_seed(5)
    state = {name: tensor.clone() for name, tensor in collect_random_state().items()}
    first = torch.rand(3)
    load_random_state(state)
    assert torch.equal(torch.rand(3), first)
