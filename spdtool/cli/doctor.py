"""The command `doctor`: what is installed, and which device and provider really work.

Each check runs something small instead of asking for claims: a matrix product on the device, and
one through each provider of onnxruntime.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from spdtool import console, plugins
from spdtool.cli.options import command
from spdtool.errors import DeviceError, SpdError

OLDEST_PYTHON = (3, 11)  # as in pyproject.toml
FREE_BYTES = 2 * 10**9  # a run with BERT_base writes about as much
COMPILERS = ("c++", "g++", "clang++", "cl")
PACKAGES = ("transformers", "accelerate", "datasets", "onnx", "onnxscript")
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One examined thing: its state, the finding, and what to do about it (empty: nothing)."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


@command
def doctor() -> object:
    """Say what is installed, and which device and provider really work."""
    checks = examine()
    for check in checks:
        status = f"[{COLOURS[check.status]}]{check.status:>4}[/]"
        console.say(f"{status}  [bold]{console.escape(check.name)}[/]  {console.escape(check.found)}")
        if check.advice:
            console.say(f"      [dim]{console.escape(check.advice)}[/]")
    records = [asdict(check) for check in checks]
    # Printed here: an exit leaves no value for the decorator to print.
    if any(check.status == "fail" for check in checks):
        console.print_result(records)
        raise typer.Exit(2)
    return records


def examine(folder: Path | None = None) -> list[Check]:
    """Run every check, in the order in which things are needed. Never raises; `fail`: spdtool cannot work here.

    Args:
        folder: its disk will hold the runs; None: the current one.
    """
    examinations: dict[str, Callable[[], Iterator[Check]]] = {
        # In the order of need: torch does not load in an old Python, nor transformers without torch.
        "Python": _check_python,
        "torch": _check_torch,
        "packages": _check_packages,
        "onnxruntime": _check_onnxruntime,
        "CUDA": _check_cuda,
        "processors": _check_processors,
        "free disk": lambda: _check_disk(folder or Path.cwd()),
        "cache": _check_cache,
        "C++ compiler": _check_compiler,
        "operator libraries": _check_libraries,
        "plugins": _check_plugins,
    }
    checks: list[Check] = []
    for name, examination in examinations.items():
        try:
            checks += list(examination())
        except Exception as error:  # a broken installation may raise anything, and this looks for one
            advice = "install spdtool into a fresh environment"
            checks.append(Check(name, "fail", f"{type(error).__name__}: {error}", advice))
    return checks


def _check_python() -> Iterator[Check]:
    if sys.version_info < OLDEST_PYTHON:
        yield Check("Python", "fail", platform.python_version(), "use 3.11 or newer")
    else:
        yield Check("Python", "ok", platform.python_version())


def _check_torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", torch.__version__)
    if torch.version.cuda is None:
        if shutil.which("nvidia-smi"):
            advice = "install a CUDA build of torch to train on it"
            yield Check(
                "training device",
                "warn",
                "cpu: there is a GPU, and this torch is built without CUDA",
                advice,
            )
        else:
            yield Check("training device", "ok", "cpu (this torch is built without CUDA)")
        return
    # torch only warns of a driver that is too old.
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        trouble = _try_cuda()
    remarks = [] if trouble is None else [trouble]
    remarks += [str(note.message).splitlines()[0] for note in notes]
    text = "; ".join(remarks)
    if trouble is not None:
        yield Check(
            "training device",
            "warn",
            f"cpu; CUDA does not work: {text}",
            "check the driver with nvidia-smi",
        )
    else:
        status: Literal["ok", "warn"] = "warn" if notes else "ok"
        yield Check("training device", status, f"cuda: {torch.cuda.get_device_name()} {text}".strip())


def _try_cuda() -> str | None:
    """Multiply two matrices on the device; return what went wrong."""
    import torch

    try:
        if not torch.cuda.is_available():
            return "no CUDA device answers"
        # Small whole numbers: every device computes them exactly.
        ones = torch.ones(8, 8, device="cuda")
        return None if bool((ones @ ones == 8).all()) else "a matrix product is wrong"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _check_packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", "pip install spdtool")


def _check_onnxruntime() -> Iterator[Check]:
    from spdtool.export import onnx_session

    try:
        module = onnx_session.require_onnxruntime()
    except DeviceError as error:
        yield Check("onnxruntime", "fail", error.message, error.hint or "")
        return
    versions = [f"{name} {version}" for name, version in onnx_session.installed_distributions().items()]
    yield Check("onnxruntime", "ok", " ".join(versions) or module.__version__)
    for name, provider in onnx_session.PROVIDERS.items():
        if provider not in module.get_available_providers():
            if name == "cpu":
                yield Check(
                    provider,
                    "fail",
                    "this onnxruntime does not have it",
                    'pip install "spdtool[cpu]"',
                )
            continue
        trouble = onnx_session.provider_problem(name)
        if trouble is None:
            yield Check(provider, "ok", "runs a small model")
        elif name == "cpu":
            yield Check(provider, "fail", trouble, 'pip install --force-reinstall "spdtool[cpu]"')
        else:
            advice = 'pip install "spdtool[gpu]" brings CUDA and cuDNN; exports run on the CPU meanwhile'
            yield Check(provider, "warn", f"listed, but does not run: {trouble}", advice)


def _check_cuda() -> Iterator[Check]:
    """Say where a GPU, torch and onnxruntime do not fit together; nothing where there is no GPU and no CUDA."""
    import torch

    from spdtool.export import onnx_session
    from spdtool.export.cuda_libraries import built_with_cuda

    try:
        module = onnx_session.require_onnxruntime()
    except DeviceError:  # the check before has said so
        return
    has_provider = onnx_session.PROVIDERS["cuda"] in module.get_available_providers()
    if not has_provider:
        if shutil.which("nvidia-smi") or (torch.version.cuda and torch.cuda.is_available()):
            text = "there is a GPU, and this onnxruntime computes on the CPU only: exports are checked and timed there"
            extra = _gpu_extra(torch.version.cuda)
            yield Check("onnxruntime on the GPU", "warn", text, f'pip uninstall onnxruntime; pip install "{extra}"')
        return
    major = built_with_cuda(module)
    if major is None:
        return
    torch_major = int((torch.version.cuda or "0").partition(".")[0])
    if torch_major and torch_major != major:
        text = f"torch is built with CUDA {torch.version.cuda}, onnxruntime with CUDA {module.cuda_version}"
        extra = _gpu_extra(torch.version.cuda)
        advice = f'pip install "{extra}" for torch\'s CUDA, or install a torch that is built with CUDA {major}'
        yield Check("CUDA versions", "warn", text, advice)
    elif torch_major:
        yield Check("CUDA versions", "ok", f"torch and onnxruntime are both built with CUDA {major}")
    yield _check_nvidia_libraries(major)


def _check_nvidia_libraries(cuda_major: int) -> Check:
    """Say which of NVIDIA's libraries a Python package or the system holds, and where."""
    import ctypes.util

    from spdtool.export.cuda_libraries import find_libraries, required_libraries

    files = find_libraries(cuda_major)
    missing = []
    for name in required_libraries(cuda_major):
        stem = name.removeprefix("lib").partition(".so")[0]
        if name not in files and ctypes.util.find_library(stem) is None:
            missing.append(name)
    folders = sorted({str(file.parents[2].parent) for file in files.values()})
    text = f"{len(files)} in {', '.join(folders)}" if files else "none in a Python package"
    if missing:
        return Check(
            "NVIDIA libraries",
            "warn",
            f"{text}; nowhere: {', '.join(missing)}",
            f'pip install "{_gpu_extra(str(cuda_major))}" brings them',
        )
    if len(files) < len(required_libraries(cuda_major)):
        text += "; the others are the system's"
    return Check("NVIDIA libraries", "ok", text)


