"""Find the compiled library of custom operators, and check that it belongs to these Python files.

It is installed beside this file. An editable install keeps it in another folder, which is in the
package's `__path__`. Nothing here needs more than the standard library: `spdtool.load` and timed
processes use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from importlib import metadata
from pathlib import Path

import spdtool_sparse_cpu
from spdtool.errors import DeviceError

DISTRIBUTION = "spdtool-sparse-cpu"
DOMAIN = "spdtool"
DOMAINS = (DOMAIN,)  # read by spdtool, to name this plugin where an operator is unknown
SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
FILE = "libspdtool_sparse_cpu" + SUFFIXES.get(sys.platform, ".so")
REINSTALL = f"pip install --force-reinstall {DISTRIBUTION}"


def path() -> Path:
    """Find the library, for onnxruntime's `register_custom_ops_library`.

    Raises:
        DeviceError: it is missing, cannot be loaded on this machine, or is of another version than
            this distribution.
    """
    file = _find_file()
    file_version, installed_version = _call(file, "spdtool_sparse_cpu_version"), version()
    if file_version != installed_version:
        raise DeviceError(
            f"{file} is of version {file_version}; {DISTRIBUTION} {installed_version} is installed", REINSTALL
        )
    return file


def version() -> str:
    """Return the version of the installed distribution.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise DeviceError(f"{DISTRIBUTION} is not installed", f"pip install {DISTRIBUTION}") from None


def isa() -> str:
    """Name the instruction set that the library uses on this machine: `avx512`, `avx2`, `neon` or `baseline`.

    Raises:
        DeviceError: as `path` does.
    """
    return _call(path(), "spdtool_sparse_cpu_isa")


def int8_isa() -> str:
    """Name the instruction set of products in 8 bits: `avx512_vnni`, `avx_vnni`, or one of `isa`.

    Raises:
        DeviceError: as `path` does.
    """
    return _call(path(), "spdtool_sparse_cpu_int8_isa")


def load_library() -> ctypes.CDLL:
    """Load the library, for calls through ctypes.

    Raises:
        DeviceError: as `path` does.
    """
    return _open(path())


def _find_file() -> Path:
    # An editable install has more than one folder.
    folders = [Path(folder) for folder in spdtool_sparse_cpu.__path__]
    candidates = [folder / FILE for folder in folders]
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(DISTRIBUTION) or []:  # what the distribution's installer wrote
            if file.name == FILE:
                candidates.append(Path(str(file.locate())))
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise DeviceError(
        f"the compiled library {FILE} is not in {' or '.join(map(str, folders))}",
        f"{REINSTALL}; from source it needs a C++ compiler and CMake",
    )


@functools.cache
def _open(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise DeviceError(f"{file} cannot be loaded: {error}", f"{REINSTALL}, on this machine") from None


def _call(file: Path, name: str) -> str:
    """Call the library's function `name`, which takes nothing and returns a text."""
    function = getattr(_open(file), name, None)
    if function is None:
        raise DeviceError(f"{file} has no {name}: it is no library of {DISTRIBUTION}, or an old one", REINSTALL)
    function.restype, function.argtypes = ctypes.c_char_p, []  # ctypes takes every result for an int
    return bytes(function()).decode()
