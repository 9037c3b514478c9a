"""`spdtool serve`: a bundle behind HTTP, until SIGTERM or SIGINT; what is in flight then is still answered."""

from __future__ import annotations

import importlib
import ipaddress
import signal
import socket
from pathlib import Path
from typing import Any

from spdtool import console
from spdtool.classifier import load
from spdtool.errors import DeviceError, ModelError, RunError

EXTRA = ("fastapi", "uvicorn", "prometheus_client")
SECONDS_TO_END = 30  # for requests in flight, before their connections are cut


def require() -> Any:
    """The module `spdtool.serving.app`.

    Raises:
        DeviceError: a distribution of the extra `serve` is missing.
    """
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DeviceError(f"the server needs {name}: {error}", 'pip install "spdtool[serve]"') from None
    return importlib.import_module("spdtool.serving.app")


def serve(
    bundle: Path, host: str, port: int, name: str | None, limits: dict[str, Any], **opening: Any
) -> dict[str, Any]:
    """Serve a bundle until a signal ends it; return what was served.

    Args:
        port: 0: any that is free.
        name: of the model in paths; None: that of the folder.
        limits: see `app.Limits`.
        opening: of `spdtool.load`: threads, provider, variant.

    Raises:
        ModelError, PluginError, DeviceError: the bundle cannot be opened, or the extra is missing.
        RunError: host and port cannot be listened to.
    """
    app = require()
    classify = load(bundle, **opening)
    assert classify.bundle is not None
    called = name or model_name(classify.bundle.folder)
    if not called or "/" in called:
        raise ModelError(f"{called!r} cannot be the name of a model in a path", "give another --name")
    classify.logits(["warm up"])
    listening = listen(host, port)
    where = "http://{}:{}".format(*listening.getsockname()[:2])
    if not _loopback(host):
        console.warn(f"{host} can be reached from other machines, and nobody is asked who they are")
    console.say(f"{console.plain(called)} ({console.plain(classify.bundle.model)}) is served at {where}")
    _run(app.make(classify, called, app.Limits(**limits)), listening)
    console.say("ended: every request in flight was answered")
    return {"served": called, "model": str(classify.bundle.model), "address": where}


def model_name(folder: Path) -> str:
    """A model's name in paths: its run's, where the folder is that of a run, else the folder's."""
    parts = [part for part in folder.resolve().parts if part not in ("export", "bundle", "student")]
    return parts[-1] if parts else folder.name


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        RunError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(1024)
    except (OSError, OverflowError) as error:
        made.close()
        raise RunError(
            f"{host} port {port} cannot be listened to: {error}", "another --port; 0 is any free one"
        ) from None
    return made


def _run(application: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=SECONDS_TO_END,
        timeout_keep_alive=60,
    )
    before = {number: signal.signal(number, _noted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn sends itself the signal again when it has ended, which would make a death of a clean end
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()


def _noted(_number: int, _frame: Any) -> None:
    """The signal was heeded already."""


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
