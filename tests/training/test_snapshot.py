"""Snapshots are complete or absent, and are read back to the last bit."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spdtool.distillation.lesson import Lesson
from spdtool.run.folder import Stage
from spdtool.run.storage import create_folder
from spdtool.training import snapshot
from spdtool.training.log import TrainingLog
from spdtool.training.precision import LossScale
from spdtool.training.snapshot import (
    Snapshot,
    Snapshotter,
    collect_optimizer_state,
    collect_random_state,
    copy_tensors,
    load_optimizer_state,
    load_random_state,
    read_newest_snapshot,
    write_snapshot,
)


def make_snapshot(step: int, **notes: Any) -> Snapshot:
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


def test_a_snapshot_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    written = make_snapshot(7, draws=[3, [1, 2], None])
    write_snapshot(tmp_path / "state", written)
    read = read_newest_snapshot(tmp_path / "state", "f")
    assert read is not None
    assert read.step == 7
    assert read.notes["draws"] == [3, [1, 2], None]
    assert read.tensors.get("best", {}) == {}
    for group in ("model", "random", "pruner"):
        assert read.tensors[group].keys() == written.tensors[group].keys()
        for name, tensor in written.tensors[group].items():
            assert read.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(read.tensors[group][name], tensor)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write_snapshot(tmp_path, make_snapshot(step))
    files = ["contents.json", "state.json", "state.safetensors"]
    assert names(tmp_path) == [f"step-{step:09d}/{file}" for step in (10, 100) for file in files]


def test_without_a_snapshot_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert read_newest_snapshot(tmp_path / "none", "f") is None
    (tmp_path / "writing").mkdir()  # killed while the first one was written
    assert read_newest_snapshot(tmp_path, "f") is None


def test_a_half_written_snapshot_is_ignored(tmp_path: Path) -> None:
    write_snapshot(tmp_path, make_snapshot(3))
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / "state.safetensors").write_bytes(b"half")
    newest = read_newest_snapshot(tmp_path, "f")
    assert newest is not None
    assert newest.step == 3
    write_snapshot(tmp_path, make_snapshot(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]


def test_a_snapshot_of_other_settings_is_removed_by_the_main_rank(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "state", make_snapshot(3))
    assert read_newest_snapshot(tmp_path / "state", "another") is None
    assert len(names(tmp_path)) == 3, "a rank that only looks removes nothing"
    notes: list[str] = []
    assert read_newest_snapshot(tmp_path / "state", "another", notes.append) is None
    assert "begins anew: its snapshot belongs to other settings" in notes[0]
    assert names(tmp_path) == []


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def zero_tail(content: bytes) -> bytes:
    return cut(content) + bytes(len(content) - len(cut(content)))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit is flipped": flip,
    "the tail reads as zeros": zero_tail,
    "it is cut": cut,
    "it is empty": lambda _: b"",
    "it is another file": lambda content: b"{}",
    "it is a list": lambda content: b"[1, 2]",
}


def test_a_damaged_snapshot_is_skipped_for_the_older_one(tmp_path: Path) -> None:
    for file in ("contents.json", "state.json", "state.safetensors"):
        for damage, apply in DAMAGES.items():
            root = tmp_path / file / damage
            for step in (3, 4):
                write_snapshot(root, make_snapshot(step))
            path = root / "step-000000004" / file
            path.write_bytes(apply(path.read_bytes()))
            notes: list[str] = []
            by_another_rank, by_main_rank = (
                read_newest_snapshot(root, "f"),
                read_newest_snapshot(root, "f", notes.append),
            )
            assert by_main_rank is not None, (file, damage)
            assert by_another_rank is not None, (file, damage)
            assert (by_another_rank.step, by_main_rank.step) == (3, 3), (file, damage)
            assert len(notes) == 1, (file, damage)
            assert "step-000000004 is damaged and passed over" in notes[0], (file, damage)
            assert [path.name for path in root.iterdir()] == ["step-000000003"], (file, damage)


def test_without_an_intact_snapshot_the_stage_restarts(tmp_path: Path) -> None:
    write_snapshot(tmp_path, make_snapshot(3))
    (tmp_path / "step-000000003" / "state.json").unlink()
    (tmp_path / "step-000000004").mkdir()
    (tmp_path / "step-000000005").touch()
    notes: list[str] = []
    assert read_newest_snapshot(tmp_path, "f", notes.append) is None
    assert len(notes) == 4
    assert notes[-1] == "the stage begins anew: none of its snapshots is intact"
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write_snapshot(tmp_path, make_snapshot(3))
    write_snapshot(tmp_path, make_snapshot(4, first=True))
    write_snapshot(tmp_path, make_snapshot(4, first=False))
    newest = read_newest_snapshot(tmp_path, "f")
    assert newest is not None
    assert newest.notes["first"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]


def test_a_full_disk_leaves_the_older_snapshot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(tmp_path, make_snapshot(3))
    before = names(tmp_path)

    def raise_disk_full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(tmp_path, make_snapshot(4))
    assert names(tmp_path) == before
    assert read_newest_snapshot(tmp_path, "f") is not None


def test_snapshot_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_snapshot(tmp_path, make_snapshot(3))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*/*")} == {0o640}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    write_snapshot(tmp_path, make_snapshot(3))
    assert json.loads((tmp_path / "step-000000003/state.json").read_text("utf-8"))["step"] == 3
    assert not (tmp_path / "step-000000003/state.safetensors").read_bytes().startswith((b"PK", b"\x80"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimizer_continues_identically(fused: bool) -> None:
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
    state = {name: tensor.clone() for name, tensor in collect_optimizer_state(optimizer, weights).items()}
    assert "idle/exp_avg" not in state, "a parameter without gradients has no state to keep"
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    step(weights, optimizer)

    restored_weights, restored_optimizer = setup()
    with torch.no_grad():
        for name, weight in restored_weights.items():
            weight.copy_(values[name])
    load_optimizer_state(restored_optimizer, restored_weights, state)
    step(restored_weights, restored_optimizer)
    for name, weight in weights.items():
        assert torch.equal(weight, restored_weights[name]), name


def test_the_random_state_is_restored() -> None:
    torch.manual_seed(5)
    state = {name: tensor.clone() for name, tensor in collect_random_state().items()}
    first = torch.rand(3)
    load_random_state(state)
    assert torch.equal(torch.rand(3), first)


class Aside:
    """A snapshotter of one weight, whose thread waits until it may write."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weight = nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.may_write, self.written = threading.Event(), []  # type: ignore[var-annotated]
        stage = Stage("prune", folder / "work", "f")
        create_folder(stage.folder)
        log = TrainingLog(stage.folder / "metrics.jsonl", lambda _: None)
        self.scale = LossScale(torch.device("cpu"))
        states = {"loss_scale": self.scale}
        self.snapshotter = Snapshotter(stage, "f", {"w": self.weight}, self.optimizer, Lesson(), states, log)
        self.state = stage.state
        write = snapshot.write_snapshot

        def wait_and_write(root: Path, contents: Snapshot) -> None:
            assert self.may_write.wait(10)
            write(root, contents)
            self.written.append((contents.step, threading.current_thread() is threading.main_thread()))

        monkeypatch.setattr(snapshot, "write_snapshot", wait_and_write)

    def step(self, value: float) -> None:
        self.weight.grad = torch.ones(3)
        self.optimizer.step()
        with torch.no_grad():
            self.weight.fill_(value)


