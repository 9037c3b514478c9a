"""Open ONNX files with onnxruntime, on a provider that really runs them.

Two traps are handled here and nowhere else. The distributions `onnxruntime` and `onnxruntime-gpu`
install the same files, so that installing both breaks whichever is removed first. And a build with
CUDA whose libraries do not load lists the CUDA provider, opens a session without complaint, and
runs it on the CPU.

Nothing here imports torch: the processes that `spdtool bench` times must not carry it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool import plugins
from spdtool.errors import DeviceError, ModelError, SpdError, first_line
from spdtool.export.cuda_libraries import preload_libraries

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}  # float32 means float32
NO_FALLBACK = "session.disable_cpu_ep_fallback"
# Operators that must run where they were asked to. A CUDA session computes shapes and masks on the
# CPU, mostly on purpose.
ARITHMETIC = {
    "Attention", "BiasGelu", "Erf", "FusedGemm", "FusedMatMul", "Gelu", "Gemm", "LayerNormalization", "MatMul",
    "MultiHeadAttention", "PackedAttention", "SkipLayerNormalization", "Softmax", "Tanh",
}  # fmt: skip
STANDARD_DOMAINS = ("", "ai.onnx", "com.microsoft")
UNREGISTERED = re.compile(r"(?P<domain>[\w.]*):(?P<name>\w+)\(-?\d+\) is not a registered function/op")
FATAL_ONLY = 4  # log level of onnxruntime, whose log would go to the terminal; what goes wrong is raised instead
SAY_WHAT_IS_MISSING = "`spdtool doctor` says what is missing"


def installed_distributions() -> dict[str, str]:
    """Map the name of each installed onnxruntime distribution to its version."""
    versions = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def require_onnxruntime() -> Any:
    """Import and return the module `onnxruntime`.

    Raises:
        DeviceError: it is missing or broken, or both distributions are installed.
    """
    versions = installed_distributions()
    if len(versions) > 1:
        both = " and ".join(f"{name} {version}" for name, version in versions.items())
        raise DeviceError(
            f"{both} are both installed: each overwrites the other's files",
            f'pip uninstall {" ".join(versions)}, then pip install "spdtool[cpu]" or "spdtool[gpu]"',
        )
    hint = 'pip install "spdtool[cpu]", or "spdtool[gpu]" for CUDA'
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(f"onnxruntime cannot be imported: {error}", hint) from None
    if not hasattr(module, "InferenceSession"):  # what remains when the other distribution was uninstalled
        raise DeviceError("onnxruntime is installed, but files of it are missing", f"uninstall it, then {hint}")
    return module


def usable_cores() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    threads: int = 0,
    libraries: Sequence[str | Path] = (),
    *,
    fused: bool = True,
    provider_options: Mapping[str, str] | None = None,
) -> InferenceSession:
    """Open an onnxruntime session that really runs on `provider`.

    Args:
        model: the file, or its bytes.
        provider: `cpu` or `cuda`.
        threads: threads of one operator; 0: as many as there are cores.
        libraries: shared libraries of custom operators that the model needs. They are native code
            and are run.
        fused: with every optimization of the graph; else only with those that fuse nothing.
        provider_options: further options of the provider, such as `enable_cuda_graph`.

    Raises:
        DeviceError: onnxruntime or the provider is not there, or the provider does not run the
            model.
        ModelError: the model or a library cannot be opened, or the model needs operators that no
            library gives.
    """
    onnxruntime = require_onnxruntime()
    if provider not in PROVIDERS:
        raise DeviceError(f"there is no provider {provider!r}", f"known: {', '.join(PROVIDERS)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise DeviceError(f"threads = {threads!r}", "a number of threads, or 0 for as many as there are cores")
    full_name = PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if full_name not in available:
        raise DeviceError(
            f"this onnxruntime has no {full_name}; it has {', '.join(available)}",
            'pip uninstall onnxruntime, then pip install "spdtool[gpu]"',
        )
    if provider == "cpu":
        options = _session_options(onnxruntime, threads, libraries, fused=fused)
        return _create_session(onnxruntime, model, provider, options, provider_options)
    preload_libraries(onnxruntime)
    options = _session_options(onnxruntime, threads, libraries, fused=fused)
    options.add_session_config_entry(NO_FALLBACK, "1")
    try:
        session = _create_session(onnxruntime, model, provider, options, provider_options)
    except ModelError as error:
        if "fallback to CPU EP" not in error.message:
            raise
        # Shapes and masks may stay on the CPU; `_refuse_fallback` looks at what else does.
        options = _session_options(onnxruntime, threads, libraries, fused=fused)
        session = _create_session(onnxruntime, model, provider, options, provider_options)
    _refuse_fallback(session, full_name)
    return session


def node_placement(session: InferenceSession) -> dict[str, dict[str, int]] | None:
    """Count nodes by provider and operator, as onnxruntime assigned them; None where it does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    counts: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        counts.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
    return {name: dict(sorted(operators.items())) for name, operators in sorted(counts.items())}


