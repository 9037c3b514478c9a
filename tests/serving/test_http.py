"""The HTTP application: pages, errors, allowed hosts, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install "spdtool[serve]"')

from spdtool.errors import DataError
from spdtool.serving import http
from spdtool.serving.metrics import ObserveRequests, ServerMetrics
from spdtool.serving.watch import BundleChanged, FolderWatch, stamp_files
from spdtool.tasks.decision import OneLabel, OneNumber, SeveralLabels

EVIL = '<script>alert("x")</script>\x1b[31m'


def test_every_failure_answers_its_own_request_and_the_server_goes_on(serve: Callable) -> None:
    running = serve()
    for text, message in (("panic", "the tokenizer panicked"), ("another shape", "the shape [1, 7], not [1, 2]")):
        status, _, answer = running.call("POST", "/predict", {"texts": [text]})
        assert (status, message in answer["error"]) == (500, True), text
        assert running.call("POST", "/predict", {"texts": ["good film"]})[0] == 200
        assert running.call("GET", "/v2/health/ready")[0] == 200
    assert running.statuses() == {"predict 500": 2, "predict 200": 2, "ready 200": 2}


def test_a_dead_worker_makes_the_server_unready(serve: Callable) -> None:
    deaths: list[str] = []
    running = serve(options=http.AppOptions(on_death=lambda: deaths.append("died")))
    running.app.batcher._observe = None  # not callable: a bug that no request is to blame for
    status, _, answer = running.call("POST", "/predict", {"texts": ["good film"]})
    assert (status, "a worker thread has ended" in answer["error"]) == (503, True)
    for path in ("/v2/health/ready", "/v2/models/toy/ready"):
        status, _, answer = running.call("GET", path)
        assert (status, "a worker thread has ended" in answer["error"]) == (503, True)
    assert running.call("GET", "/v2/health/live")[0] == 200
    assert deaths == ["died"]


def test_a_lone_surrogate_anywhere_is_refused(serve: Callable) -> None:
    running = serve()
    tensor = '{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}'
    infer, predict = "/v2/models/toy/infer", "/predict"
    for path, body in (
        (infer, f'{{"id": "\\ud800", "inputs": [{tensor}]}}'),
        (infer, '{"inputs": [{"name": "\\uDFFF"}]}'),
        (infer, f'{{"inputs": [{tensor}], "outputs": [{{"name": "\\ud800"}}]}}'),
        (predict, '{"\\ud800": 1}'),
        (predict, '{"texts": ["\\udc00"]}'),
    ):
        status, _, answer = running.call("POST", path, body.encode())
        assert (status, "lone surrogate" in answer["error"]) == (400 if path == infer else 422, True), body
    for body in (b'{"texts": ["\xed\xa0\x80"]}', '{"texts": ["a"]}'.encode("utf-16")):
        assert running.call("POST", predict, body)[0] == 422
    # A surrogate pair is one character, and a leading byte order mark is not part of the text.
    for body in (b'{"texts": ["\\ud83d\\ude00"]}', '\ufeff{"texts": ["a"]}'.encode()):
        assert running.call("POST", predict, body)[0] == 200


def test_every_error_is_json_and_is_counted(serve: Callable) -> None:
    running = serve()
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/predict/", 404),
        ("GET", "/v2/models/%1b%5b31m", 404),
        ("GET", "/v2/models/%ff%ed%a0%80/ready", 404),
        ("GET", "/predict", 405),
        ("DELETE", "/v2", 405),
    ):
        answer_status, headers, answer = running.call(method, path)
        assert (answer_status, headers["content-type"]) == (status, "application/json"), path
        assert answer["error"], path
        assert ("allow" in headers) == (status == 405), path
    assert sum(running.statuses().values()) == 6


def test_the_host_of_a_request_changes_nothing_but_whether_it_is_answered(serve: Callable) -> None:
    running = serve()
    for host in ("[", "localhost/predict?", "http://[::", "a b", "%", "#"):
        assert running.call("GET", "/nowhere", host=host)[0] == 404, host
        assert running.call("POST", "/v2/models/toy/infer", b"{", host=host)[0] == 400, host
        assert running.call("POST", "/predict", b"{", host=host)[0] == 422, host


def test_a_compressed_body_is_refused_as_one(serve: Callable) -> None:
    running = serve()
    for coding, status in (("gzip", 415), ("br, gzip", 415), ("identity", 200), ("", 200)):
        headers = {"Content-Encoding": coding}
        answer_status, answer_headers, answer = running.call("POST", "/predict", {"texts": ["a"]}, **headers)
        assert answer_status == status, coding
        if status == 415:
            assert (answer_headers["accept-encoding"], "compressed" in answer["error"]) == ("identity", True)


def test_an_error_repeats_little_of_a_large_request(serve: Callable) -> None:
    running = serve()
    infer, long_name = "/v2/models/toy/infer", "a" * 100_000
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    for path, body in (
        ("/" + "a" * 50_000, None),
        (f"/v2/models/{'a' * 30_000}/versions/{'b' * 30_000}", None),
        ("/predict", {str(number): 1 for number in range(10_000)}),
        ("/predict", {long_name: 1}),
        (infer, {"inputs": [tensor | {"name": long_name}]}),
        (infer, {"inputs": [tensor | {"name": str(number)} for number in range(1000)]}),
        (infer, {"inputs": [tensor | {"name": long_name}] * 2}),
        (infer, {"inputs": [tensor | {"datatype": "\x7f" * 100_000}]}),
        (infer, {"inputs": [tensor | {"shape": [[1] * 100] * 1000}]}),
        (infer, {"inputs": [tensor], "outputs": [{"name": long_name}]}),
        (infer, {"inputs": [tensor], "id": [long_name] * 2}),
    ):
        status, _, answer = running.call("GET" if body is None else "POST", path, body)
        assert 400 <= status < 500, path[:50]
        assert len(answer["error"]) < 500, answer["error"][:1000]


def test_json_of_any_depth_is_read_or_refused() -> None:
    refusals = set()
    for depth in (*range(900, 1010), 100_000):
        body = b'{"texts": ["\\u0041"], "a": %s1%s}' % (b"[" * depth, b"]" * depth)
        try:
            assert http.protocol.parse_object(body).keys() == {"texts", "a"}, depth
        except DataError as error:
            refusals.add(error.message.partition(":")[0])
    assert refusals == {"the body is no JSON"}
    nested = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(DataError, match="BYTES was expected"):
        http.protocol.tensor_texts({"datatype": nested}, "text")


def test_a_large_request_is_read_while_others_are_answered(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    threads = []
    parse = http.protocol.parse_predict

    def record_thread(*arguments: Any, **limits: Any) -> Any:
        threads.append(threading.current_thread())
        return parse(*arguments, **limits)

    monkeypatch.setattr(http.protocol, "parse_predict", record_thread)
    for texts in (["a"], ["a" * http.LARGE_BODY], ["b"], ["a"] * (http.MANY_TEXTS + 1)):
        assert running.call("POST", "/predict", {"texts": texts})[0] == 200
    assert (threads[0] is threads[2] is threads[3], threads[1] is threads[0]) == (True, False)


def test_an_unexpected_exception_is_a_json_error_and_is_counted(
    serve: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = serve()

    def fail(*_arguments: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(OneLabel, "predictions", fail)
    status, _, answer = running.call("POST", "/predict", {"texts": ["a"]})
    assert (status, answer) == (500, {"error": "the server failed: KeyError"})
    assert running.statuses() == {"predict 500": 1}
    while "a bug of ours" not in capsys.readouterr().err:  # with its traceback, behind the answer
        time.sleep(0.01)


def test_only_hosts_on_the_list_are_answered(serve: Callable) -> None:
    running = serve(options=http.AppOptions(hosts=frozenset({"localhost", "[::1]", "model.example"})))
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.", 200),
        ("localhost:", 200),
        ("[::1]:80", 200),
        ("model.example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example:80", 421),
        ("localhost:80:80", 421),
        ("[::2]", 421),
        ("", 421),
    ):
        assert running.call("GET", "/v2", host=host)[0] == status, host
    for head, status in (
        (b"GET /v2 HTTP/1.1\r\nConnection: close\r\n\r\n", b" 400 "),
        (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n", b" 400 "),
        (b"GET /v2 HTTP/1.0\r\n\r\n", b" 200 "),  # older than the header
        (b"GET /v2\r\n\r\n", b" 400 "),
    ):
        assert status in running.send(head)[:20], head
    assert serve().call("GET", "/v2", host="evil.example")[0] == 200  # without a list


def test_the_pages_load_nothing_external_and_escape_labels(serve: Callable, stand_in: Callable) -> None:
    running = serve(stand_in(names=(EVIL, "good")))
    status, headers, front_page = running.call("GET", "/")
    assert (status, headers["content-type"].startswith("text/plain")) == (200, True)
    assert "\x1b" not in front_page
    assert ("good" in front_page, "curl" in front_page) == (True, True)
    status, headers, docs = running.call("GET", "/docs")
    assert (status, headers["content-type"].startswith("text/html")) == (200, True)
    assert re.findall(r"<script|src=|url\(|@import|https?://(?!localhost)", docs) == []
    assert "default-src 'none'" in headers["content-security-policy"]
    assert json.loads(json.dumps(running.call("GET", "/openapi.json")[2]))["openapi"].startswith("3.1")


def test_every_command_of_the_page_works(serve: Callable) -> None:
    running = serve(name="it's a name")
    document = running.call("GET", "/openapi.json")[2]
    docs = running.call("GET", "/docs")[2]
    commands = re.findall(r"<pre>(curl .*?)</pre>", docs)
    assert len(commands) == len(document["paths"]) == 14
    for command in commands:
        words = shlex.split(http.pages.html.unescape(command).replace("localhost:8000", f"127.0.0.1:{running.port}"))
        process = subprocess.run([*words, "-s", "-f"], capture_output=True, text=True, check=False)
        assert (process.returncode, bool(process.stdout)) == (0, True), command


def test_the_document_describes_each_kind_of_model(stand_in: Callable) -> None:
    classify = stand_in()
    for text, required in ((("a",), ["texts"]), (("a", "b"), ["texts", "pairs"]), (None, ["texts"])):
        classify.text = text
        document = http.openapi.describe_api(classify, "toy", 512)
        schema = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        assert schema["schema"]["required"] == required
        assert sorted(schema["example"]) == sorted(required)
    for decision, kind in ((OneNumber, "number"), (SeveralLabels, "array"), (OneLabel, "string")):
        classify.decision = decision(classify.names)
        response = http.openapi.predict_response(classify)
        label = response["properties"]["predictions"]["items"]["properties"]["label"]
        assert label["type"] == kind


def test_a_changed_bundle_folder_makes_requests_fail(serve: Callable, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    model, config = tmp_path / "onnx/model.onnx", tmp_path / "config.json"
    for file in (model, config):
        file.write_bytes(b"as it was")
    running = serve(options=http.AppOptions(watch=FolderWatch(stamp_files(tmp_path))))
    assert running.call("POST", "/predict", {"texts": ["a"]})[0] == 200
    (tmp_path / "notes.txt").write_text("a new file changes no answer")
    assert running.call("GET", "/v2/health/ready")[0] == 200
    model.write_bytes(b"as it is!")
    status, _, answer = running.call("POST", "/predict", {"texts": ["a"]})
    assert (status, "model.onnx has changed" in answer["error"]) == (503, True)
    assert running.call("GET", "/v2/health/ready")[0] == 503
    assert running.call("GET", "/v2/health/live")[0] == 200


def test_a_watch_notices_every_way_to_change_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    replacement = tmp_path.parent / "b"

    def replace() -> None:
        replacement.write_text("one")
        replacement.replace(file)

    for change in (lambda: file.write_text("two"), lambda: file.write_text("more"), file.unlink, replace):
        file.write_text("one")
        watch = FolderWatch(stamp_files(tmp_path))
        watch.check()
        time.sleep(0.02)  # the clock of a file system ticks a hundred times a second
        change()
        with pytest.raises(BundleChanged, match="has changed since it was opened"):
            watch.check()


def test_the_access_log_has_a_line_for_every_answer(serve: Callable) -> None:
    lines: list[str] = []
    running = serve(options=http.AppOptions(log=lines.append))
    running.call("POST", "/predict", {"texts": ["a"]})
    running.call("GET", "/v2/models/%1b%5b31m")
    running.send(b"GARBAGE\r\n\r\n")
    while len(lines) < 3:
        time.sleep(0.01)
    patterns = (
        r'127.0.0.1 "POST /predict" 200 [\d.]+ ms',
        r'127.0.0.1 "GET /v2/models/%1b%5b31m" 404 [\d.]+ ms',
        r'127.0.0.1 "-" 400',
    )
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_request_cut_off_by_shutdown_gets_503_and_is_counted() -> None:
    metrics, messages = ServerMetrics(), []

    async def never(scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(100)

    async def send(message: dict) -> None:
        messages.append(message)

    async def cut() -> None:
        observed = ObserveRequests(never, metrics, {})
        scope = {"type": "http", "method": "GET", "raw_path": b"/", "state": {}}
        task = asyncio.create_task(observed(scope, None, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cut())
    assert (metrics.cut, messages[0]["status"]) == (1, 503)


def test_metrics_are_true_under_load(serve: Callable) -> None:
    running = serve()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: running.call("POST", "/predict", {"texts": ["a"]}), range(40)))
        list(pool.map(lambda _: running.call("POST", "/predict", b"{"), range(20)))
    assert running.statuses() == {"predict 200": 40, "predict 422": 20}