def test_a_snapshot_written_aside_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = Aside(tmp_path, monkeypatch)
    with aside.snapshotter.write_aside():
        aside.step(1.0)
        aside.snapshotter.save(1, aside=True)
        moment = aside.optimizer.state[aside.weight]["exp_avg"].clone()
        aside.step(2.0)  # training goes on while the thread waits
        assert not aside.written
        aside.may_write.set()
        aside.snapshotter.save(2, aside=True)
        aside.step(3.0)
        aside.snapshotter.save(3)
        assert [step for step, _ in aside.written] == [1, 2, 3], "one after the other"
    assert [in_main for _, in_main in aside.written] == [False, False, True]
    assert [path.name for path in sorted(aside.state.glob("step-*"))] == ["step-000000002", "step-000000003"]
    (aside.state / "step-000000003" / "contents.json").unlink()
    older = read_newest_snapshot(aside.state, "f")
    assert older is not None
    assert older.tensors["model"]["w"].tolist() == [2.0] * 3
    assert not torch.equal(older.tensors["adam"]["w/exp_avg"], moment)


def test_what_is_written_aside_is_on_the_disk_when_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = Aside(tmp_path, monkeypatch)
    aside.may_write.set()
    with pytest.raises(KeyboardInterrupt), aside.snapshotter.write_aside():
        aside.snapshotter.save(1, aside=True)
        raise KeyboardInterrupt
    assert read_newest_snapshot(aside.state, "f") is not None


