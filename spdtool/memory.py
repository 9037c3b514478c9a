"""The C library's malloc, told to keep what training on a CPU frees, instead of giving it back to the system.

The tensors of a step come and go by the megabyte. glibc takes each large one from the system and returns it, and every
page of it is made anew, filled with zeros, in the next step.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST = 2**30  # bytes; what is larger than any tensor of a step is still mapped by itself
RESERVE = 2**26


def keep_freed() -> bool:
    """Let malloc keep freed memory from now on; whether it does. What the environment says of malloc has precedence."""
    said = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if said or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: RESERVE}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
