"""Freed memory is kept where the C library can be told so, and left alone where somebody has said otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from spdtool import memory

FAULTS = """
import resource, sys
from spdtool import memory
if sys.argv[1] == "kept":
    assert memory.keep_freed()
def spend():
    bytearray(2**24)  # 16 MB, made and freed
spend()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    spend()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_pages_of_freed_memory_are_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONMALLOC", "malloc")

    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)

    assert faults("kept") < faults("as it comes") / 10


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_has_precedence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert memory.keep_freed() is False
