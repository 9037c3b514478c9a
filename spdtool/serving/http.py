"""The application of a bundle: KServe v2, a plain /predict, /metrics for Prometheus, and pages that describe it.

    GET  /  /docs  /openapi.json
    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME  /v2/models/NAME/ready
    POST /v2/models/NAME/infer  /predict  and a route of `compatible`, where the kind of task has one
    GET  /metrics

Every error is `{"error": "..."}`: 400 no valid inference request, 404 no such model or path, 405
another method, 408 too slow, 413 the body is too large, 415 the body is compressed, 421 another
Host, 422 no valid request of /predict, 431 the head is too large, 500 the model failed, 503 the
queue is full, the server is about to end, a worker has died, or the bundle has changed on the disk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from reprlib import repr as shorten
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from spdtool.errors import DataError, SpdError
from spdtool.export.classifier import Classifier
from spdtool.serving import openapi, pages, protocol
from spdtool.serving.batching import Batcher, EngineDied, QueueFull, ServerClosing
from spdtool.serving.compatible import find_route
from spdtool.serving.connections import REFUSED_STATUS, ConnectionLimits
from spdtool.serving.metrics import ObserveRequests, ServerMetrics, WriteLine
from spdtool.serving.protocol import InferenceRequest
from spdtool.serving.watch import BundleChanged, FolderWatch
from spdtool.tasks.decision import Json, Object

Handler = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")

CLIENT_GONE = 499  # the client closed the connection; only /metrics shows it
CLOSE_SECONDS = 5.0  # for the worker threads at the end; one that hangs in native code is left alone
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
BINARY_HEADER = "inference-header-content-length"  # marks the protocol's binary extension
PREDICT_PATH = "/predict"
MOST_PATH = 200  # characters of a path that an error repeats
# From so many bytes or texts on, reading a request and writing its answer may take up to a second: that
# is done in a thread, so that others are answered meanwhile.
LARGE_BODY, MANY_TEXTS = 2**16, 64
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """What one request, one batch and the queue may hold.

    Attributes:
        texts: texts of a request.
        batch: rows that are computed at once.
        wait: seconds that a row waits for others.
        queue: rows in the queue.
        connection: what one connection may cost; its `body` limits a request here too.
    """

    texts: int = 512
    batch: int = 16
    wait: float = 0.002
    queue: int = 4096
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)


@dataclass(frozen=True)
class AppOptions:
    """How an application serves.

    Attributes:
        workers: batches that are computed at the same time.
        hosts: names in the header Host that are answered; empty: any.
        watch: notices that the folder of the model has changed; None: it is not watched.
        log: called with one line a request; None: there is no access log.
        on_start: called when the application is ready to answer.
        on_death: called in the worker thread that has died.
    """

    workers: int = 1
    hosts: Collection[str] = ()
    watch: FolderWatch | None = None
    log: WriteLine | None = None
    on_start: Callable[[], None] = lambda: None
    on_death: Callable[[], None] = lambda: None


class BodyTooLarge(SpdError):
    """The body of a request is larger than allowed."""


class CompressedBody(SpdError):
    """The body of a request is compressed."""


class UnknownModel(SpdError):
    """The model or its version is not served here."""


class Application:
    """The application that serves one model under a name; its workers live as long as it runs.

    Attributes:
        metrics: the figures behind /metrics.
        compatible: route of another server's API that the kind of task has; None: it has none.
        batcher: computes the answers; None before the application has started.
        observed: the application as a server runs it.
    """

    def __init__(
        self, classify: Classifier, name: str, limits: Limits | None = None, options: AppOptions | None = None
    ) -> None:
        self.classify, self.name = classify, name
        self.limits, self.options = limits or Limits(), options or AppOptions()
        self.metrics = ServerMetrics()
        self.compatible = find_route(classify)
        self.batcher: Batcher | None = None
        routes = self._routes()
        app = Starlette(
            routes=routes,
            middleware=[Middleware(AllowHosts, hosts=frozenset(self.options.hosts))],
            exception_handlers={
                SpdError: answer_error,
                HTTPException: answer_http_error,
                ClientDisconnect: answer_nobody,
                Exception: answer_bug,
            },
            lifespan=self._run_workers,
        )
        app.router.redirect_slashes = False  # a redirect would name whatever Host the client sent
        labels: dict[object, str] = {route.endpoint: route.name for route in routes}
        self.observed = ObserveRequests(app, self.metrics, labels, self.options.log)

    # The workers start with the application: threads of a process that is forked later would be lost.
    @asynccontextmanager
    async def _run_workers(self, _app: Starlette) -> AsyncIterator[None]:
        self.batcher = batcher = Batcher(
            self.classify,
            workers=self.options.workers,
            max_batch=self.limits.batch,
            max_wait=self.limits.wait,
            max_rows=self.limits.queue,
            observe=self.metrics.batches.observe,
            check=self._check_folder,
            on_death=self.options.on_death,
        )
        # Asked for when /metrics is read, so that no request has to keep it up to date.
        self.metrics.queue.set_function(lambda: batcher.rows)
        self.options.on_start()
        yield
        await asyncio.to_thread(batcher.close, CLOSE_SECONDS)  # it waits, and must not block the event loop

    def _routes(self) -> list[Route]:
        """List the routes; the name of each is its label in the metrics."""
        document = openapi.describe_api(self.classify, self.name, self.limits.texts)
        docs = pages.docs_page(document, self.name)
        front = pages.front_page(self.classify, self.name)
        server: Json = {"name": "spdtool", "version": metadata.version("spdtool"), "extensions": []}
        routes = [
            Route("/", constant(PlainTextResponse(front)), name="front"),
            Route("/docs", constant(HTMLResponse(docs, headers=PAGE_HEADERS)), name="docs"),
            Route("/openapi.json", constant(json_response(document)), name="openapi"),
            Route("/v2", constant(json_response(server)), name="server"),
            Route("/v2/health/live", constant(json_response({"live": True})), name="live"),
            Route("/v2/health/ready", self._ready, name="ready"),
            Route("/metrics", self._show_metrics, name="metrics"),
            Route(PREDICT_PATH, self._predict, methods=["POST"], name="predict"),
        ]
        if self.compatible is not None:
            for path in self.compatible.paths:
                routes.append(Route(path, self._answer_compatible, methods=["POST"], name=path.rsplit("/", 1)[-1]))
        for path in MODEL_PATHS:
            for suffix, handler, method in (
                ("", self._describe_model, "GET"),
                ("/ready", self._model_ready, "GET"),
                ("/infer", self._infer, "POST"),
            ):
                route = Route(path + suffix, handler, methods=[method], name=suffix.strip("/") or "model")
                routes.append(route)
        return routes

    async def _infer(self, request: Request) -> Response:
        self._require_model(request)
        if BINARY_HEADER in request.headers:
            raise DataError("the binary extension of the protocol is not spoken here", "send the tensors as JSON")
        outputs = protocol.response_outputs(self.classify)
        parse = partial(protocol.parse_infer, available_outputs=outputs, max_texts=self.limits.texts)
        inference, is_large = await self._read(request, parse)
        respond = partial(protocol.infer_response, self.classify, self.name, inference)
        return await self._answer(inference, respond, is_large=is_large)

    async def _predict(self, request: Request) -> Response:
        parse = partial(protocol.parse_predict, max_texts=self.limits.texts)
        inference, is_large = await self._read(request, parse)
        return await self._answer(inference, self._predict_response, is_large=is_large)

    def _predict_response(self, outputs: Any) -> Object:
        return {"model": self.name, "predictions": [*self.classify.decision.predictions(outputs)]}

    async def _answer_compatible(self, request: Request) -> Response:
        assert self.compatible is not None
        route, max_texts = self.compatible, self.limits.texts
        parsed, is_large = await self._read(request, lambda body: route.parse(body, max_texts))
        respond = partial(route.answer, self.classify, self.name, parsed)
        return await self._answer(parsed.inference, respond, is_large=is_large)

    async def _read(self, request: Request, parse: Callable[[bytes], Result]) -> tuple[Result, bool]:
        """Read and parse the body of a request; return also whether it is large."""
        body = await read_body(request, self.limits.connection.body)
        is_large = len(body) > LARGE_BODY
        return await call(parse, body, aside=is_large), is_large

    async def _answer(
        self, inference: InferenceRequest, respond: Callable[[Any], Object], *, is_large: bool
    ) -> Response:
        """Compute a request, and make the response of its outputs."""
        assert self.batcher is not None
        self.classify.check_text_count(paired=inference.pairs is not None)
        outputs = await asyncio.wrap_future(self.batcher.submit(inference.texts, inference.pairs))
        self.metrics.rows.inc(len(outputs))

        def make_response() -> Response:
            return json_response(respond(outputs))

        return await call(make_response, aside=is_large or len(inference.texts) > MANY_TEXTS)

    async def _ready(self, _request: Request) -> Response:
        self._check_ready()
        return json_response({"ready": True})

    async def _model_ready(self, request: Request) -> Response:
        self._require_model(request)
        self._check_ready()
        return json_response({"name": self.name, "ready": True})

    async def _describe_model(self, request: Request) -> Response:
        self._require_model(request)
        return json_response(protocol.model_metadata(self.classify, self.name))

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _check_ready(self) -> None:
        """Raise EngineDied or BundleChanged if no further request can be answered."""
        assert self.batcher is not None
        if self.batcher.death is not None:
            raise self.batcher.death
        self._check_folder()

    def _check_folder(self) -> None:
        if self.options.watch is not None:
            self.options.watch.check()

    def _require_model(self, request: Request) -> None:
        """Raise UnknownModel if the path names another model or version."""
        model = request.path_params["model"]
        version = request.path_params.get("version", protocol.MODEL_VERSION)
        if model != self.name or version != protocol.MODEL_VERSION:
            raise UnknownModel(
                f"there is no model {shorten(model)} of version {version[:20]}",
                f"{self.name!r} of version {protocol.MODEL_VERSION} is served",
            )


class AllowHosts:
    """Answers only requests whose header Host names this server.

    A web page can let its own name point to 127.0.0.1, and would then read what a server on this machine answers.

    Args:
        hosts: names without a port, in lower case; empty: any.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            refusal = self._refusal(values, scope["http_version"])
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, values: list[str], http_version: str) -> Response | None:
        """Return the answer to a request with these Host headers; None if it is welcome."""
        if len(values) > 1 or (not values and http_version != "1.0"):
            return json_response({"error": f"{len(values)} headers Host: one was expected"}, 400)
        if values and self._hosts and host_name(values[0]) not in self._hosts:
            message = f"the Host {shorten(values[0])} is not served here (start the server with --allow-host)"
            return json_response({"error": message}, 421)
        return None


