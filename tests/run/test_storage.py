"""Atomic writes: files and folders are complete or absent after a power cut."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdtool.run.storage import create_folder, publish_folder, replacing, settle_folder, sync_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_write_json_writes_the_whole_file_or_none(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"ä": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    with pytest.raises(ZeroDivisionError), replacing(out) as partial:
        partial.mkdir()
        (partial / "file").touch()
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out.parent / ".out.partial").mkdir()
    (out.parent / ".out.partial/of a call that was killed").touch()
    with replacing(out) as partial:
        partial.mkdir()
        (partial / "file").touch()
    assert [path.name for path in out.parent.rglob("*")] == ["out", "file"]


def test_a_settled_folder_follows_the_umask_and_keeps_executable_bits(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, mode in (("deep/secret", 0o600), ("script", 0o755), ("link", None)):
        if mode is None:
            (tmp_path / name).symlink_to("nowhere")
        else:
            (tmp_path / name).touch()
            (tmp_path / name).chmod(mode)
    before = os.umask(0o022)
    try:
        settle_folder(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep/secret").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "script").stat().st_mode) == 0o755
    assert names(tmp_path) == ["deep", "deep/secret", "link", "script"]


def test_an_unsupported_flush_is_ignored_and_an_io_error_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def folder_by_storage(root: Path) -> None:
    create_folder(root / "a" / "b")
    partial = root / "a" / "b" / "partial"
    partial.mkdir()
    (partial / "weights").write_text("whole")
    settle_folder(partial)
    publish_folder(partial, root / "a" / "b" / "final")
    write_json(root / "a" / "b" / "record.json", {"value": 1})


def folder_without_flushing(root: Path) -> None:
    (root / "partial").mkdir()
    (root / "partial" / "weights").write_text("whole")
    (root / "partial").rename(root / "final")


def find_torn_writes(root: Path, power: Any, write_final: Callable[[Path], None]) -> list[str]:
    """Return the moments at which a power cut leaves a final folder that is not whole."""
    root.mkdir()
    with power.recording(root) as cuts:
        write_final(root)
    faults = []
    for number, (moment, state) in enumerate(cuts.states.items()):
        power.write_state(state, root.parent / f"{root.name}-{number}")
        for final in (root.parent / f"{root.name}-{number}").rglob("final"):
            if not (final / "weights").exists() or (final / "weights").read_text() != "whole":
                faults.append(moment)
        for record in (root.parent / f"{root.name}-{number}").rglob("record.json"):
            if record.read_text() != '{\n  "value": 1\n}\n':
                faults.append(moment)
    return faults


def test_a_power_cut_at_any_moment_leaves_a_whole_folder_or_none(tmp_path: Path, power: Any) -> None:
    assert find_torn_writes(tmp_path / "flushed", power, folder_by_storage) == []
    assert find_torn_writes(tmp_path / "not", power, folder_without_flushing), "the layer finds what is not flushed"
