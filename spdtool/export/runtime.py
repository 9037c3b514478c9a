"""onnxruntime: whether it is there, and which provider really runs.

Two traps are handled here and nowhere else. The distributions `onnxruntime` and `onnxruntime-gpu` hold the same files,
so that installing both breaks whichever is removed first. And a build with CUDA whose libraries do not load lists the
CUDA provider, opens a session without complaint, and runs it on the CPU.

Nothing here imports torch: the processes that `spdtool bench` times must not carry it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from spdtool.errors import DeviceError, ModelError, first_line

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}  # float32 means float32
NO_FALLBACK = "session.disable_cpu_ep_fallback"
# What must run where it was asked to; a CUDA session computes shapes and masks on the CPU, mostly on purpose.
ARITHMETIC = {
    "Attention", "BiasGelu", "Erf", "FusedGemm", "FusedMatMul", "Gelu", "Gemm", "LayerNormalization", "MatMul",
    "MultiHeadAttention", "SkipLayerNormalization", "Softmax", "Tanh",
}  # fmt: skip
DOMAINS = {"spdtool": "spdtool-sparse-cpu"}  # of custom operators, and the plugin that brings their library
STANDARD_DOMAINS = ("", "ai.onnx", "com.microsoft")
UNREGISTERED = re.compile(r"(?P<domain>[\w.]*):(?P<name>\w+)\(-?\d+\) is not a registered function/op")
FATAL = 4  # of onnxruntime's own log, which would go to the terminal; what goes wrong is raised instead


def installed() -> dict[str, str]:
    """Version by name of the onnxruntime distributions that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def require() -> Any:
    """The module `onnxruntime`.

    Raises:
        DeviceError: it is missing or broken, or both distributions are installed.
    """
    found = installed()
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        raise DeviceError(
            f"{both} are both installed: each overwrites the other's files",
            f'pip uninstall {" ".join(found)}, then pip install "spdtool[cpu]" or "spdtool[gpu]"',
        )
    hint = 'pip install "spdtool[cpu]", or "spdtool[gpu]" for CUDA'
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(f"onnxruntime cannot be imported: {error}", hint) from None
    if not hasattr(module, "InferenceSession"):  # what is left when the other distribution was uninstalled
        raise DeviceError("onnxruntime is installed, but files of it are missing", f"uninstall it, then {hint}")
    return module


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int = 0,
    libraries: Sequence[str | Path] = (),
    *,
    fused: bool = True,
) -> Any:
    """An onnxruntime session that really runs on `provider`.

    Args:
        model: the file, or its bytes.
        provider: `cpu` or `cuda`.
        threads: of one operator; 0: as many as there are cores.
        libraries: shared libraries of custom operators that the model needs. They are native code and are run.
        fused: with every optimisation of the graph; else only with those that fuse nothing.

    Raises:
        DeviceError: onnxruntime or the provider is not there, or the provider does not run the model.
        ModelError: the model or a library cannot be opened, or the model needs operators that no library gives.
    """
    runtime = require()
    if provider not in PROVIDERS:
        raise DeviceError(f"there is no provider {provider!r}", f"known: {', '.join(PROVIDERS)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise DeviceError(f"threads = {threads!r}", "a number of threads, or 0 for as many as there are cores")
    wanted = PROVIDERS[provider]
    if wanted not in runtime.get_available_providers():
        raise DeviceError(
            f"this onnxruntime has no {wanted}; it has {', '.join(runtime.get_available_providers())}",
            'pip uninstall onnxruntime, then pip install "spdtool[gpu]"',
        )
    if provider == "cpu":
        return _open(runtime, model, provider, threads, libraries, fused=fused, strict=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        runtime.preload_dlls()
    try:
        session = _open(runtime, model, provider, threads, libraries, fused=fused, strict=True)
    except ModelError as error:
        if "fallback to CPU EP" not in error.message:
            raise
        session = _open(runtime, model, provider, threads, libraries, fused=fused, strict=False)
    _refuse_fallback(session, wanted)
    return session


def placement(session: Any) -> dict[str, dict[str, int]] | None:
    """Provider to operator to number of nodes, as onnxruntime assigned them; None where it does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return None
    counts: dict[str, Counter[str]] = {}
    for part in tell():
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return {name: dict(sorted(ops.items())) for name, ops in sorted(counts.items())}


def trouble(provider: str) -> str | None:
    """Why `provider` does not really run a small model; None: it does.

    Raises:
        DeviceError: onnxruntime itself is not usable.
    """
    require()
    try:
        session = open_session(small_model(), provider, threads=1)
        value = np.arange(4, dtype=np.float32).reshape(2, 2)
        right = np.array_equal(session.run(None, {"x": value})[0], value @ value)
    except (DeviceError, ModelError) as error:
        return error.message
    return None if right else f"{PROVIDERS[provider]} computes a wrong product"


def working(device: str) -> list[str]:
    """The providers to use for a recipe's `device`, the fastest last.

    Raises:
        DeviceError: `cuda` is demanded and does not really run.
    """
    if device == "cpu":
        return ["cpu"]
    found = trouble("cuda")
    if found is None:
        return ["cpu", "cuda"]
    if device == "cuda":
        raise DeviceError(
            f"CUDA was demanded, and onnxruntime does not run on it: {found}", "`spdtool doctor` says what is missing"
        )
    return ["cpu"]


def small_model() -> bytes:
    """A model of one matrix product, float32 [2, 2], to see whether a provider works."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"], name="product")], "small", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _open(
    runtime: Any,
    model: Path | bytes,
    provider: str,
    threads: int,
    libraries: Sequence[str | Path],
    *,
    fused: bool,
    strict: bool,
) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    if not fused:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if strict:
        options.add_session_config_entry(NO_FALLBACK, "1")
    _register(options, libraries)
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = runtime.InferenceSession(
            source, options, providers=[(PROVIDERS[provider], OPTIONS[provider])], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's errors share no base of their own
        shown = "the model" if isinstance(model, bytes) else str(model)
        raise _unopened(shown, first_line(error)) from None
    session.disable_fallback()
    return session


def _register(options: Any, libraries: Sequence[str | Path]) -> None:
    for library in libraries:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # as above
            raise ModelError(
                f"onnxruntime cannot load the operators in {library}: {first_line(error)}",
                "it must be built for this machine and for this onnxruntime; install its plugin again",
            ) from None


def _unopened(shown: str, reason: str) -> ModelError:
    unknown = UNREGISTERED.search(reason)
    if unknown is None or unknown["domain"] in STANDARD_DOMAINS:
        return ModelError(f"onnxruntime cannot open {shown}: {reason}")
    plugin = DOMAINS.get(unknown["domain"])
    return ModelError(
        f"{shown} needs the operator {unknown['name']} of the domain {unknown['domain']!r}, which is not registered",
        f"it comes with the plugin {plugin}; spdtool.load and spdtool export find it by manifest.json"
        if plugin
        else "give the library that holds it",
    )


def _refuse_fallback(session: Any, wanted: str) -> None:
    hint = "`spdtool doctor` says what is missing"
    if session.get_providers()[0] != wanted:
        raise DeviceError(f"onnxruntime ran {session.get_providers()[0]} when {wanted} was asked for", hint)
    where = placement(session)
    if where is None:
        raise DeviceError("this onnxruntime does not tell which provider runs a node", "upgrade onnxruntime-gpu")
    astray = {op for name, ops in where.items() if name != wanted for op in ops if op in ARITHMETIC}
    if astray or not where.get(wanted):
        raise DeviceError(f"onnxruntime left {', '.join(sorted(astray)) or 'every node'} to the CPU", hint)