def host_name(value: str) -> str:
    """Return the name in a Host header: without port, in lower case, an IPv6 address in its brackets."""
    host, separator, port = value.strip().lower().rpartition(":")
    if not separator or not (port.isdecimal() or not port):  # "localhost:" is right, and means the usual port
        host = value.strip().lower()
    return host.removesuffix(".")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body of a request, no further than it may be long.

    Raises:
        BodyTooLarge: it is longer than `max_bytes`, or its head says so.
        CompressedBody: its head says so.
        ClientDisconnect: it has no end.
    """
    encoding = request.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise CompressedBody(f"the body is compressed, as {shorten(encoding)}", "send it as it is")
    too_large = BodyTooLarge(f"the body is larger than {max_bytes:,} bytes", "send several requests")
    length = request.headers.get("content-length", "0")
    if int(length) > max_bytes:  # refuse before anything is read
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def json_response(value: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Make a JSON response."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8"), status, headers, "application/json")


async def call(function: Callable[..., Result], *arguments: Any, aside: bool) -> Result:
    """Call a function; in another thread if it may take long."""
    return await asyncio.to_thread(function, *arguments) if aside else function(*arguments)


def constant(response: Response) -> Handler:
    """Make a handler that always gives this response."""

    async def answer(_request: Request) -> Response:
        return response

    return answer


async def answer_error(request: Request, error: Exception) -> Response:
    """Make the response for an error of ours."""
    assert isinstance(error, SpdError)
    message = error.message
    if error.hint:
        message += f" ({error.hint})"
    status, headers = 500, {}
    if isinstance(error, BodyTooLarge):
        status, headers = 413, {"connection": "close"}  # the rest of the body is not read
    elif isinstance(error, CompressedBody):
        status, headers = 415, {"accept-encoding": "identity"}
    elif isinstance(error, QueueFull | ServerClosing | EngineDied | BundleChanged):
        status, headers = 503, {"retry-after": "1"}
    elif isinstance(error, UnknownModel):
        status = 404
    elif isinstance(error, DataError):
        status = 422 if request.scope["path"] == PREDICT_PATH else 400  # request.url is what a Host makes of it
    return json_response({"error": message}, status, headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Make the response for a path or a method that is not served."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.scope['path'][:MOST_PATH]} (GET /docs lists what is served)"
    return json_response({"error": message}, error.status_code, dict(error.headers or {}))


async def answer_nobody(request: Request, _error: Exception) -> Response:
    """Make the response for a client that has gone in the middle of its body; nobody reads it."""
    return Response(status_code=request.scope["state"].get(REFUSED_STATUS, CLIENT_GONE))


async def answer_bug(_request: Request, error: Exception) -> Response:
    """Make the response for an error that nobody foresaw; the server prints its traceback."""
    return json_response({"error": f"the server failed: {type(error).__name__}"}, 500)
