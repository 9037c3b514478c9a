"""The cache: made once, mapped afterwards, made again when damaged, and safe between processes."""

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
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spdtool"


def counting(made: list[int]) -> Callable[[cache.Append], None]:
    def fill(append: cache.Append) -> None:
        made.append(1)
        for start in (0, 3):
            append("numbers", np.arange(start, start + 3))
            append("pairs", np.full((1, 2), start, np.float32))
        append("nothing", np.empty((0, 4), np.int32))

    return fill


def check(found: cache.Arrays) -> None:
    assert found["numbers"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["pairs"].tolist() == [[0, 0], [3, 3]]
    assert found["nothing"].shape == (0, 4)


def test_an_entry_is_made_once_and_then_mapped(home: Path) -> None:
    made: list[int] = []
    for _ in range(3):
        found = cache.cached_arrays("kind", "name", counting(made))
        check(found)
        assert isinstance(found["numbers"], np.memmap)
        assert not found["numbers"].flags.writeable
    assert len(made) == 1
    assert [path.name for path in (home / "kind").iterdir()] == ["name"], "nothing is left beside it"


def test_a_damaged_entry_is_computed_again(home: Path) -> None:
    calls: list[int] = []
    cache.cached_arrays("kind", "name", counting(calls))
    entry = home / "kind" / "name"
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
        "another entry was copied over it": lambda: (shutil.rmtree(entry), shutil.copytree(other, entry)),
    }
    cache.cached_arrays("kind", "other", counting(calls))
    other = home / "kind" / "other"
    for damage, apply in damages.items():
        apply()
        cache._verified.clear()  # as in a new process
        calls.clear()
        for _ in range(2):
            check(cache.cached_arrays("kind", "name", counting(calls)))
        assert len(calls) == 1, damage


def test_what_fails_half_way_leaves_nothing(home: Path) -> None:
    def fill(append: cache.Append) -> None:
        append("numbers", np.arange(3))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.cached_arrays("kind", "name", fill)
    assert list((home / "kind").iterdir()) == []


def test_without_a_place_to_write_the_arrays_stay_in_memory(home: Path) -> None:
    home.write_text("a file stands where the folder should be")
    made: list[int] = []
    for _ in range(2):
        check(cache.cached_arrays("kind", "name", counting(made)))
    assert len(made) == 2


def in_a_process(_: int) -> int:
    made: list[int] = []
    check(cache.cached_arrays("kind", "name", counting(made)))
    return len(made)


def test_several_writers_at_once_leave_one_whole_entry(home: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.map(in_a_process, range(16), chunksize=1)) >= 1
    assert [path.name for path in (home / "kind").iterdir()] == ["name"]
    made: list[int] = []
    check(cache.cached_arrays("kind", "name", counting(made)))
    assert made == []


def test_a_lost_bit_is_found_by_the_next_process_whatever_the_time_stamp_says(home: Path) -> None:
    calls: list[int] = []
    cache.cached_arrays("kind", "name", counting(calls))
    numbers = home / "kind" / "name" / "numbers"
    status, content = numbers.stat(), bytearray(numbers.read_bytes())
    content[len(content) // 2] ^= 0x40
    numbers.write_bytes(content)
    os.utime(numbers, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache._verified.clear()
    calls.clear()
    check(cache.cached_arrays("kind", "name", counting(calls)))
    assert len(calls) == 1


def test_each_file_is_read_once_in_a_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[Path]()
    compute_crc32 = cache.compute_crc32

    def recording(file: Path) -> int:
        read.append(file)
        return compute_crc32(file)

    monkeypatch.setattr(cache, "compute_crc32", recording)
    for _ in range(3):
        cache.cached_arrays("kind", "name", counting([]))
    assert sorted(file.name for file in read) == ["nothing", "numbers", "pairs"]
    numbers = home / "kind" / "name" / "numbers"
    os.utime(numbers)  # a copy of the folder, or somebody who wrote to it
    check(cache.cached_arrays("kind", "name", counting([])))
    assert read[3:] == [numbers]


def test_an_entry_is_flushed_before_it_gets_its_name(home: Path, tmp_path: Path, power: Any) -> None:
    (home / "kind").mkdir(parents=True)
    with power.recording(home) as cuts:
        cache.cached_arrays("kind", "name", counting([]))
    calls: list[int] = []
    for number, state in enumerate(cuts.states.values()):
        cut = tmp_path / str(number)
        cut.mkdir()
        power.write_state(state, cut / "spdtool")
        os.environ["XDG_CACHE_HOME"] = str(cut)  # the fixture puts it back
        is_there = (cut / "spdtool/kind/name").exists()
        calls.clear()
        check(cache.cached_arrays("kind", "name", counting(calls)))
        assert len(calls) == (not is_there), "what has the name is whole"
    assert is_there


def test_hashes_are_those_of_the_arrays_wherever_they_are(home: Path) -> None:
    kept, held = cache.cached_arrays("kind", "name", counting([])), cache.arrays_in_memory(counting([]))
    assert kept.hashes == held.hashes == {name: cache.hash_array(array) for name, array in held.items()}


def zeros(count: int) -> Callable[[cache.Append], None]:
    return lambda append: append("zeros", np.zeros(count, np.uint8))


def test_what_was_not_used_for_longest_gives_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDTOOL_CACHE_GB", "5e-6")
    for age, name in enumerate(["new", "used", "old"]):
        cache.cached_arrays("kind", name, zeros(1500))
        os.utime(home / "kind" / name / cache.CONTENTS, (0, 1000 - age))
    cache.cached_arrays("kind", "used", zeros(1500))
    mapped = cache.cached_arrays("kind", "old", zeros(1500))
    os.utime(home / "kind" / "old" / cache.CONTENTS, (0, 0))
    cache.cached_arrays("other", "newest", zeros(2000))
    assert sorted(path.name for path in home.glob("*/*")) == ["newest", "used"]
    assert not mapped["zeros"].any(), "who has mapped it keeps it"


def test_an_entry_larger_than_all_may_be_is_kept_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDTOOL_CACHE_GB", "1e-6")
    cache.cached_arrays("kind", "small", zeros(100))
    assert len(cache.cached_arrays("kind", "large", zeros(5000))["zeros"]) == 5000
    assert [path.name for path in home.glob("*/*")] == ["large"]


def test_what_a_killed_writer_left_goes_after_a_day(home: Path) -> None:
    for name, age in (("young", 0), ("stale", 2 * cache.DAY)):
        left = home / "kind" / f".{name}-x"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    cache.cached_arrays("kind", "name", counting([]))
    assert sorted(path.name for path in (home / "kind").iterdir()) == [".young-x", "name"]


def test_without_room_the_large_are_not_kept_in_memory(home: Path) -> None:
    home.write_text("a file stands where the folder should be")
    made: list[int] = []
    assert cache.arrays_on_disk("kind", "name", counting(made)) is None
    assert made == []
