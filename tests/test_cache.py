"""The cache: made once, mapped afterwards, made again when damaged, and safe between processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spdtool import cache


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
        found = cache.arrays("kind", "name", counting(made))
        check(found)
        assert isinstance(found["numbers"], np.memmap)
        assert not found["numbers"].flags.writeable
    assert len(made) == 1
    assert [path.name for path in (home / "kind").iterdir()] == ["name"], "nothing is left beside it"


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no contents", "half contents"])
def test_a_damaged_entry_is_made_again(home: Path, damage: str) -> None:
    made: list[int] = []
    cache.arrays("kind", "name", counting(made))
    entry = home / "kind" / "name"
    content = (entry / "numbers").read_bytes()
    if damage == "cut":
        (entry / "numbers").write_bytes(content[:-1])
    elif damage == "flipped":
        (entry / "numbers").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "missing":
        (entry / "pairs").unlink()
    elif damage == "no contents":
        (entry / "contents.json").unlink()
    else:
        (entry / "contents.json").write_text((entry / "contents.json").read_text()[:-9])
    for _ in range(2):
        check(cache.arrays("kind", "name", counting(made)))
    assert len(made) == 2


def test_what_fails_half_way_leaves_nothing(home: Path) -> None:
    def fill(append: cache.Append) -> None:
        append("numbers", np.arange(3))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.arrays("kind", "name", fill)
    assert list((home / "kind").iterdir()) == []


def test_without_a_place_to_write_the_arrays_stay_in_memory(home: Path) -> None:
    home.write_text("a file stands where the folder should be")
    made: list[int] = []
    for _ in range(2):
        check(cache.arrays("kind", "name", counting(made)))
    assert len(made) == 2


def in_a_process(_: int) -> int:
    made: list[int] = []
    check(cache.arrays("kind", "name", counting(made)))
    return len(made)


def test_several_writers_at_once_leave_one_whole_entry(home: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.map(in_a_process, range(16), chunksize=1)) >= 1
    assert [path.name for path in (home / "kind").iterdir()] == ["name"]
    made: list[int] = []
    check(cache.arrays("kind", "name", counting(made)))
    assert made == []
