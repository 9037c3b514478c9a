"""`spdtool serve`: serve a bundle over HTTP until SIGTERM or SIGINT; requests in flight are still answered then."""

from __future__ import annotations

import importlib
import ipaddress
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

from spdtool import console
from spdtool.errors import DeviceError, ModelError, RunError
from spdtool.export import runtime
from spdtool.export.classifier import load

EXTRA = ("starlette", "uvicorn", "prometheus_client")  # what the extra `serve` installs
SHUTDOWN_SECONDS = 30  # for requests in flight, before their connections are cut
MAX_WORKERS = 4  # unless more are asked for: measured on two cores only


@dataclass(frozen=True)
class ServerOptions:
    """Where and how to serve.

    Attributes:
        port: 0: any free one.
        name: name of the model in paths; None: `model_name` of the folder.
        limits: fields of `http.Limits`.
        workers: batches that are computed at the same time; 0: see `share_threads`.
        threads: threads of all workers together; 0: as many as there are cores.
        provider, variant: see `spdtool.load`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    limits: Mapping[str, int | float] = field(default_factory=dict)
    workers: int = 0
    threads: int = 0
    provider: str = "cpu"
    variant: str | None = None


@dataclass(frozen=True)
class Served:
    """What a server served, where, and with how many workers and threads each."""

    served: str
    model: str
    address: str
    workers: int
    threads: int


def require_extra() -> ModuleType:
    """Import `spdtool.serving.http`.

    Raises:
        DeviceError: a distribution of the extra `serve` is missing.
    """
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DeviceError(f"the server needs {name}: {error}", 'pip install "spdtool[serve]"') from None
    return importlib.import_module("spdtool.serving.http")


def serve_bundle(bundle: Path, options: ServerOptions) -> Served:
    """Serve a bundle until a signal ends it.

    Raises:
        ModelError, PluginError, DeviceError: the bundle cannot be opened, or the extra is missing.
        RunError: the server cannot listen to host and port.
    """
    http = require_extra()
    host = options.host
    workers, threads = share_threads(options.workers, options.threads, options.provider)
    classify = load(bundle, threads=threads, provider=options.provider, variant=options.variant)
    assert classify.bundle is not None
    model = options.name or model_name(classify.bundle.folder)
    if not model or "/" in model:
        raise ModelError(f"{model!r} cannot be the name of a model in a path", "give another --name")
    # Waking the tokenizer's threads for a few short texts costs more than they save.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    classify.logits([[0]])  # any token: a model that cannot run must fail before the port is open
    listener = open_listener(host, options.port)
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    if not is_loopback(host):
        console.warn(f"{host} can be reached from other machines, and nobody is asked who they are")
    console.say(f"{console.escape(model)} ({console.escape(classify.bundle.model)}) is served at {address}")
    run_until_signal(http.create_app(classify, model, http.Limits(**options.limits), workers), listener)
    console.say("ended: every request in flight was answered")
    return Served(model, str(classify.bundle.model), address, workers, threads)


def share_threads(workers: int, threads: int, provider: str) -> tuple[int, int]:
    """Decide how many workers there are, and how many threads each of them has.

    Two batches of short texts with a thread each are done sooner than one after the other with two threads. So 0
    workers means one a thread, at most MAX_WORKERS; a GPU has one.
    """
    all_threads = threads or runtime.usable_cores()
    if workers == 0 and provider == "cuda":
        workers = 1
    elif workers == 0:
        workers = min(all_threads, MAX_WORKERS)
    return workers, max(1, all_threads // workers)


def model_name(folder: Path) -> str:
    """Name a model after its run, if the folder belongs to one, otherwise after the folder."""
    names = [name for name in folder.resolve().parts if name not in ("export", "bundle", "student")]
    return names[-1] if names else folder.name


def open_listener(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        RunError: the address is taken, or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Without it the port of a server that has just ended would be taken for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        raise RunError(
            f"{host} port {port} cannot be listened to: {error}", "another --port; 0 is any free one"
        ) from None
    return listener


def run_until_signal(application: object, listener: socket.socket) -> None:
    """Run uvicorn on the socket until SIGINT or SIGTERM, and close the socket."""
    import uvicorn

    config = uvicorn.Config(
        application,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_keep_alive=60,
    )
    signals = (signal.SIGINT, signal.SIGTERM)
    # uvicorn sends itself the signal once more after a clean end; the default handler would turn that into a death.
    handlers = {number: signal.signal(number, ignore_signal) for number in signals}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        listener.close()


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: uvicorn has obeyed the signal already."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
