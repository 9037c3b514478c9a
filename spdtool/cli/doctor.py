"""`spdtool doctor`: what is installed, and which device and provider really work.

Each check runs something small rather than asking what is claimed: a matrix product on the device, and one through
each provider of onnxruntime.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from spdtool import plugins
from spdtool.errors import DeviceError, SpdError
from spdtool.export import runtime

OLDEST_PYTHON = (3, 11)
FREE_BYTES = 2 * 10**9  # a run with BERT_base writes about as much
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its state, what was found, and what to do about it (empty: nothing)."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(folder: Path | None = None) -> list[Check]:
    """Every check, in the order in which things are needed. Never raises; a `fail` means that spdtool cannot work here.

    Args:
        folder: whose disk will hold the runs; None: the current one.
    """
    place = folder or Path.cwd()
    checks: dict[str, Callable[[], Iterator[Check]]] = {
        "Python": _python,
        "torch": _torch,
        "packages": _packages,
        "onnxruntime": _onnxruntime,
        "processors": _processors,
        "free disk": lambda: _disk(place),
        "C++ compiler": _compiler,
        "operator libraries": _operator_libraries,
        "plugins": _plugins,
    }
    return [found for name, check in checks.items() for found in _survive(name, check)]


def _survive(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(check())
    except Exception as error:  # a broken installation may raise anything, and that is what is looked for
        return [Check(name, "fail", f"{type(error).__name__}: {error}", "install spdtool into a fresh environment")]


def _python() -> Iterator[Check]:
    old = sys.version_info < OLDEST_PYTHON
    yield Check("Python", "fail" if old else "ok", platform.python_version(), "use 3.11 or newer" if old else "")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", torch.__version__)
    if torch.version.cuda is None:
        if shutil.which("nvidia-smi"):
            advice = "install a CUDA build of torch to train on it"
            yield Check("training device", "warn", "cpu: there is a GPU, and this torch is built without CUDA", advice)
        else:
            yield Check("training device", "ok", "cpu (this torch is built without CUDA)")
        return
    with warnings.catch_warnings(record=True) as notes:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        trouble = _cuda_trouble()
    said = "; ".join([*([trouble] if trouble else []), *(str(note.message).splitlines()[0] for note in notes)])
    if trouble:
        yield Check("training device", "warn", f"cpu; CUDA does not work: {said}", "check the driver with nvidia-smi")
    else:
        yield Check(
            "training device", "warn" if notes else "ok", f"cuda: {torch.cuda.get_device_name()} {said}".strip()
        )


def _cuda_trouble() -> str | None:
    import torch

    try:
        if not torch.cuda.is_available():
            return "no CUDA device answers"
        ones = torch.ones(8, 8, device="cuda")
        return None if bool((ones @ ones == 8).all()) else "a matrix product is wrong"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _packages() -> Iterator[Check]:
    for name in ("transformers", "accelerate", "datasets", "onnx", "onnxscript"):
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", "pip install spdtool")


def _onnxruntime() -> Iterator[Check]:
    try:
        module = runtime.require_onnxruntime()
    except DeviceError as error:
        yield Check("onnxruntime", "fail", error.message, error.hint or "")
        return
    found = (
        " ".join(f"{name} {version}" for name, version in runtime.installed_distributions().items())
        or module.__version__
    )
    yield Check("onnxruntime", "ok", found)
    for name, provider in runtime.PROVIDERS.items():
        if provider not in module.get_available_providers():
            if name == "cpu":
                yield Check(provider, "fail", "this onnxruntime does not have it", 'pip install "spdtool[cpu]"')
            continue
        trouble = runtime.provider_problem(name)
        if trouble is None:
            yield Check(provider, "ok", "runs a small model")
        elif name == "cpu":
            yield Check(provider, "fail", trouble, 'pip install --force-reinstall "spdtool[cpu]"')
        else:
            advice = 'pip install "spdtool[gpu]" brings CUDA and cuDNN; exports run on the CPU meanwhile'
            yield Check(provider, "warn", f"listed, but does not run: {trouble}", advice)


def _processors() -> Iterator[Check]:
    import torch

    cores, threads = runtime.usable_cores(), torch.get_num_threads()
    many = threads > cores
    advice = f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down" if many else ""
    yield Check(
        "processors", "warn" if many else "ok", f"{cores} usable of {os.cpu_count()}; torch uses {threads}", advice
    )


def _disk(folder: Path) -> Iterator[Check]:
    free = shutil.disk_usage(folder).free
    little = free < FREE_BYTES
    yield Check(
        "free disk",
        "warn" if little else "ok",
        f"{free / 1e9:.1f} GB",
        "a run can need 2 GB; free some" if little else "",
    )


def _compiler() -> Iterator[Check]:
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found:
        yield Check("C++ compiler", "ok", found)
    else:
        yield Check("C++ compiler", "warn", "none", "only --set compile=true needs one: install g++ or clang")


def _operator_libraries() -> Iterator[Check]:
    names = plugins.library_targets()
    if not names:
        advice = f"nothing skips zeros without one: {plugins.INSTALL_HINT}"
        yield Check("operator libraries", "warn", "no plugin with operators for sparse models", advice)
    for name in names:
        try:
            library = plugins.find_library(name)
            library.module.path()
            isa = library.module.isa() if hasattr(library.module, "isa") else "instruction set unknown"
        except SpdError as error:
            yield Check(name, "warn", error.message, error.hint or "install the plugin again")
        else:
            yield Check(name, "ok", f"{library.distribution} {library.version}, {isa}")


def _plugins() -> Iterator[Check]:
    plugins.discover()
    broken = [plugin for plugin in plugins.loaded_plugins() if plugin.error]
    for plugin in broken:
        yield Check(f"plugin {plugin.name}", "warn", f"{plugin.error} ({plugin.where})", "mend or uninstall it")
    if not broken:
        yield Check("plugins", "ok", f"{len(plugins.loaded_plugins())} loaded")