def provider_problem(provider: str) -> str | None:
    """Explain why `provider` does not really run a small model; None: it does.

    Raises:
        DeviceError: onnxruntime itself is not usable.
    """
    require_onnxruntime()
    try:
        session = open_session(small_model(), provider, threads=1)
        value = np.arange(4, dtype=np.float32).reshape(2, 2)
        is_right = np.array_equal(session.run(None, {"x": value})[0], value @ value)
    except (DeviceError, ModelError) as error:
        return error.message
    if is_right:
        return None
    return f"{PROVIDERS[provider]} computes a wrong product"


def working_providers(device: str) -> list[str]:
    """List the providers to use for a recipe's `device`, the fastest last.

    Raises:
        DeviceError: `cuda` is demanded and does not really run.
    """
    if device == "cpu":
        return ["cpu"]
    problem = provider_problem("cuda")
    if problem is None:
        return ["cpu", "cuda"]
    if device == "cuda":
        message = f"CUDA was demanded, and onnxruntime does not run on it: {problem}"
        raise DeviceError(message, SAY_WHAT_IS_MISSING)
    return ["cpu"]


def small_model() -> bytes:
    """Build a model of one matrix product, float32 [2, 2], to see whether a provider works."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"], name="product")], "small", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _session_options(onnxruntime: Any, threads: int, libraries: Sequence[str | Path], *, fused: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for library in libraries:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise ModelError(
                f"onnxruntime cannot load the operators in {library}: {first_line(error)}",
                "it must be built for this machine and for this onnxruntime; install its plugin again",
            ) from None
    return options


def _create_session(
    onnxruntime: Any,
    model: Path | bytes,
    provider: str,
    options: Any,
    provider_options: Mapping[str, str] | None,
) -> InferenceSession:
    source: str | bytes = str(model)
    description = str(model)
    if isinstance(model, bytes):
        source, description = model, "the model"
    chosen = {**PROVIDER_OPTIONS[provider], **(provider_options or {})}
    try:
        session: InferenceSession = onnxruntime.InferenceSession(
            source, options, providers=[(PROVIDERS[provider], chosen)], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise _explain_failure(description, first_line(error)) from None
    session.disable_fallback()  # else a failing run would create another session on the CPU
    return session


def _explain_failure(description: str, reason: str) -> ModelError:
    unknown = UNREGISTERED.search(reason)
    if unknown is None or unknown["domain"] in STANDARD_DOMAINS:
        return ModelError(f"onnxruntime cannot open {description}: {reason}")
    operator, domain = unknown["name"], unknown["domain"]
    return ModelError(
        f"{description} needs the operator {operator} of the domain {domain!r}, which is not registered",
        _library_hint(domain),
    )


def _library_hint(domain: str) -> str:
    """Name the installed plugin that provides the operators of a domain."""
    for target in plugins.library_targets():
        try:
            library = plugins.find_library(target)
        except SpdError:  # a broken plugin cannot say what it provides
            continue
        if domain in getattr(library.module, "DOMAINS", ()):
            return (
                f"it comes with the plugin {library.distribution}; spdtool.load and spdtool export find it by "
                "manifest.json"
            )
    return "give the library that holds it, or install the plugin whose target wrote the file"


def _refuse_fallback(session: InferenceSession, full_name: str) -> None:
    """Raise DeviceError where arithmetic does not run on the provider that was asked for."""
    used = session.get_providers()[0]  # the first is the one that was asked for, if it loaded
    if used != full_name:
        raise DeviceError(f"onnxruntime ran {used} when {full_name} was asked for", SAY_WHAT_IS_MISSING)
    placement = node_placement(session)
    if placement is None:
        raise DeviceError("this onnxruntime does not tell which provider runs a node", "upgrade onnxruntime-gpu")
    on_cpu = set[str]()
    for name, operators in placement.items():
        if name != full_name:
            on_cpu |= ARITHMETIC & operators.keys()
    if on_cpu or not placement.get(full_name):
        listed = ", ".join(sorted(on_cpu)) or "every node"
        raise DeviceError(f"onnxruntime left {listed} to the CPU", SAY_WHAT_IS_MISSING)
