"""NVIDIA's libraries from Python packages, which onnxruntime's CUDA provider needs, in every site-packages.

onnxruntime looks beside itself only. In an environment that sees the packages of another one
(`--system-site-packages`, a user's own folder), the libraries may be elsewhere: where torch brought
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from pathlib import Path
from typing import Any

CUFFT_BEHIND = 1  # the major version of cuFFT is one behind that of CUDA
CURAND_MAJOR, CUDNN_MAJOR = 10, 9  # of CUDA 12 and 13


def required_libraries(cuda_major: int) -> tuple[str, ...]:
    """File names of the libraries, in the order in which they must be loaded."""
    return (
        f"libcudart.so.{cuda_major}",
        f"libcublasLt.so.{cuda_major}",  # before libcublas, which needs it
        f"libcublas.so.{cuda_major}",
        f"libnvrtc.so.{cuda_major}",
        f"libcurand.so.{CURAND_MAJOR}",
        f"libcufft.so.{cuda_major - CUFFT_BEHIND}",
        f"libcudnn.so.{CUDNN_MAJOR}",
    )


def built_with_cuda(onnxruntime: Any) -> int | None:
    """Major version of the CUDA that onnxruntime was built with; None: it is a build for the CPU."""
    version = str(getattr(onnxruntime, "cuda_version", "") or "")
    major = version.partition(".")[0]
    return int(major) if major.isdigit() else None


def find_libraries(cuda_major: int) -> dict[str, Path]:
    """Map the file name of each library that a Python package holds to its file; the first on the path wins."""
    files: dict[str, Path] = {}
    for name in required_libraries(cuda_major):
        for entry in sys.path:
            folder = Path(entry or ".") / "nvidia"
            # from CUDA 13 on most are in one folder, cu13; before, each component has one
            candidates = sorted(folder.glob(f"*/lib/{name}"))
            if candidates:
                files[name] = candidates[0]
                break
    return files


def preload_libraries(onnxruntime: Any) -> None:
    """Load what onnxruntime's CUDA provider needs; what is not there is left to the system's own search."""
    major = built_with_cuda(onnxruntime)
    if major is not None and sys.platform == "linux":
        for file in find_libraries(major).values():
            with contextlib.suppress(OSError):  # onnxruntime says what its provider lacks
                ctypes.CDLL(str(file))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
