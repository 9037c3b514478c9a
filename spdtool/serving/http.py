"""The HTTP server of a bundle: KServe v2, a plain /predict, and /metrics for Prometheus.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME  /v2/models/NAME/ready
    POST /v2/models/NAME/infer  /predict
    GET  /metrics

Errors are `{"error": "..."}`: 400 no valid inference request, 404 no such model, 413 the body is too large, 422 no
valid request of /predict, 503 the queue is full or the server is about to end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from spdtool.errors import DataError, SpdError
from spdtool.export.classifier import Classifier
from spdtool.serving import protocol
from spdtool.serving.batching import Batcher, QueueFull, ServerClosing
from spdtool.serving.protocol import InferenceRequest, Json

Handler = Callable[[Request], Awaitable[Response]]

SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
CLIENT_GONE = 499  # the client closed the connection; only /metrics shows it
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
BINARY_HEADER = "inference-header-content-length"  # marks the protocol's binary extension


@dataclass(frozen=True)
class Limits:
    """What one request, one batch and the queue may hold.

    Attributes:
        body: bytes of a request.
        texts: texts of a request.
        batch: rows that are computed at once.
        wait: seconds that a row waits for others.
        queue: rows in the queue.
    """

    body: int = 2**20
    texts: int = 512
    batch: int = 16
    wait: float = 0.002
    queue: int = 4096


class BodyTooLarge(SpdError):
    """The body of a request is larger than allowed."""


class UnknownModel(SpdError):
    """The model or its version is not served here."""


class ServerMetrics:
    """The figures behind /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spdtool_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.rows = Counter("spdtool_rows", "Rows that were answered.", registry=self.registry)
        self.seconds = Histogram(
            "spdtool_request_seconds",
            "Seconds from a request's head to its answer.",
            buckets=SECOND_BUCKETS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "spdtool_batch_rows", "Rows computed at once.", buckets=ROW_BUCKETS, registry=self.registry
        )
        self.queue = Gauge("spdtool_queue_rows", "Rows that wait or are being computed.", registry=self.registry)


def create_app(classify: Classifier, name: str, limits: Limits | None = None, workers: int = 1) -> Starlette:
    """Create the application that serves one model under `name`; its workers live as long as it runs."""
    limits, metrics = limits or Limits(), ServerMetrics()

    # The workers start with the application: threads of a process that is forked later would be lost.
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.batcher = batcher = Batcher(
            classify,
            workers=workers,
            max_batch=limits.batch,
            max_wait=limits.wait,
            max_rows=limits.queue,
            observe=metrics.batches.observe,
        )
        # Asked for when /metrics is read, so that no request has to keep it up to date.
        metrics.queue.set_function(lambda: batcher.rows)
        yield
        await asyncio.to_thread(batcher.close)  # waits for the workers, and must not block the event loop

    async def compute(request: Request, inference: InferenceRequest) -> np.ndarray:
        classify.check_text_count(paired=inference.pairs is not None)
        batcher: Batcher = request.app.state.batcher
        logits = await asyncio.wrap_future(batcher.submit(inference.texts, inference.pairs))
        metrics.rows.inc(len(logits))
        return logits

    async def infer(request: Request) -> Response:
        if BINARY_HEADER in request.headers:
            raise DataError("the binary extension of the protocol is not spoken here", "send the tensors as JSON")
        body = await read_body(request, limits.body)
        inference = protocol.parse_infer(body, protocol.response_outputs(classify), limits.texts)
        logits = await compute(request, inference)
        return json_response(protocol.infer_response(classify, name, inference, logits))

    async def predict(request: Request) -> Response:
        inference = protocol.parse_predict(await read_body(request, limits.body), limits.texts)
        logits = await compute(request, inference)
        return json_response({"model": name, "predictions": [*protocol.predictions(classify, logits)]})

    async def show_metrics(_request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    counted_infer = count_and_time(require_model(infer, name), metrics, "infer", 400)
    routes = [Route(f"{path}/infer", counted_infer, methods=["POST"]) for path in MODEL_PATHS]
    routes.append(Route("/predict", count_and_time(predict, metrics, "predict", 422), methods=["POST"]))
    routes += description_routes(classify, name)
    routes.append(Route("/metrics", show_metrics, methods=["GET"]))
    return Starlette(routes=routes, lifespan=lifespan)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body of a request, no further than it may be long.

    Raises:
        BodyTooLarge: it is longer than `max_bytes`, or its head says so.
    """
    too_large = BodyTooLarge(f"the body is larger than {max_bytes:,} bytes", "send several requests")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:  # refuse before anything is read
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


def count_and_time(handler: Handler, metrics: ServerMetrics, route: str, invalid_status: int) -> Handler:
    """Wrap a handler: its errors become responses, and every request is counted and timed.

    Args:
        invalid_status: status for a request that is not valid.
    """

    async def run(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await handler(request)
        except SpdError as error:
            response = error_response(error, invalid_status)
        except ClientDisconnect:  # in the middle of its body; nobody reads this answer
            response = Response(status_code=CLIENT_GONE)
        metrics.requests.labels(route, str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - started)
        return response

    return run


def error_response(error: SpdError, invalid_status: int) -> Response:
    """Make the response for an error."""
    message = error.message
    if error.hint:
        message += f" ({error.hint})"
    content: Json = {"error": message}
    if isinstance(error, BodyTooLarge):
        return json_response(content, 413, {"connection": "close"})  # the rest of the body is not read
    if isinstance(error, QueueFull | ServerClosing):
        return json_response(content, 503, {"retry-after": "1"})
    if isinstance(error, UnknownModel):
        return json_response(content, 404)
    if isinstance(error, DataError):
        return json_response(content, invalid_status)
    return json_response(content, 500)


def require_model(handler: Handler, name: str) -> Handler:
    """Wrap the handler of a path that names the model and perhaps its version; raises UnknownModel for others."""

    async def run(request: Request) -> Response:
        model = request.path_params["model"]
        version = request.path_params.get("version", protocol.MODEL_VERSION)
        if model != name or version != protocol.MODEL_VERSION:
            raise UnknownModel(
                f"there is no model {model!r} of version {version}",
                f"{name!r} of version {protocol.MODEL_VERSION} is served",
            )
        return await handler(request)

    return run


def description_routes(classify: Classifier, name: str) -> list[Route]:
    """Routes that describe the server and the model, and say that both are ready."""
    server: Json = {"name": "spdtool", "version": metadata.version("spdtool"), "extensions": []}
    model_ready: Json = {"name": name, "ready": True}
    routes = [
        Route("/v2", constant_response(server)),
        Route("/v2/health/live", constant_response({"live": True})),
        Route("/v2/health/ready", constant_response({"ready": True})),
    ]
    for path in MODEL_PATHS:
        for suffix, content in (("", protocol.model_metadata(classify, name)), ("/ready", model_ready)):
            handler = errors_as_responses(require_model(constant_response(content), name))
            routes.append(Route(path + suffix, handler))
    return routes


def constant_response(content: Json) -> Handler:
    """Make a handler that always gives this content."""

    async def run(_request: Request) -> Response:
        return json_response(content)

    return run


def errors_as_responses(handler: Handler) -> Handler:
    """Wrap a handler: its errors become responses."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except SpdError as error:
            return error_response(error, 400)

    return run
