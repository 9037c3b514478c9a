"""The server in its own process: protocol, refusals, concurrency, shutdown."""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spdtool

pytest.importorskip("starlette", reason='pip install "spdtool[serve]"')
pytest.importorskip("uvicorn", reason='pip install "spdtool[serve]"')

from spdtool.errors import RunError
from spdtool.serving import http as http_app
from spdtool.serving import server
from spdtool.serving.batching import EngineDied
from spdtool.serving.connections import ConnectionLimits
from spdtool.serving.watch import BundleChanged

NAME = "toy"
LIMITS = ("--max-texts", "40", "--max-body", "9000", "--max-batch", "4", "--workers", "3")


def start(bundle: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    """Start a server process and return it with its port."""
    command = [sys.executable, "-m", "spdtool", "serve", str(bundle), "--port", "0", "--name", NAME, "--threads", "1"]
    server = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert "is served at http://127.0.0.1:" in line, line + (server.stderr.read() if server.stderr else "")
    return server, int(line.strip().rsplit(":", 1)[1])


def end(process: subprocess.Popen[str]) -> None:
    """Wait for a server after its signal; require exit code 0 and no errors."""
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "every request in flight was answered" in out


@pytest.fixture(scope="module")
def port(older_bundle: Path) -> Iterator[int]:
    server, number = start(older_bundle, *LIMITS)
    yield number
    server.send_signal(signal.SIGTERM)
    end(server)


def call(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send one request and return its status and JSON (or text); bytes are sent unchanged."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if response.headers["content-type"] == "application/json" else text


def tensors(texts: list[str], pairs: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    columns = [("text", texts)] + ([("pair", pairs)] if pairs is not None else [])
    inputs = [{"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data} for name, data in columns]
    return {"inputs": inputs} | fields


def test_the_server_describes_its_model(port: int) -> None:
    assert call(port, "GET", "/v2")[1]["name"] == "spdtool"
    assert call(port, "GET", "/v2/health/live") == (200, {"live": True})
    assert call(port, "GET", "/v2/health/ready") == (200, {"ready": True})
    for path in (f"/v2/models/{NAME}/ready", f"/v2/models/{NAME}/versions/1/ready"):
        assert call(port, "GET", path) == (200, {"name": NAME, "ready": True})
    metadata = call(port, "GET", f"/v2/models/{NAME}")[1]
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["text", "pair"]
    assert {tensor["name"]: tensor["shape"] for tensor in metadata["outputs"]} == {
        "logits": [-1, 3],
        "probabilities": [-1, 3],
        "label": [-1],
    }


def test_v2_inference_equals_the_library(port: int, older_bundle: Path) -> None:
    classify = spdtool.load(older_bundle, threads=1)
    texts, pairs = ["good film", "a meal", "ünïcødé 日本 \u0000"], ["bad", "so cold it was", "🙂"]
    logits = classify.logits(texts, pairs)
    status, answer = call(port, "POST", f"/v2/models/{NAME}/infer", tensors(texts, pairs, id="x7"))
    assert (status, answer["id"], answer["model_name"], answer["model_version"]) == (200, "x7", NAME, "1")
    outputs = {output["name"]: output for output in answer["outputs"]}
    np.testing.assert_allclose(np.reshape(outputs["logits"]["data"], outputs["logits"]["shape"]), logits, atol=1e-5)
    probabilities = np.reshape(outputs["probabilities"]["data"], outputs["probabilities"]["shape"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert outputs["label"]["data"] == classify(texts, pairs)
    nested = tensors(texts)
    nested["inputs"][0] |= {"shape": [3, 1], "data": [[text] for text in texts]}
    answer = call(port, "POST", f"/v2/models/{NAME}/infer", nested | {"outputs": [{"name": "label"}]})[1]
    assert [output["name"] for output in answer["outputs"]] == ["label"]
    assert answer["outputs"][0]["data"] == classify(texts)


def test_the_predict_route_equals_the_library(port: int, older_bundle: Path) -> None:
    classify = spdtool.load(older_bundle, threads=1)
    status, answer = call(port, "POST", "/predict", {"texts": ["good film", "bad"], "pairs": ["x", "y"]})
    assert (status, answer["model"]) == (200, NAME)
    assert [row["label"] for row in answer["predictions"]] == classify(["good film", "bad"], ["x", "y"])
    assert all(1 / 3 <= row["probability"] <= 1 and len(row["logits"]) == 3 for row in answer["predictions"])
    assert call(port, "POST", "/predict", {"texts": []}) == (200, {"model": NAME, "predictions": []})
    empty = call(port, "POST", f"/v2/models/{NAME}/infer", tensors([]))[1]
    assert [output["shape"] for output in empty["outputs"]] == [[0, 3], [0, 3], [0]]


WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("/predict", b"{nope", 422, "is no JSON"),
    "no UTF-8": ("/predict", b"\xff\xfe{}", 422, "is no JSON"),
    "nested without end": ("/predict", b"[" * 8000, 422, "is no JSON"),
    "a list": ("/predict", [1], 422, "a JSON object was expected"),
    "nothing": ("/predict", b"", 422, "is no JSON"),
    "a key twice": ("/predict", b'{"texts": ["a"], "texts": ["b"]}', 422, "a key stands twice in one object"),
    "no texts": ("/predict", {"text": "a"}, 422, "'text'"),
    "one text": ("/predict", {"texts": "a"}, 422, "a list of texts, found str"),
    "a number": ("/predict", {"texts": ["a", 3]}, 422, "texts[1] has to be a text, found int"),
    "fewer pairs": ("/predict", {"texts": ["a", "b"], "pairs": ["c"]}, 422, "2 texts and 1 pairs"),
    "many texts": ("/predict", {"texts": ["a"] * 41}, 422, "41 texts in one request: 40 are the most"),
    "a lone surrogate": ("/predict", b'{"texts": ["\\ud800"]}', 422, "lone surrogate"),
    "an empty text": ("/predict", {"texts": ["a", " "]}, 422, "row 1 has an empty text"),
    "an empty text for infer": (f"/v2/models/{NAME}/infer", tensors([""]), 400, "row 0 has an empty text"),
    "a huge body": ("/predict", {"texts": ["a" * 9000]}, 413, "larger than 9,000 bytes"),
    "another model": ("/v2/models/other/infer", tensors(["a"]), 404, "no model 'other'"),
    "another version": (f"/v2/models/{NAME}/versions/2/infer", tensors(["a"]), 404, "of version 2"),
    "no inputs": (f"/v2/models/{NAME}/infer", {}, 400, "inputs has to be a list"),
    "another input": (f"/v2/models/{NAME}/infer", {"inputs": [{"name": "x"}]}, 400, "the inputs are 'x'"),
    "another type": (
        f"/v2/models/{NAME}/infer",
        {"inputs": [{"name": "text", "datatype": "INT64", "shape": [1], "data": [1]}]},
        400,
        "BYTES was expected",
    ),
    "another shape": (
        f"/v2/models/{NAME}/infer",
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a"]}]},
        400,
        "the shape [2] and 1 elements",
    ),
    "a wide shape": (
        f"/v2/models/{NAME}/infer",
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]},
        400,
        "[rows] or [rows, 1] was expected",
    ),
    "outputs that are no list": (
        f"/v2/models/{NAME}/infer",
        tensors(["a"], outputs={}),
        400,
        "outputs has to be a list",
    ),
    "another output": (
        f"/v2/models/{NAME}/infer",
        tensors(["a"], outputs=[{"name": "scores"}]),
        400,
        "there is no output 'scores'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_requests_are_refused_with_a_reason(kind: str, port: int) -> None:
    path, body, expected, words = WRONG[kind]
    status, answer = call(port, "POST", path, body)
    assert status == expected
    assert words in answer["error"]


@pytest.mark.parametrize("kind", ["single", "servable"])
def test_one_text_or_two_is_what_the_task_had(kind: str, request: pytest.FixtureRequest) -> None:
    names = ["text"] if kind == "single" else ["text", "pair"]
    server, port = start(request.getfixturevalue(kind))
    answer = call(port, "GET", f"/v2/models/{NAME}")[1]
    assert [tensor["name"] for tensor in answer["inputs"]] == names
    for texts in (["good film"], []):
        for with_pairs in (False, True):
            is_accepted = with_pairs == (len(names) == 2)
            pairs = texts if with_pairs else None
            request_body = {"texts": texts} | ({"pairs": pairs} if with_pairs else {})
            status, answer = call(port, "POST", "/predict", request_body)
            assert (status, "the model takes" in answer.get("error", "")) == (
                (200, False) if is_accepted else (422, True)
            )
            status, answer = call(port, "POST", f"/v2/models/{NAME}/infer", tensors(texts, pairs))
            assert (status, "the model takes" in answer.get("error", "")) == (
                (200, False) if is_accepted else (400, True)
            )
    server.send_signal(signal.SIGTERM)
    end(server)


def test_a_chunked_body_over_the_limit_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as plug:
        plug.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        plug.sendall(b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(4)))
        assert b" 413 " in plug.recv(1000)


def test_the_binary_extension_is_refused(port: int) -> None:
    headers = {"Inference-Header-Content-Length": "10"}
    status, answer = call(port, "POST", f"/v2/models/{NAME}/infer", tensors(["a"]), **headers)
    assert (status, "binary extension" in answer["error"]) == (400, True)


def test_64_clients_get_their_own_answers(port: int, older_bundle: Path) -> None:
    words = ("good", "bad", "film", "book", "meal", "very", "cold", "warm")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=1 + index % 23)) for index in range(640)]
    expected = spdtool.load(older_bundle, threads=1).logits(texts)
    assert len({tuple(row) for row in expected.round(4).tolist()}) > 500  # a mix-up would be seen

    def client(number: int) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        worst = 0.0
        for start in range(number * 10, number * 10 + 10, 2):
            connection.request("POST", "/predict", json.dumps({"texts": texts[start : start + 2]}))
            predictions = json.loads(connection.getresponse().read())["predictions"]
            logits = np.array([row["logits"] for row in predictions])
            worst = max(worst, float(np.abs(logits - expected[start : start + 2]).max()))
        connection.close()
        return worst

    with ThreadPoolExecutor(64) as pool:
        assert max(pool.map(client, range(64))) < 1e-4


def test_clients_that_disconnect_do_not_affect_others(port: int) -> None:
    body = json.dumps({"texts": ["good film"] * 40}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for request in (head + body, head + body[:20], head[:30]):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), 10) as plug:
                plug.sendall(request)
    assert call(port, "POST", "/predict", {"texts": ["bad"]})[0] == 200


def test_metrics_count_requests_and_rows(port: int) -> None:
    call(port, "POST", "/predict", {"texts": ["a", "b"]})
    call(port, "POST", "/predict", b"{")
    status, text = call(port, "GET", "/metrics")
    assert status == 200
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(metrics['spdtool_requests_total{route="predict",status="200"}']) >= 1
    assert float(metrics['spdtool_requests_total{route="predict",status="422"}']) >= 1
    assert float(metrics["spdtool_rows_total"]) >= 2
    assert float(metrics["spdtool_batch_rows_count"]) >= 1
    assert float(metrics['spdtool_batch_rows_bucket{le="4.0"}']) == float(metrics["spdtool_batch_rows_count"])
    assert float(metrics["spdtool_request_seconds_count"]) >= 2
    assert float(metrics["spdtool_queue_rows"]) == 0


def test_a_full_queue_gets_503_and_sigterm_finishes_requests_in_flight(older_bundle: Path) -> None:
    server, port = start(older_bundle, "--max-queue", "3", "--max-batch", "64", "--max-wait-ms", "1500")
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(call, port, "POST", "/predict", {"texts": ["good film", "bad"]})
        while "spdtool_queue_rows 2.0" not in call(port, "GET", "/metrics")[1]:
            assert not waiting.done()
        status, answer = call(port, "POST", "/predict", {"texts": ["a", "b"]})
        assert (status, "2 rows wait already; 3 may" in answer["error"]) == (503, True)
        server.send_signal(signal.SIGTERM)
        status, answer = waiting.result(30)
        assert (status, len(answer["predictions"])) == (200, 2)
    end(server)
    with pytest.raises(ConnectionRefusedError):
        call(port, "GET", "/v2")


def test_the_process_ends_with_an_error_when_a_worker_has_died(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    shutdown = server.Shutdown()
    app = http_app.Application(stand_in(), NAME, options=http_app.AppOptions(on_death=shutdown.request))
    listener = server.open_listener("127.0.0.1", 0)
    port = listener.getsockname()[1]

    def break_it() -> tuple[int, Any]:
        call(port, "GET", "/v2")  # it has started
        assert app.batcher is not None
        app.batcher._observe = None  # type: ignore[assignment]  # a bug that no request is to blame for
        return call(port, "POST", "/predict", {"texts": ["good film"]})

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(break_it)
        with pytest.raises(EngineDied, match="a worker thread has ended"):
            server.run_until_signal(app, listener, shutdown)
        assert answer.result(10)[0] == 503


def test_the_server_reports_requests_unanswered_at_shutdown(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 1)
    monkeypatch.setattr(http_app, "CLOSE_SECONDS", 0.1)
    classify, shutdown = stand_in(), server.Shutdown()
    classify.gate.clear()
    app = http_app.Application(classify, NAME)
    listener = server.open_listener("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(call, port, "POST", "/predict", {"texts": ["good film"]})

        def end_it() -> None:
            while app.batcher is None or app.batcher.rows == 0:
                time.sleep(0.01)
            shutdown.request()

        pool.submit(end_it)
        with pytest.raises(RunError, match="1 requests in flight were not answered"):
            server.run_until_signal(app, listener, shutdown)
        status, answer = waiting.result(10)
        assert (status, "has ended before" in answer["error"]) == (503, True)
    classify.gate.set()


def test_a_client_that_has_its_answer_is_not_reported_at_shutdown(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 1)
    shutdown = server.Shutdown()
    limits = http_app.Limits(connection=ConnectionLimits(body_seconds=0.5))
    listener = server.open_listener("127.0.0.1", 0)
    app = http_app.Application(stand_in(), NAME, limits)
    with socket.socket() as plug, ThreadPoolExecutor(1) as pool:

        def send_half_a_body() -> None:
            plug.connect(listener.getsockname())
            plug.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            while app.batcher is None:
                time.sleep(0.01)
            time.sleep(0.1)
            shutdown.request()

        pool.submit(send_half_a_body)
        server.run_until_signal(app, listener, shutdown)
        assert plug.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_an_ipv6_address_is_printed_as_a_url_has_it(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        server.open_listener("::1", 0).close()
    except RunError:
        pytest.skip("this machine has no IPv6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "run_until_signal", lambda _app, listener, _shutdown: listener.close())
        served = server.serve_bundle(single, server.ServerOptions(host="::1", port=0, threads=1))
    assert served.address.startswith("http://[::1]:")


def test_a_signal_during_startup_stops_the_server(stand_in: Any) -> None:
    shutdown = server.Shutdown()
    with shutdown.signals():
        signal.raise_signal(signal.SIGTERM)
    assert shutdown.requested
    server.run_until_signal(http_app.Application(stand_in(), NAME), server.open_listener("127.0.0.1", 0), shutdown)


def test_a_folder_that_changes_while_it_is_opened_is_refused(
    older_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(older_bundle, tmp_path / "bundle")
    options = server.ServerOptions(variant="onnx")
    server.open_unchanging(folder, 1, options)[1].check()
    load = server.load

    def load_and_change(*arguments: Any, **options: Any) -> Any:
        classify = load(*arguments, **options)
        (folder / "golden.json").touch()
        return classify

    monkeypatch.setattr(server, "load", load_and_change)
    with pytest.raises(BundleChanged, match="golden.json has changed"):
        server.open_unchanging(folder, 1, options)


def test_only_loopback_hosts_are_allowed_unless_the_address_is_public() -> None:
    loopback_names = {"localhost", "127.0.0.1", "[::1]"}
    for host, allowed, expected in (
        ("127.0.0.1", (), loopback_names),
        ("localhost", (), loopback_names),
        ("::1", (), loopback_names),
        ("127.0.0.2", (), loopback_names | {"127.0.0.2"}),
        ("127.1", (), loopback_names | {"127.1"}),
        ("LOCALHOST", (), loopback_names),
        ("::ffff:127.0.0.1", (), loopback_names | {"[::ffff:127.0.0.1]"}),
        ("127.0.0.1", ("Model.example",), loopback_names | {"model.example"}),
        ("127.0.0.1", ("*",), set()),
        ("0.0.0.0", (), set()),
        ("0.0.0.0", ("model.example",), {"0.0.0.0", "model.example"}),
    ):
        with server.open_listener(host, 0) as listener:
            loopback = server.is_loopback(listener.getsockname()[0])
        assert server.hosts_to_allow(host, allowed, loopback=loopback) == expected, (host, allowed)


def test_the_limit_of_open_files_is_raised_for_the_connections() -> None:
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard_limit))
        server.allow_open_files(512)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 512 + server.OTHER_FILES
        with pytest.raises(RunError, match=f"this process may have {hard_limit}"):
            server.allow_open_files(hard_limit)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))


def test_the_access_log_can_be_switched_on(older_bundle: Path) -> None:
    process, port = start(older_bundle, "--access-log", "--allow-host", "model.example")
    assert call(port, "GET", "/v2", Host="model.example")[0] == 200
    assert call(port, "GET", "/v2/%1b[31m", Host="evil.example")[0] == 421
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert '"GET /v2" 200' in out
    assert '"GET /v2/%1b[31m" 421' in out


def test_a_log_that_nobody_can_write_stops_no_server(older_bundle: Path) -> None:
    process, port = start(older_bundle, "--access-log")
    assert process.stdout is not None
    process.stdout.close()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(3):
        connection.request("GET", "/v2")
        assert json.loads(connection.getresponse().read())["name"] == "spdtool"
    connection.close()
    process.kill()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    process.wait(10)


def test_threads_are_shared_among_the_workers() -> None:
    assert [server.share_threads(0, threads, "cpu") for threads in (1, 2, 4, 16)] == [(1, 1), (2, 1), (4, 1), (4, 4)]
    assert [server.share_threads(workers, 4, "cpu") for workers in (1, 3, 8)] == [(1, 4), (3, 1), (8, 1)]
    assert server.share_threads(0, 8, "cuda") == (1, 8)


def test_a_public_address_is_recognised_and_a_used_port_is_an_error(older_bundle: Path) -> None:
    assert not server.is_loopback("0.0.0.0")
    assert all(map(server.is_loopback, ("127.0.0.1", "::1", "::ffff:127.0.0.1")))
    with server.open_listener("127.0.0.1", 0) as listener, pytest.raises(RunError, match="cannot be listened to"):
        server.open_listener("127.0.0.1", listener.getsockname()[1])


def test_every_option_of_the_command_reaches_the_server(
    spdtool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served_options: list[server.ServerOptions] = []

    def serve_bundle(_bundle: Path, options: server.ServerOptions) -> server.Served:
        served_options.append(options)
        return server.Served("toy", "onnx/model.onnx", "http://127.0.0.1:8000", 1, 1)

    monkeypatch.setattr(server, "serve_bundle", serve_bundle)
    limits = ("--max-batch", 4, "--max-wait-ms", 3, "--max-queue", 5, "--max-texts", 6, "--max-body", 7)
    result = spdtool("serve", tmp_path, *limits, "--max-connections", 8, "--allow-host", "a", "--variant", "onnx")
    assert result.exit_code == 0, result.output
    (options,) = served_options
    assert options.limits == {"batch": 4, "wait": 0.003, "queue": 5, "texts": 6}
    assert options.connection_limits == {"body": 7, "connections": 8}
    assert (options.allowed_hosts, options.variant, options.provider, options.port) == (("a",), "onnx", "cpu", 8000)