def test_a_disk_that_is_full_ends_training_though_a_thread_found_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = Aside(tmp_path, monkeypatch)

    def full(root: Path, contents: Snapshot) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "write_snapshot", full)
    with pytest.raises(OSError, match="No space left"), aside.snapshotter.write_aside():
        aside.snapshotter.save(1, aside=True)


def test_the_loss_scale_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = Aside(tmp_path, monkeypatch)
    aside.may_write.set()
    aside.scale.load_state_dict({"scale": torch.tensor(512.0), "steady_steps": torch.tensor(7, dtype=torch.int32)})
    aside.snapshotter.save(1)
    aside.scale.load_state_dict(LossScale(torch.device("cpu")).state_dict())
    assert aside.snapshotter.restore() == 1
    assert {name: float(value) for name, value in aside.scale.state_dict().items()} == {"scale": 512, "steady_steps": 7}


def test_a_random_state_of_another_device_is_said() -> None:
    states = collect_random_state()
    assert load_random_state(states) is None
    assert "another kind of device" in (load_random_state(states | {"cuda": states["cpu"]}) or "")


class OnGpu(torch.Tensor):
    """A double of a tensor on a GPU: one of the CPU that says otherwise."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def detach(self) -> OnGpu:
        return self


class Streams:
    """Doubles of CUDA's streams: a list of what is queued, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[str] = []
        self.current = "training"
        empty = torch.empty

        def empty_pinned(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> Any:
            assert pin_memory, "from other memory the copy would be waited for"
            target = empty(shape, dtype=dtype)

            def copy(source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
                assert non_blocking
                self.queued.append(f"copy on {self.current}")
                return target.copy_(source.as_subclass(torch.Tensor))

            return SimpleNamespace(copy_=copy)

        monkeypatch.setattr(torch, "empty", empty_pinned)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: self.stream("training"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _=None: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.queued.append(f"{name} waits for {other.name}"),
            record_event=lambda: SimpleNamespace(
                synchronize=lambda: self.queued.append(f"the thread waits for {name}")
            ),
        )

    @contextlib.contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        self.current = stream.name
        yield
        self.current = "training"


def test_tensors_of_a_gpu_are_copied_before_the_next_step_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: torch.full((3,), value).as_subclass(OnGpu) for name, value in (("a", 1.0), ("b", 2.0))}
    cpu = torch.ones(2)
    streams = Streams(monkeypatch)
    copied = copy_tensors({"model": dict(weights), "random": {"cpu": cpu}})
    assert streams.queued == [
        "side waits for training", "copy on side", "copy on side", "training waits for side",
    ]  # fmt: skip
    copied.wait()
    assert streams.queued[-1] == "the thread waits for side"
    cpu.zero_()
    assert {name: tensor.tolist() for name, tensor in copied.tensors["model"].items()} == {"a": [1] * 3, "b": [2] * 3}
    assert copied.tensors["random"]["cpu"].tolist() == [1, 1]


def test_the_random_state_of_a_gpu_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    device, generators = torch.device("cuda", 1), {torch.device("cuda", 1): torch.tensor([7])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generators[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators.update({device: state}))
    states = collect_random_state(device)
    generators[device] = torch.tensor([8])  # dropout has drawn
    assert load_random_state(states, device) is None
    assert generators[device].tolist() == [7]
    assert "another kind of device" in (load_random_state({"cpu": states["cpu"]}, device) or "")
