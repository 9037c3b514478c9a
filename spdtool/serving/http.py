"""The HTTP server of a bundle: KServe v2, a plain /predict, and /metrics for Prometheus.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME  /v2/models/NAME/ready
    POST /v2/models/NAME/infer  /predict
    GET  /metrics

Errors are `{"error": "..."}`: 400 what was sent is no inference request, 404 there is no such model, 413 the body is
too large, 422 what was sent to /predict is no request, 503 the queue is full or the server ends.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from spdtool.errors import DataError, SpdError
from spdtool.serving import protocol
from spdtool.serving.batching import Batcher, Closed, Full
from spdtool.serving.classifier import Classifier
from spdtool.serving.protocol import Asked

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
GONE = 499  # the client left; only /metrics sees it
MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
BINARY = "inference-header-content-length"  # the header of the protocol's binary extension


@dataclass(frozen=True)
class Limits:
    """What one request, one batch and the queue may hold.

    Attributes:
        body: bytes of a request.
        texts: texts of a request.
        batch: rows that are computed at once.
        wait: seconds that a row waits for others.
        queue: rows that wait.
    """

    body: int = 2**20
    texts: int = 512
    batch: int = 16
    wait: float = 0.002
    queue: int = 4096


class TooLarge(SpdError):
    """The body of a request is larger than it may be."""


class Meters:
    """Keeps what /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spdtool_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.rows = Counter("spdtool_rows", "Rows that were answered.", registry=self.registry)
        self.seconds = Histogram(
            "spdtool_request_seconds",
            "Seconds from a request's head to its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram("spdtool_batch_rows", "Rows computed at once.", buckets=ROWS, registry=self.registry)
        self.queue = Gauge("spdtool_queue_rows", "Rows that wait or are being computed.", registry=self.registry)


def make(classify: Classifier, name: str, limits: Limits | None = None, workers: int = 1) -> Starlette:
    """The application for one model, which is called `name`; its workers live as long as the application runs."""
    limits, meters = limits or Limits(), Meters()

    @asynccontextmanager
    async def living(app: Starlette) -> AsyncIterator[None]:
        app.state.batcher = batcher = Batcher(
            classify,
            workers=workers,
            max_batch=limits.batch,
            max_wait=limits.wait,
            max_rows=limits.queue,
            observe=meters.batches.observe,
        )
        meters.queue.set_function(lambda: batcher.rows)
        yield
        await asyncio.to_thread(batcher.close)

    async def infer(request: Request) -> Response:
        if BINARY in request.headers:
            raise DataError("the binary extension of the protocol is not spoken here", "send the tensors as JSON")
        asked = protocol.inference(await body(request, limits.body), protocol.outputs(classify), limits.texts)
        classify.refuse_kind(paired=asked.pairs is not None)
        logits = await compute(request.app.state.batcher, asked)
        meters.rows.inc(len(logits))
        return reply(protocol.answer(classify, name, asked, logits))

    async def predict(request: Request) -> Response:
        asked = protocol.plain(await body(request, limits.body), limits.texts)
        classify.refuse_kind(paired=asked.pairs is not None)
        logits = await compute(request.app.state.batcher, asked)
        meters.rows.inc(len(logits))
        return reply({"model": name, "predictions": protocol.predictions(classify, logits)})

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    told = _told(_known(infer, name), meters, "infer", 400)
    routes = [Route(f"{path}/infer", told, methods=["POST"]) for path in MODEL]  # first: paths are tried in this order
    routes.append(Route("/predict", _told(predict, meters, "predict", 422), methods=["POST"]))
    routes += [*_described(classify, name), Route("/metrics", metrics, methods=["GET"])]
    return Starlette(routes=routes, lifespan=living)


async def body(request: Request, most: int) -> bytes:
    """The body of a request, read no further than it may be long.

    Raises:
        TooLarge: it is longer than `most` bytes.
    """
    told = request.headers.get("content-length", "0")
    parts, size = [], int(told) if told.isdigit() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        raise TooLarge(f"the body is larger than {most:,} bytes", "send several requests")
    return b"".join(parts)


async def compute(batcher: Batcher, asked: Asked) -> np.ndarray:
    """The logits of a request, when they are there."""
    return await asyncio.wrap_future(batcher.submit(asked.texts, asked.pairs))


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8"), status, headers, "application/json")


Handler = Callable[[Request], Awaitable[Response]]


def _told(handler: Handler, meters: Meters, route: str, wrong: int) -> Handler:
    """The handler with its errors as responses, counted and timed.

    Args:
        wrong: the status of a request that cannot be understood.
    """

    async def run(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await handler(request)
        except SpdError as error:
            response = _refusal(error, wrong)
        except ClientDisconnect:  # in the middle of its body; nobody reads this answer
            response = Response(status_code=GONE)
        meters.requests.labels(route, str(response.status_code)).inc()
        meters.seconds.observe(time.perf_counter() - started)
        return response

    return run


def _refusal(error: SpdError, wrong: int) -> Response:
    told = {"error": f"{error.message} ({error.hint})" if error.hint else error.message}
    if isinstance(error, TooLarge):
        return reply(told, 413, {"connection": "close"})  # the rest of the body is not read
    if isinstance(error, Full | Closed):
        return reply(told, 503, {"retry-after": "1"})
    if isinstance(error, NoModel):
        return reply(told, 404)
    return reply(told, wrong if isinstance(error, DataError) else 500)


class NoModel(SpdError):
    """The model or its version is not served here."""


def _known(handler: Handler, name: str) -> Handler:
    """The handler behind a path that names the model, and perhaps its version."""

    async def run(request: Request) -> Response:
        asked, version = request.path_params["model"], request.path_params.get("version", protocol.VERSION)
        if asked != name or version != protocol.VERSION:
            raise NoModel(
                f"there is no model {asked!r} of version {version}", f"{name!r} of version {protocol.VERSION} is served"
            )
        return await handler(request)

    return run


def _described(classify: Classifier, name: str) -> list[Route]:
    """The routes that say what is served and whether it is."""
    server = {"name": "spdtool", "version": metadata.version("spdtool"), "extensions": []}
    model = protocol.metadata(classify, name)

    async def ready(_request: Request) -> Response:
        return reply({"name": name, "ready": True})

    async def described(_request: Request) -> Response:
        return reply(model)

    async def about(_request: Request) -> Response:
        return reply(server)

    async def live(_request: Request) -> Response:
        return reply({"live": True})

    async def up(_request: Request) -> Response:
        return reply({"ready": True})

    found: list[tuple[str, Handler]] = [("/v2", about), ("/v2/health/live", live), ("/v2/health/ready", up)]
    for path in MODEL:
        found += [(path, _answering(_known(described, name))), (f"{path}/ready", _answering(_known(ready, name)))]
    return [Route(path, handler, methods=["GET"]) for path, handler in found]


def _answering(handler: Handler) -> Handler:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except SpdError as error:
            return _refusal(error, 400)

    return run
