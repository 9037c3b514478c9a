"""Fuzz `spdtool serve` with altered requests from concurrent clients, for a given time.

    make fuzz
    python tests/fuzz_http.py RUN/export/bundle --seconds 3600

Bytes of valid requests are flipped, cut, doubled and joined, and values in their JSON are replaced. Requests are sent
in chunks, pipelined, or by clients that disconnect. Every answer must be HTTP with an expected status (never 500),
every error must be JSON, and valid requests in between must get the same answer as before. `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak_http import MOST_GROWTH, ServerProcess, serving

CLIENTS = 8
STATUSES = {200, 400, 404, 405, 408, 413, 421, 422, 431, 503}
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, "", " ", "\ud800", "\x00", "a" * 5000, [], {}, [[]], [None], ["a"],
    {"name": "text"}, "text", "BYTES", [2], [0], [1, 1], [-1], "😀", "\u202e", "[PAD]", "[CLS] [SEP]",
)  # fmt: skip
ODD_BYTES = (
    b"\r\n", b"\n", b"\r\n\r\n", b"\x00", b"\xff", b":", b" ", b"%", b"%00", b"%ff", b"?", b"#", b"//", b"..", b"0",
    b"-1", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"Host: localhost\r\n", b"0\r\n\r\n", b"ffffffff\r\n", b"HTTP/1.0", b"HTTP/2.0", b"HEAD ", b"OPTIONS ", b"TRACE ",
)  # fmt: skip


def valid_requests(name: str) -> list[tuple[str, str, Any]]:
    """Requests that are answered with 200: method, path, JSON or None."""
    tensors = []
    for tensor in ("text", "pair"):
        tensors.append({"name": tensor, "shape": [2], "datatype": "BYTES", "data": ["a cat", "the dog saw it"]})
    infer = {"id": "7", "inputs": tensors, "outputs": [{"name": "label"}, {"name": "logits"}]}
    return [
        ("POST", "/predict", {"texts": ["a cat", "a dog"], "pairs": ["it was", "not seen"]}),
        ("POST", f"/v2/models/{name}/infer", infer),
        ("POST", f"/v2/models/{name}/versions/1/infer", {"inputs": tensors}),
        ("GET", f"/v2/models/{name}", None),
        ("GET", "/v2/health/ready", None),
        ("GET", "/docs", None),
        ("GET", "/metrics", None),
    ]


class Fuzzer:
    """Makes requests from valid ones."""

    def __init__(self, seed: int, name: str) -> None:
        self._draw, self._valid = random.Random(seed), valid_requests(name)

    def connection(self) -> tuple[list[bytes], bool]:
        """Draw the chunks that one client sends, and whether it half-closes the connection afterwards."""
        data = b"".join(self._request() for _ in range(self._draw.choice((1, 1, 1, 2, 4))))
        if self._draw.random() < 0.2:
            data = data[: self._draw.randrange(len(data) + 1)]
        chunks = [data]
        if self._draw.random() < 0.3:
            cuts = sorted(self._draw.randrange(len(data) + 1) for _ in range(self._draw.randrange(1, 6)))
            chunks = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        return chunks, self._draw.random() < 0.7

    def _request(self) -> bytes:
        method, path, value = self._draw.choice(self._valid)
        if value is not None and self._draw.random() < 0.6:
            value = self._alter_value(json.loads(json.dumps(value)))
        body = b"" if value is None else json.dumps(value).encode()
        if self._draw.random() < 0.2:
            body = self._alter_bytes(body)
        host = self._draw.choice(("localhost", "localhost", "localhost", "evil.example", ""))
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n".encode()
        if self._draw.random() < 0.2:
            size = self._draw.randrange(1, 30)
            chunks = [body[start : start + size] for start in range(0, len(body), size)]
            head += b"Transfer-Encoding: chunked\r\n"
            body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        elif body:
            head += f"Content-Length: {len(body)}\r\n".encode()
        if self._draw.random() < 0.4:
            head = self._alter_bytes(head)
        return head + b"\r\n" + body

    def _alter_value(self, value: Any) -> Any:
        """Replace, drop or repeat something in a JSON value."""
        if self._draw.random() < 0.25 or not isinstance(value, list | dict) or not value:
            return self._draw.choice(ODD_VALUES)
        if isinstance(value, list):
            index = self._draw.randrange(len(value))
            if self._draw.random() < 0.3:
                return value * self._draw.choice((0, 2, 300))
            value[index] = self._alter_value(value[index])
            return value
        key = self._draw.choice([*value])
        if self._draw.random() < 0.2:
            value[self._draw.choice(("", "extra", "\ud800", "texts", "inputs"))] = value.pop(key)
        else:
            value[key] = self._alter_value(value[key])
        return value

    def _alter_bytes(self, data: bytes) -> bytes:
        """Flip, drop, repeat or insert bytes."""
        altered = bytearray(data)
        for _ in range(self._draw.choice((1, 1, 2, 5))):
            position, length = self._draw.randrange(len(altered) + 1), self._draw.randrange(1, 20)
            alteration = self._draw.randrange(4)
            if alteration == 0 and altered:
                altered[position % len(altered)] = self._draw.randrange(256)
            elif alteration == 1:
                del altered[position : position + length]
            elif alteration == 2:
                altered[position:position] = altered[position : position + length] * self._draw.choice((1, 3, 2000))
            else:
                altered[position:position] = self._draw.choice(ODD_BYTES)
        return bytes(altered)


def send(port: int, chunks: list[bytes], half_close: bool) -> bytes:
    """Send the chunks and return the answer; a client that does not half-close disconnects and returns b""."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), 60) as plug:
        plug.settimeout(60)
        try:
            for chunk in chunks:
                plug.sendall(chunk)
                if len(chunks) > 1:
                    time.sleep(0.001)  # so that the server reads them one by one
            if not half_close:
                return b""
            plug.shutdown(socket.SHUT_WR)
            while received := plug.recv(65536):
                answer += received
        except TimeoutError:
            raise
        except OSError:  # it was refused before all was sent
            pass
    return answer


