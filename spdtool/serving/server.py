"""`spdtool serve`: serve a bundle over HTTP until SIGTERM or SIGINT; requests in flight are still answered then."""

from __future__ import annotations

import importlib
import ipaddress
import os
import resource
import signal
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from spdtool import console
from spdtool.errors import DeviceError, ModelError, RunError
from spdtool.export import onnx_session
from spdtool.export.classifier import Classifier
from spdtool.export.load import load
from spdtool.serving.protocol import is_unicode
from spdtool.serving.watch import FolderWatch, stamp_files

if TYPE_CHECKING:
    import uvicorn

    from spdtool.serving.connections import Door
    from spdtool.serving.http import Application

EXTRA = ("starlette", "uvicorn", "httptools", "prometheus_client")  # what the extra `serve` installs
SHUTDOWN_SECONDS = 30  # for requests in flight, before their connections are cut
BACKLOG = 256  # connections that the kernel holds until they are accepted
OTHER_FILES = 448  # open files of the process beside its connections: those that linger, and files
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ANY_HOST = "*"
MAX_WORKERS = 4  # unless more are asked for: measured on two cores only


@dataclass(frozen=True)
class ServerOptions:
    """Where and how to serve.

    Attributes:
        port: 0: any free one.
        name: name of the model in paths; None: `model_name` of the folder.
        limits: fields of `http.Limits`.
        connection_limits: fields of `connections.ConnectionLimits`.
        workers: batches that are computed at the same time; 0: see `share_threads`.
        threads: threads of all workers together; 0: as many as there are cores.
        provider, variant, unverified, raw: see `spdtool.load`.
        allowed_hosts: names in the header Host that are answered; empty: see `hosts_to_allow`.
        access_log: print a line for every request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    limits: Mapping[str, int | float] = field(default_factory=dict)
    connection_limits: Mapping[str, int | float] = field(default_factory=dict)
    workers: int = 0
    threads: int = 0
    provider: str = "cpu"
    variant: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    access_log: bool = False
    unverified: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Served:
    """What a server served, where, and with how many workers and threads each."""

    served: str
    model: str
    address: str
    workers: int
    threads: int


def require_extra() -> None:
    """Import what the extra `serve` installs.

    Raises:
        DeviceError: a distribution of the extra is missing.
    """
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DeviceError(f"the server needs {name}: {error}", 'pip install "spdtool[serve]"') from None


def serve_bundle(bundle: Path, options: ServerOptions) -> Served:
    """Serve a bundle until a signal ends it.

    Raises:
        ModelError, PluginError, DeviceError: the bundle cannot be opened, or the extra is missing.
        RunError: the server cannot listen to host and port, or has ended with requests unanswered.
        EngineDied: a worker thread has ended.
    """
    require_extra()
    from spdtool.serving import connections, http

    workers, threads = share_threads(options.workers, options.threads, options.provider)
    # Waking the tokenizer's threads for a few short texts costs more than they save.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    classify, watch = open_unchanging(bundle, threads, options)
    assert classify.bundle is not None
    model = options.name or model_name(classify.bundle.folder)
    if not model or "/" in model or not is_unicode([model, *classify.names]):
        raise ModelError(f"{model!r} cannot be the name of a model in a path", "give another --name")
    connection_limits = connections.ConnectionLimits(**options.connection_limits)  # type: ignore[arg-type]
    limits = http.Limits(**options.limits, connection=connection_limits)  # type: ignore[arg-type]
    allow_open_files(connection_limits.connections)
    listener = open_listener(options.host, options.port)
    bound, port = listener.getsockname()[:2]
    address = f"http://[{bound}]:{port}" if ":" in bound else f"http://{bound}:{port}"
    loopback = is_loopback(bound)
    if not loopback:
        console.warn(f"{options.host} can be reached from other machines, and nobody is asked who they are")

    shutdown = Shutdown()
    # Printed when a signal would end the server cleanly, and not before.
    line = f"{console.escape(model)} ({console.escape(classify.bundle.model)}) is served at {address}"
    app_options = http.AppOptions(
        workers,
        hosts_to_allow(options.host, options.allowed_hosts, loopback=loopback),
        watch,
        print_access if options.access_log else None,
        on_start=partial(console.say, line),
        on_death=shutdown.request,
    )
    app = http.Application(classify, model, limits, app_options)
    run_until_signal(app, listener, shutdown)
    return Served(model, str(classify.bundle.model), address, workers, threads)


def open_unchanging(bundle: Path, threads: int, options: ServerOptions) -> tuple[Classifier, FolderWatch]:
    """Open a bundle, and the watch that notices when its files change.

    Raises:
        BundleChanged: they changed while they were read.
        ModelError, PluginError, DeviceError: the bundle cannot be opened.
    """
    stamps = stamp_files(bundle)
    classify = load(
        bundle,
        threads=threads,
        provider=options.provider,
        variant=options.variant,
        unverified=options.unverified,
        raw=options.raw,
    )
    classify.logits([[0]])  # any token: a model that cannot run must fail before the port is open
    assert classify.bundle is not None
    folder = classify.bundle.folder
    watch = FolderWatch({file: stamp for file, stamp in stamps.items() if file.is_relative_to(folder)})
    watch.check()
    return classify, watch


def share_threads(workers: int, threads: int, provider: str) -> tuple[int, int]:
    """Decide how many workers there are, and how many threads each of them has.

    Two batches of short texts with a thread each are done sooner than one after the other with two
    threads. So 0 workers means one a thread, at most MAX_WORKERS; a GPU has one.
    """
    all_threads = threads or onnx_session.usable_cores()
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


class Shutdown:
    """A request to end a uvicorn server, which may come before there is one, and from another thread."""

    def __init__(self) -> None:
        self.requested = False
        self._server: uvicorn.Server | None = None

    def request(self) -> None:
        """Let the server end as soon as every request in flight is answered."""
        self.requested = True
        if self._server is not None:
            self._server.should_exit = True  # looked at ten times a second

    def end_on_request(self, server: uvicorn.Server) -> None:
        """End this server when it is requested, or has been already."""
        self._server = server
        if self.requested:
            server.should_exit = True

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests inside the block.

        uvicorn has its own handlers while it runs; then it sends itself the signal once more, and
        the default handler would turn a clean end into a death.
        """

        def request(_number: int, _frame: FrameType | None) -> None:
            self.request()

        handlers = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run_until_signal(app: Application, listener: socket.socket, shutdown: Shutdown) -> None:
    """Run an application on the socket until SIGINT or SIGTERM, and close the socket.

    Raises:
        EngineDied: a worker thread has ended, and the server with it.
        RunError: it has ended with requests unanswered.
    """
    from spdtool.serving.connections import Door, EndingServer

    door = Door(app.limits.connection, app.observed.count_refusal)
    server = EndingServer(make_uvicorn_config(app, door), door)
    shutdown.end_on_request(server)
    try:
        with shutdown.signals():
            server.run(sockets=[listener])
    finally:
        listener.close()
    if app.batcher is not None and app.batcher.death is not None:
        raise app.batcher.death
    unanswered = app.metrics.cut or server.unanswered
    if unanswered:
        raise RunError(f"{unanswered} requests in flight were not answered", "the model or their clients are too slow")
    console.say("ended: every request in flight was answered")