def _gpu_extra(cuda: str | None) -> str:
    """The extra of spdtool whose onnxruntime is built with this CUDA."""
    major = (cuda or "").partition(".")[0]
    return "spdtool[gpu-cu12]" if major == "12" else "spdtool[gpu]"


def _check_processors() -> Iterator[Check]:
    import torch

    from spdtool.export import onnx_session

    cores, threads = onnx_session.usable_cores(), torch.get_num_threads()
    text = f"{cores} usable of {os.cpu_count()}; torch uses {threads}"
    if threads > cores:
        advice = f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
        yield Check("processors", "warn", text, advice)
    else:
        yield Check("processors", "ok", text)


def _check_disk(folder: Path) -> Iterator[Check]:
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        yield Check("free disk", "warn", f"{free / 1e9:.1f} GB", "a run can need 2 GB; free some")
    else:
        yield Check("free disk", "ok", f"{free / 1e9:.1f} GB")


def _check_cache() -> Iterator[Check]:
    from spdtool.data.cache import cache_folder, cache_size, size_limit

    count, size = cache_size()
    found = f"{console.format_bytes(size)} in {count} entries of {cache_folder()}; at most {size_limit() / 1e9:g} GB"
    yield Check("cache", "ok", found, "spdtool clean --cache empties it" if count else "")


def _check_compiler() -> Iterator[Check]:
    paths = [os.environ.get("CXX"), *map(shutil.which, COMPILERS)]  # torch.compile prefers CXX too
    installed = list(filter(None, paths))
    if installed:
        yield Check("C++ compiler", "ok", installed[0])
    else:
        yield Check(
            "C++ compiler",
            "warn",
            "none",
            "only --set compile=true needs one: install g++ or clang",
        )


def _check_libraries() -> Iterator[Check]:
    """Check the library of custom operators of every installed target that has one."""
    names = plugins.library_targets()
    if not names:
        advice = f"nothing skips zeros without one: {plugins.install_hint('NAME')}"
        yield Check("operator libraries", "warn", "no plugin with operators for sparse models", advice)
    for name in names:
        # The library only: its target would import torch, which may be what is broken.
        try:
            library = plugins.find_library(name)
            library.module.path()
            isa = library.module.isa() if hasattr(library.module, "isa") else "instruction set unknown"
        except SpdError as error:
            yield Check(name, "warn", error.message, error.hint or "install the plugin again")
        else:
            yield Check(name, "ok", f"{library.distribution} {library.version}, {isa}")


def _check_plugins() -> Iterator[Check]:
    plugins.discover()
    loaded = plugins.loaded_plugins()
    broken = [plugin for plugin in loaded if plugin.error]
    for plugin in broken:
        yield Check(
            f"plugin {plugin.name}",
            "warn",
            f"{plugin.error} ({plugin.where})",
            "mend or uninstall it",
        )
    if not broken:
        yield Check("plugins", "ok", f"{len(loaded)} loaded")
