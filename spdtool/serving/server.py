"""`spdtool serve`: a bundle behind HTTP, until SIGTERM or SIGINT; what is in flight then is still answered."""

from __future__ import annotations

import importlib
import ipaddress
import os
import signal
import socket
from pathlib import Path
from typing import Any

from spdtool import console
from spdtool.errors import DeviceError, ModelError, RunError
from spdtool.export import runtime
from spdtool.serving.classifier import load

EXTRA = ("starlette", "uvicorn", "prometheus_client")
SECONDS_TO_END = 30  # for requests in flight, before their connections are cut
MOST_WORKERS = 4  # unless more are asked for: measured on two cores only


def require() -> Any:
    """The module `spdtool.serving.http`.

    Raises:
        DeviceError: a distribution of the extra `serve` is missing.
    """
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DeviceError(f"the server needs {name}: {error}", 'pip install "spdtool[serve]"') from None
    return importlib.import_module("spdtool.serving.http")


def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    limits: dict[str, Any],
    *,
    workers: int = 0,
    threads: int = 0,
    provider: str = "cpu",
    variant: str | None = None,
) -> dict[str, Any]:
    """Serve a bundle until a signal ends it; return what was served.

    Args:
        port: 0: any that is free.
        name: of the model in paths; None: that of the folder.
        limits: see `app.Limits`.
        workers: batches that are computed at once; 0: see `shared`.
        threads: of all workers together; 0: as many as there are cores.
        provider, variant: see `spdtool.load`.

    Raises:
        ModelError, PluginError, DeviceError: the bundle cannot be opened, or the extra is missing.
        RunError: host and port cannot be listened to.
    """
    app = require()
    workers, threads = shared(workers, threads, provider)
    classify = load(bundle, threads=threads, provider=provider, variant=variant)
    assert classify.bundle is not None
    called = name or model_name(classify.bundle.folder)
    if not called or "/" in called:
        raise ModelError(f"{called!r} cannot be the name of a model in a path", "give another --name")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # waking threads for a few short texts costs more than it saves
    classify.logits([[0]])  # any token
    listening = listen(host, port)
    where = "http://{}:{}".format(*listening.getsockname()[:2])
    if not _loopback(host):
        console.warn(f"{host} can be reached from other machines, and nobody is asked who they are")
    console.say(f"{console.plain(called)} ({console.plain(classify.bundle.model)}) is served at {where}")
    _run(app.make(classify, called, app.Limits(**limits), workers), listening)
    console.say("ended: every request in flight was answered")
    return {
        "served": called,
        "model": str(classify.bundle.model),
        "address": where,
        "workers": workers,
        "threads": threads,
    }


def shared(workers: int, threads: int, provider: str) -> tuple[int, int]:
    """How many workers there are, and how many threads each of them has.

    Two batches of short texts, each with a thread, are done sooner than one after the other with two: 0 workers are as
    many as there are threads, at most `MOST_WORKERS`. A GPU has one.
    """
    every = threads or runtime.cores()
    number = workers or (1 if provider == "cuda" else min(every, MOST_WORKERS))
    return number, max(1, every // number)


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
        proxy_headers=False,
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