def make_uvicorn_config(app: Application, door: Door) -> uvicorn.Config:
    """Configure uvicorn to run an application behind a door."""
    import uvicorn

    from spdtool.serving.connections import GuardedConnection

    return uvicorn.Config(
        app.observed,
        http=partial(GuardedConnection, door),  # type: ignore[arg-type]  # any callable that makes a protocol
        log_level="error",  # a warning for every request that is no HTTP would fill a disk
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_keep_alive=int(app.limits.connection.idle_seconds) + 1,  # ours comes first
    )


def allow_open_files(connections: int) -> None:
    """Let this process open as many files as its connections need.

    Raises:
        RunError: the system does not allow as many.
    """
    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RunError(
            f"{connections} connections need {needed} open files, and this process may have {hard}",
            f"a higher ulimit -Hn, at least {needed}",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def hosts_to_allow(host: str, allowed: Collection[str], *, loopback: bool) -> frozenset[str]:
    """Decide which names in the header Host are answered; an empty set: any.

    A server that only this machine can reach answers to this machine's names and to those that were
    allowed. One that others can reach has names that it cannot know: it answers to any, unless some
    were allowed.

    Args:
        host: address to listen to, as the user has written it.
        loopback: whether only this machine can reach it.
    """
    if ANY_HOST in allowed or (not allowed and not loopback):
        return frozenset()
    names = {host, *allowed, *LOOPBACK_NAMES} if loopback else {host, *allowed}
    return frozenset(f"[{name}]" if name.count(":") > 1 and "[" not in name else name.lower() for name in names)


def print_access(line: str) -> None:
    """Print a line of the access log; a full disk, or a reader that has gone, is no reason to stop."""
    with suppress(OSError, SystemExit):  # rich ends the process where the standard output is closed
        console.say(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {console.escape(line)}")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address that a socket is bound to."""
    parsed = ipaddress.ip_address(address)
    # Until Python 3.13 ::ffff:127.0.0.1 is none of the loopback addresses.
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
