"""Which tests `make quick` leaves out."""

from __future__ import annotations

from pathlib import Path

from tests.list_slow_tests import SLOW_SECONDS, SLOW_TESTS, list_slow_tests


def test_one_slow_case_or_fixture_leaves_the_whole_test_out() -> None:
    fast, half, slow = 0.4 * SLOW_SECONDS, 0.6 * SLOW_SECONDS, 2 * SLOW_SECONDS
    lines = [
        f"{fast}s call     tests/test_a.py::test_fast",
        f"{half}s setup    tests/test_a.py::test_fixture",
        f"{half}s call     tests/test_a.py::test_fixture",
        f"{fast}s call     tests/test_b.py::TestC::test_cases[one]",
        f"{slow}s call     tests/test_b.py::TestC::test_cases[two words]",
        f"{slow}s teardown tests/test_a.py::test_teardown",
        "12 passed in 3.00s",
    ]
    assert list_slow_tests(lines) == ["tests/test_a.py::test_fixture", "tests/test_b.py::TestC::test_cases"]


def test_every_test_of_the_list_exists() -> None:
    root = Path(__file__).parents[1]
    for test in SLOW_TESTS.read_text("utf-8").split():
        file, *_, name = test.split("::")
        assert f"def {name}(" in (root / file).read_text("utf-8"), f"{test} is gone: change slow_tests.txt"
