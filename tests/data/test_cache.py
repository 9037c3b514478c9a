"""The array cache: entries are computed once, mapped, recomputed if damaged, and safe between processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spdtool.data import cache


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spdtool"


def fill_and_count(calls: list[int]) -> Callable[[cache.Append], None]:
    def fill(append: cache.Append) -> None:
        calls.append(1)
        for start in (0, 3):
            append("numbers", np.arange(start, start + 3))
            append("pairs", np.full((1, 2), start, np.float32))
        append("nothing", np.empty((0, 4), np.int32))

    return fill


def check_arrays(arrays: cache.Arrays) -> None:
    assert arrays["numbers"].tolist() == [0, 1, 2, 3, 4, 5]
    assert arrays["pairs"].tolist() == [[0, 0], [3, 3]]
    assert arrays["nothing"].shape == (0, 4)


def test_an_entry_is_made_once_and_then_mapped(cache_folder: Path) -> None:
    calls: list[int] = []
    for _ in range(3):
        arrays = cache.cached_arrays("kind", "name", fill_and_count(calls))
        check_arrays(arrays)
        assert isinstance(arrays["numbers"], np.memmap)
        assert not arrays["numbers"].flags.writeable
    assert len(calls) == 1
    assert [path.name for path in (cache_folder / "kind").iterdir()] == ["name"], "nothing is left beside it"


def test_a_damaged_entry_is_computed_again(cache_folder: Path) -> None:
    calls: list[int] = []
    cache.cached_arrays("kind", "name", fill_and_count(calls))
    entry = cache_folder / "kind" / "name"
    numbers, contents = (entry / "numbers").read_bytes(), (entry / "contents.json").read_text()
    damages: dict[str, Callable[[], object]] = {
        "a file is cut": lambda: (entry / "numbers").write_bytes(numbers[:-1]),
        "a bit is flipped": lambda: (entry / "numbers").write_bytes(bytes([numbers[0] ^ 1]) + numbers[1:]),
        "a file is missing": lambda: (entry / "pairs").unlink(),
        "contents.json is missing": lambda: (entry / "contents.json").unlink(),
        "contents.json is cut": lambda: (entry / "contents.json").write_text(contents[:-9]),
        "contents.json is empty": lambda: (entry / "contents.json").write_text(""),
        "contents.json has nothing": lambda: (entry / "contents.json").write_text("{}"),
        "contents.json is a list": lambda: (entry / "contents.json").write_text("[1]"),
        "contents.json names another type": lambda: (entry / "contents.json").write_text(
            contents.replace("<i8", "<f8")
        ),
        "it is a file": lambda: (shutil.rmtree(entry), entry.write_text("x")),
        "another entry was copied over it": lambda: (shutil.rmtree(entry), shutil.copytree(other_entry, entry)),
    }
    cache.cached_arrays("kind", "other", fill_and_count(calls))
    other_entry = cache_folder / "kind" / "other"
    for damage, apply in damages.items():
        apply()
        cache._verified.clear()  # as in a new process
        calls.clear()
        for _ in range(2):
            check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
        assert len(calls) == 1, damage


def test_a_failing_computation_leaves_no_entry(cache_folder: Path) -> None:
    def fill(append: cache.Append) -> None:
        append("numbers", np.arange(3))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.cached_arrays("kind", "name", fill)
    assert list((cache_folder / "kind").iterdir()) == []


def test_without_a_place_to_write_the_arrays_stay_in_memory(cache_folder: Path) -> None:
    cache_folder.write_text("a file stands where the folder should be")
    calls: list[int] = []
    for _ in range(2):
        check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
    assert len(calls) == 2


def in_a_process(_: int) -> int:
    calls: list[int] = []
    check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
    return len(calls)


def test_several_writers_at_once_leave_one_whole_entry(cache_folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.map(in_a_process, range(16), chunksize=1)) >= 1
    assert [path.name for path in (cache_folder / "kind").iterdir()] == ["name"]
    calls: list[int] = []
    check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
    assert calls == []


def test_a_flipped_bit_is_found_by_the_next_process(cache_folder: Path) -> None:
    calls: list[int] = []
    cache.cached_arrays("kind", "name", fill_and_count(calls))
    numbers = cache_folder / "kind" / "name" / "numbers"
    status, content = numbers.stat(), bytearray(numbers.read_bytes())
    content[len(content) // 2] ^= 0x40
    numbers.write_bytes(content)
    os.utime(numbers, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache._verified.clear()
    calls.clear()
    check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
    assert len(calls) == 1


def test_each_file_is_read_once_in_a_process(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[Path]()
    compute_crc32 = cache.compute_crc32

    def recording(file: Path) -> int:
        read.append(file)
        return compute_crc32(file)

    monkeypatch.setattr(cache, "compute_crc32", recording)
    for _ in range(3):
        cache.cached_arrays("kind", "name", fill_and_count([]))
    assert sorted(file.name for file in read) == ["nothing", "numbers", "pairs"]
    numbers = cache_folder / "kind" / "name" / "numbers"
    os.utime(numbers)  # a copy of the folder, or somebody who wrote to it
    check_arrays(cache.cached_arrays("kind", "name", fill_and_count([])))
    assert read[3:] == [numbers]


def test_an_entry_is_flushed_before_it_gets_its_name(cache_folder: Path, tmp_path: Path, power: Any) -> None:
    (cache_folder / "kind").mkdir(parents=True)
    with power.recording(cache_folder) as cuts:
        cache.cached_arrays("kind", "name", fill_and_count([]))
    calls: list[int] = []
    for number, state in enumerate(cuts.states.values()):
        cut = tmp_path / str(number)
        cut.mkdir()
        power.write_state(state, cut / "spdtool")
        os.environ["XDG_CACHE_HOME"] = str(cut)  # the fixture puts it back
        is_there = (cut / "spdtool/kind/name").exists()
        calls.clear()
        check_arrays(cache.cached_arrays("kind", "name", fill_and_count(calls)))
        assert len(calls) == (not is_there), "what has the name is whole"
    assert is_there


def test_hashes_are_equal_on_disk_and_in_memory(cache_folder: Path) -> None:
    on_disk, in_memory = (
        cache.cached_arrays("kind", "name", fill_and_count([])),
        cache.arrays_in_memory(fill_and_count([])),
    )
    assert on_disk.hashes == in_memory.hashes == {name: cache.hash_array(array) for name, array in in_memory.items()}


def zeros(count: int) -> Callable[[cache.Append], None]:
    return lambda append: append("zeros", np.zeros(count, np.uint8))


def test_the_least_recently_used_entry_is_evicted(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDTOOL_CACHE_GB", "5e-6")
    for age, name in enumerate(["new", "used", "old"]):
        cache.cached_arrays("kind", name, zeros(1500))
        os.utime(cache_folder / "kind" / name / cache.CONTENTS, (0, 1000 - age))
    cache.cached_arrays("kind", "used", zeros(1500))
    mapped = cache.cached_arrays("kind", "old", zeros(1500))
    os.utime(cache_folder / "kind" / "old" / cache.CONTENTS, (0, 0))
    cache.cached_arrays("other", "newest", zeros(2000))
    assert sorted(path.name for path in cache_folder.glob("*/*")) == ["newest", "used"]
    assert not mapped["zeros"].any(), "who has mapped it keeps it"


def test_an_entry_above_the_limit_evicts_all_others(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDTOOL_CACHE_GB", "1e-6")
    cache.cached_arrays("kind", "small", zeros(100))
    assert len(cache.cached_arrays("kind", "large", zeros(5000))["zeros"]) == 5000
    assert [path.name for path in cache_folder.glob("*/*")] == ["large"]


def test_files_of_a_killed_writer_are_removed_after_a_day(cache_folder: Path) -> None:
    for name, age in (("young", 0), ("stale", 2 * cache.DAY)):
        partial = cache_folder / "kind" / f".{name}-x"
        partial.mkdir(parents=True)
        os.utime(partial, (time.time() - age,) * 2)
    cache.cached_arrays("kind", "name", fill_and_count([]))
    assert sorted(path.name for path in (cache_folder / "kind").iterdir()) == [".young-x", "name"]


def test_arrays_on_disk_returns_none_if_it_cannot_write(cache_folder: Path) -> None:
    cache_folder.write_text("a file stands where the folder should be")
    calls: list[int] = []
    assert cache.arrays_on_disk("kind", "name", fill_and_count(calls)) is None
    assert calls == []
