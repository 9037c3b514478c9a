"""Runtimes in which portable ONNX files can be timed on this machine, beside onnxruntime."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from spdtool.bench.engines import Engine
from spdtool.errors import DeviceError, first_line
from spdtool.export import onnx_session

ONNXRUNTIME, OPENVINO, WEB = "onnxruntime", "openvino", "web"
TIMED_RUNTIMES: dict[str, Literal["onnxruntime", "openvino", "web"]] = {
    ONNXRUNTIME: "onnxruntime",
    OPENVINO: "openvino",
    WEB: "web",
}
"""Maps a runtime of a goal to the kind of engine that times it."""

WEB_PROGRAM = Path(__file__).with_name("web_engine.mjs")
WEB_HINT = "npm install onnxruntime-web in this folder, or set NODE_PATH to the node_modules that has it"
TIMEOUT = 60.0  # seconds for Node.js to say its version


def require_runtime(name: str) -> None:
    """Refuse a runtime that cannot be timed here.

    Raises:
        DeviceError: it is not installed, or runs elsewhere.
    """
    if name not in TIMED_RUNTIMES:
        *others, last = TIMED_RUNTIMES
        raise DeviceError(
            f"{name} is not timed here: layers are timed in {', '.join(others)} or {last}",
            "give a file of its times, in the form of `spdtool bench --profile`: --profile FILE",
        )
    runtime_version(name)


def runtime_version(name: str) -> str:
    """Version of a runtime of `TIMED_RUNTIMES` that is installed here.

    Raises:
        DeviceError: it is not installed.
    """
    if name == WEB:
        return find_web_version()
    if name == OPENVINO:
        if importlib.util.find_spec(OPENVINO) is None:
            raise DeviceError("openvino is not installed", "pip install openvino")
        return metadata.version(OPENVINO)
    return str(onnx_session.require_onnxruntime().__version__)


def find_web_version() -> str:
    """Versions of onnxruntime-web and of the Node.js that runs it.

    Raises:
        DeviceError: there is no Node.js, or it does not find onnxruntime-web.
    """
    if shutil.which("node") is None:
        raise DeviceError("onnxruntime-web is timed under Node.js, and there is no `node` here", "install Node.js 20")
    command = ["node", str(WEB_PROGRAM), "--version"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"Node.js does not run: {first_line(error)}", "try `node --version`") from None
    if process.returncode or not process.stdout:
        raise DeviceError("Node.js does not find onnxruntime-web", WEB_HINT)
    return process.stdout


def run_in(engine: Engine, runtime: str) -> Engine:
    """Return the engine that runs the portable file of an onnxruntime engine in a runtime of `TIMED_RUNTIMES`."""
    command = ("node", str(WEB_PROGRAM)) if runtime == WEB else ()
    return replace(engine, kind=TIMED_RUNTIMES[runtime], command=command)
