"""The figures behind /metrics, and the layer around the application that counts, times and logs every request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
REFUSED_ROUTE = "refused"  # of answers that no application gave
UNKNOWN_ROUTE = "unknown"
NO_ANSWER = 500  # of an application that ended without a status

WriteLine = Callable[[str], None]


class ServerMetrics:
    """The figures behind /metrics.

    Attributes:
        cut: requests that were not answered because the server ended.
    """

    def __init__(self) -> None:
        self.cut = 0
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


class ObserveRequests:
    """Counts and times every request of an application, and logs it if a log is wanted.

    Args:
        routes: the label of each endpoint in the metrics.
        log: called with one line a request; None: there is no access log.
    """

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, routes: Mapping[object, str], log: WriteLine | None = None
    ) -> None:
        self._app, self._metrics, self._routes, self._log = app, metrics, routes, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def observe_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe_and_send)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            self._metrics.cut += 1
            if not status:
                await send_ending(observe_and_send)
        finally:
            seconds = time.perf_counter() - started
            route = self._routes.get(scope.get("endpoint"), UNKNOWN_ROUTE)
            self._metrics.requests.labels(route, str(status or NO_ANSWER)).inc()
            self._metrics.seconds.observe(seconds)
            if self._log is not None:
                client = scope.get("client") or ("-",)
                # The path as it was sent is ASCII with percent signs: nothing in it can steer a terminal.
                path = scope["raw_path"].decode("ascii", "replace")
                self._log(f'{client[0]} "{scope["method"]} {path}" {status or NO_ANSWER} {1000 * seconds:.1f} ms')

    def count_refusal(self, status: int, client: str) -> None:
        """Count and log an answer that no application gave."""
        self._metrics.requests.labels(REFUSED_ROUTE, str(status)).inc()
        if self._log is not None:
            self._log(f'{client} "-" {status}')


async def send_ending(send: Send) -> None:
    """Answer that the server has ended before the answer was there."""
    body = json.dumps({"error": "the server has ended before the answer was there"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
