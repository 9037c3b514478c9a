"""Soak test of `spdtool serve`: concurrent valid and invalid requests, and schemathesis on its OpenAPI document.

    make test-soak
    python tests/soak_http.py RUN/export/bundle --requests 20000 --schemathesis .venv-soak/bin/schemathesis

Every answer must equal the library's, /metrics must count each one, memory must not grow, and SIGTERM must end the
server with exit code 0 and an empty standard error.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import spdtool

CLIENTS = 16
TOLERANCE = 1e-3  # logits depend a little on the batch that a row is computed in
MOST_GROWTH = 200  # MB of resident memory after the first tenth of the requests
WORDS = ("the", "a", "cat", "dog", "film", "meal", "good", "bad", "very", "cold", "saw", "was", "by", "日本", "ünïcødé")
# The schema cannot express that pairs, texts and the shape must have equal lengths.
UNEXPRESSED = "positive_data_acceptance"


@dataclass
class ServerProcess:
    """A running `spdtool serve`."""

    process: subprocess.Popen[str]
    port: int
    name: str = "toy"

    def connect(self) -> http.client.HTTPConnection:
        """Open a new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def get(self, path: str) -> tuple[int, str]:
        """Send a GET request; return its status and text."""
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def megabytes(self) -> int:
        """Resident memory in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
        raise AssertionError("the server has no resident memory")

    def counted(self) -> Counter[str]:
        """Read the counts of answers by status from /metrics."""
        counts: Counter[str] = Counter()
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith("spdtool_requests_total{"):
                status = line.split('status="')[1].split('"')[0]
                counts[status] += int(float(line.rsplit(" ", 1)[1]))
        return counts


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[ServerProcess]:
    """Run a server during the block; require that it survives the block and ends cleanly."""
    command = [sys.executable, "-m", "spdtool", "serve", str(bundle), "--port", "0", "--name", "toy", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "is served at" in line, line
    try:
        yield ServerProcess(process, int(line.strip().rsplit(":", 1)[1]))
        assert process.poll() is None, "the server has ended"
    finally:
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=90)
    assert process.returncode == 0, (process.returncode, errors)
    assert "every request in flight was answered" in out, out
    assert errors == "", errors


class Client:
    """One client of the soak test, with its connection and counts.

    Attributes:
        answered: number of answers by status.
        left: number of requests that the client abandoned before the answer.
    """

    def __init__(self, server: ServerProcess, seed: int, rows: list[tuple[str, str]], logits: np.ndarray) -> None:
        self._server, self._draw, self._rows, self._logits = server, random.Random(seed), rows, logits
        self._connection = server.connect()
        self.answered: Counter[int] = Counter()
        self.left = 0

    def run(self, requests: int) -> Client:
        """Send that many requests, one after the other."""
        for _ in range(requests):
            kind = self._draw.random()
            if kind < 0.9:
                self._ask_rightly()
            elif kind < 0.98:
                self._ask_wrongly()
            else:
                self._leave()
        self._connection.close()
        return self

    def _send(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, data)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        self.answered[response.status] += 1
        return response.status, answer

    def _ask_rightly(self) -> None:
        indices = self._draw.choices(range(len(self._rows)), k=self._draw.choice((0, 1, 1, 1, 2, 5, 20)))
        texts, pairs = [self._rows[index][0] for index in indices], [self._rows[index][1] for index in indices]
        if self._draw.random() < 0.5:
            status, answer = self._send("/predict", {"texts": texts, "pairs": pairs})
            assert status == 200, answer
            logits = [row["logits"] for row in answer["predictions"]]
        else:
            inputs = []
            for name, column in (("text", texts), ("pair", pairs)):
                inputs.append({"name": name, "shape": [len(column)], "datatype": "BYTES", "data": column})
            status, answer = self._send(f"/v2/models/{self._server.name}/infer", {"inputs": inputs, "id": "x"})
            assert status == 200, answer
            outputs = {output["name"]: output for output in answer["outputs"]}
            logits = np.reshape(outputs["logits"]["data"], outputs["logits"]["shape"]).tolist()
        if indices:
            assert np.abs(np.array(logits) - self._logits[indices]).max() <= TOLERANCE, (texts, pairs)

    def _ask_wrongly(self) -> None:
        path, body, expected = self._draw.choice(
            (
                ("/predict", b"{", 422),
                ("/predict", {"texts": [1]}, 422),
                ("/predict", {"texts": ["a"], "pairs": []}, 422),
                ("/predict", b'{"texts": ["\\ud800"]}', 422),
                ("/predict", {"texts": [" "], "pairs": ["a"]}, 422),
                ("/v2/models/toy/infer", {"inputs": []}, 400),
                ("/v2/models/other/infer", {"inputs": []}, 404),
                ("/nowhere", {}, 404),
            )
        )
        status, answer = self._send(path, body)
        assert (status, bool(answer["error"])) == (expected, True), (path, body, answer)

    def _leave(self) -> None:
        body = json.dumps({"texts": [self._rows[0][0]], "pairs": [self._rows[0][1]]}).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        request = head + body
        with socket.create_connection(("127.0.0.1", self._server.port), 60) as plug:
            plug.sendall(request[: self._draw.randrange(1, len(request) + 1)])
        self.left += 1


def soak(bundle: Path, requests: int) -> dict[str, Any]:
    """Send the requests from concurrent clients; return the measurements."""
    draw = random.Random(0)
    rows = []
    for _ in range(400):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randrange(1, 40))) for _ in range(2))
        rows.append((first, second))
    logits = spdtool.load(bundle, threads=1).logits([first for first, _ in rows], [second for _, second in rows])
    with serving(bundle) as server:
        start, before = time.monotonic(), 0
        answered: Counter[str] = Counter()
        disconnected = 0
        for share in (0.1, 0.9):
            clients = [Client(server, round(10 * share) + 100 * seed, rows, logits) for seed in range(CLIENTS)]
            with ThreadPoolExecutor(CLIENTS) as pool:
                for client in pool.map(
                    lambda client, share=share: client.run(round(share * requests / CLIENTS)), clients
                ):
                    answered.update({str(status): count for status, count in client.answered.items()})
                    disconnected += client.left
            before = before or server.megabytes()
        seconds, growth = time.monotonic() - start, server.megabytes() - before
        counts = server.counted()
        # Abandoned requests may have been answered, or refused because they were incomplete.
        surplus = counts - answered
        assert answered - counts == Counter(), (answered, counts)
        assert set(surplus) <= {"200", "400", "499"}, surplus
        assert sum(surplus.values()) <= disconnected + 2, (
            surplus,
            disconnected,
        )  # and /metrics itself, after each share
        assert growth < MOST_GROWTH, f"resident memory grew by {growth} MB"
        assert server.get("/v2/health/ready")[0] == 200
    return {"answered": dict(answered), "left": disconnected, "seconds": round(seconds, 1), "growth_mb": growth}


def check_schema(bundle: Path, schemathesis: Path, examples: int) -> None:
    """Run schemathesis against a server."""
    with serving(bundle) as server:
        command = [str(schemathesis), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "all"]
        command += ["--exclude-checks", UNEXPRESSED, "--max-examples", str(examples), "--seed", "0"]
        process = subprocess.run(command, env=os.environ | {"NO_COLOR": "1"}, check=False)
        assert process.returncode == 0, f"schemathesis ended with the code {process.returncode}"


def main() -> None:
    """Run the soak test and schemathesis, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--schemathesis", type=Path, help="its executable; without it, only the soak is run")
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis, for each operation")
    options = parser.parse_args()
    if options.schemathesis is not None:
        check_schema(options.bundle, options.schemathesis, options.examples)
    print(json.dumps(soak(options.bundle, options.requests)))


if __name__ == "__main__":
    main()