def check_answers(answer: bytes, count: Callable[[int], None]) -> str | None:
    """Parse the answers of one connection; return a description of the first problem, or None."""
    while answer:
        head, separator, remaining = answer.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        if not separator or not head.startswith(b"HTTP/1.1 ") or not words[1].isdigit():
            return "no HTTP"
        status = int(words[1])
        if status == 100:
            answer = remaining
            continue
        count(status)
        if status not in STATUSES:
            return f"status {status}"
        headers = {}
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b": ")
            headers[name.lower()] = value
        body = remaining[: int(headers.get(b"content-length", b"0"))]
        # An answer to HEAD has the length of a body that is not sent.
        if status >= 400 and body and not body.startswith(b"HTTP/1.1 ") and "error" not in json.loads(body):
            return "an error that is no JSON"
        if body.startswith(b"HTTP/1.1 ") or not body:
            body = b""
        answer = remaining[len(body) :]
    return None


def fuzz(server: ServerProcess, seed: int, deadline: float, counts: Counter[str], problems: list[str]) -> None:
    """Fuzz from one client until the deadline or the first problem of any client."""
    fuzzer = Fuzzer(seed, server.name)
    method, path, value = valid_requests(server.name)[0]
    first: Any = None
    while time.monotonic() < deadline and not problems:
        chunks, half_close = fuzzer.connection()
        try:
            problem = check_answers(send(server.port, chunks, half_close), lambda s: counts.update([str(s)]))
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error} ({time.monotonic() - deadline:.0f} s before the end)"
        counts["connections"] += 1
        if problem is None and counts["connections"] % 50 == 0:
            connection = server.connect()
            connection.request(method, path, json.dumps(value))
            answer = json.loads(connection.getresponse().read())
            connection.close()
            labels = [row["label"] for row in answer.get("predictions", [])]
            first = first or labels
            if labels != first or server.get("/v2/health/ready")[0] != 200:
                problem = f"a sane request was answered {answer}"
        if problem is not None:
            problems.append(f"{problem}, after {chunks!r}, seed {seed}")


def main() -> None:
    """Fuzz, and print the number of answers by status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    problems: list[str] = []
    with serving(options.bundle) as server:
        deadline = time.monotonic() + options.seconds
        threads = []
        for number in range(CLIENTS):
            arguments = (server, options.seed * CLIENTS + number, deadline, counts, problems)
            threads.append(threading.Thread(target=fuzz, args=arguments))
            threads[-1].start()
        time.sleep(min(10.0, options.seconds / 10))
        before = server.megabytes()
        for thread in threads:
            thread.join()
        growth = server.megabytes() - before
        print(json.dumps({"seconds": options.seconds, "growth_mb": growth} | dict(sorted(counts.items()))))
        assert not problems, problems[0]
        assert growth < MOST_GROWTH, f"resident memory grew by {growth} MB"


if __name__ == "__main__":
    main()
