"""The compiled library of custom operators: where it lies, and whether it is the one that belongs to these files.

It is installed beside this file. An editable install keeps it in another folder, which Python knows as a further place
of the package. Nothing here needs more than the standard library: `spdtool.load` and timed processes use it.
"""

from __future__ import annotations

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
AGAIN = f"pip install --force-reinstall {DISTRIBUTION}"
TEXTS = ("spdtool_sparse_cpu_version", "spdtool_sparse_cpu_isa")  # functions of the library that return a text


def path() -> Path:
    """The library, for onnxruntime's `register_custom_ops_library`.

    Raises:
        DeviceError: it is missing, cannot be loaded on this machine, or is of another version than this distribution.
    """
    file = _find()
    found, wanted = _text(file, TEXTS[0]), version()
    if found != wanted:
        raise DeviceError(f"{file} is of version {found}; {DISTRIBUTION} {wanted} is installed", AGAIN)
    return file


def version() -> str:
    """The version of the installed distribution.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise DeviceError(f"{DISTRIBUTION} is not installed", f"pip install {DISTRIBUTION}") from None


def isa() -> str:
    """The instruction set that the library uses on this machine: `avx512`, `avx2`, `neon` or `baseline`.

    Raises:
        DeviceError: as `path` does.
    """
    return _text(path(), TEXTS[1])


def opened() -> ctypes.CDLL:
    """The library, for calls through ctypes.

    Raises:
        DeviceError: as `path` does.
    """
    return _open(path())


def _find() -> Path:
    places = [Path(place) for place in spdtool_sparse_cpu.__path__]
    recorded = [Path(str(file.locate())) for file in _recorded() if file.name == FILE]
    for file in (*(place / FILE for place in places), *recorded):
        if file.is_file():
            return file.resolve()
    raise DeviceError(
        f"the compiled library {FILE} is not in {' or '.join(map(str, places))}",
        f"{AGAIN}; from source it needs a C++ compiler and CMake",
    )


def _recorded() -> list[metadata.PackagePath]:
    """The files that the distribution's installer wrote."""
    try:
        return metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


@functools.cache
def _open(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise DeviceError(f"{file} cannot be loaded: {error}", f"{AGAIN}, on this machine") from None


def _text(file: Path, name: str) -> str:
    """What the library's function `name` says."""
    function = getattr(_open(file), name, None)
    if function is None:
        raise DeviceError(f"{file} has no {name}: it is no library of {DISTRIBUTION}, or an old one", AGAIN)
    function.restype, function.argtypes = ctypes.c_char_p, []
    return bytes(function()).decode()
