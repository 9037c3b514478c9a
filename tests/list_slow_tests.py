"""Write tests/slow_tests.txt, the tests that `make quick` leaves out, from the durations of a whole run.

make test PYTEST_ARGS=--durations=0 | .venv/bin/python tests/list_slow_tests.py
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
SLOW_SECONDS = 0.2  # the others take a minute and a half on two cores
DURATION = re.compile(r"([\d.]+)s (call|setup)\s+(\S+?)(\[.*)?$")  # without parameters: one slow case marks them all


def list_slow_tests(lines: Iterable[str]) -> list[str]:
    """Return the tests, `path::function`, of which a case took longer than `SLOW_SECONDS` with its fixtures.

    Args:
        lines: output of pytest with --durations=0.
    """
    longest: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in lines:
        match = DURATION.match(line)
        if match is not None:
            seconds, phase, test, _ = match.groups()
            longest[test][phase] = max(longest[test][phase], float(seconds))
    return sorted(test for test, phases in longest.items() if sum(phases.values()) > SLOW_SECONDS)


if __name__ == "__main__":
    SLOW_TESTS.write_text("\n".join(list_slow_tests(sys.stdin)) + "\n", "utf-8")
