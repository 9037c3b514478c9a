"""Connections of the server: malformed requests, timeouts, limits, half-closed sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

pytest.importorskip("starlette", reason='pip install "spdtool[serve]"')

from spdtool.serving import connections
from spdtool.serving.connections import MOST_HEADERS, SLICE

HOST = b"Host: localhost\r\n"
GET = b"GET /v2/health/live HTTP/1.1\r\n" + HOST + b"\r\n"
GET_AND_CLOSE = b"GET /v2/health/live HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
BODY = json.dumps({"texts": ["good film"]}).encode()
POST = b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
SHORT = {"head_seconds": 0.3, "body_seconds": 0.3, "idle_seconds": 0.3}


def status_and_error(answer: bytes) -> tuple[int, str]:
    """Parse one JSON error response into its status and message."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer
    return int(head.split()[1]), json.loads(body)["error"]


def test_malformed_requests_are_refused_with_a_json_error(serve: Callable) -> None:
    running = serve(body=1000)
    chunked = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    expected = {
        "GARBAGE /v2 HTTP/1.1": (b"GARBAGE /v2 HTTP/1.1\r\n\r\n", 400),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100, 400),
        "no path": (b"CONNECT a.example:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        "a head of 200 kB": (b"GET /v2 HTTP/1.1\r\nA: " + b"b" * 200_000, 431),
        "a path of 100 kB": (b"GET /" + b"a" * 100_000, 431),
        "many headers": (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * (MOST_HEADERS + 2), 431),
        "empty lines": (b"\r\n" * 50_000, 431),
        "a length of Latin digits": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: \xb2\r\n\r\n12", 400),
        "a length of 5,000 zeros": (
            b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"0" * 5000 + b"2\r\n\r\n{}",
            400,
        ),
        "two lengths": (
            b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 30\r\n\r\n{}",
            400,
        ),
        "a length and chunks": (
            b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        "a bad chunk": (chunked + b"zz\r\n", 400),
        "a large body": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1001\r\n\r\n", 413),
        "large chunks": (chunked + b"400\r\n" + b"a" * 1024 + b"\r\n", 413),
        "chunk extensions without end": (chunked + b"2;" + b"a" * 200_000, 413),
    }
    for kind, (request, status) in expected.items():
        assert status_and_error(running.send(request))[0] == status, kind
    assert running.call("GET", "/v2")[0] == 200
    # Every one of them was counted.
    counts = running.statuses()
    for status in (400, 413, 431):
        refused = sum(count for label, count in counts.items() if label.endswith(str(status)))
        assert refused == sum(expected_status == status for _, expected_status in expected.values()), status


def test_slow_clients_time_out(serve: Callable) -> None:
    running = serve(**SHORT)
    # A silent connection, and one idle after an answer, are closed without a response.
    assert running.send() == b""
    assert running.send(GET).count(b"HTTP/1.1") == 1
    for kind, request, late_part in (
        ("half a head", GET[:30], "the head"),
        ("half a head after a request", GET + GET[:30], "the head"),
        ("half a body", POST[:-5], "the body"),
    ):
        answer = running.send(request)
        assert b"HTTP/1.1 408 " in answer, kind
        assert late_part in answer.decode(), kind
    while "predict 408" not in running.statuses():  # counted when the application notices
        time.sleep(0.01)
    assert running.statuses() == {"live 200": 2, "refused 408": 2, "predict 408": 1}


def test_a_slow_drip_of_bytes_does_not_extend_the_timeout(serve: Callable) -> None:
    running = serve(**SHORT)
    # A body after its refusal, empty lines between requests, and a head, each sent byte by byte.
    for start in (b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n", GET, GET[:20]):
        drip = b"\r\n" if start == GET else b"a"
        with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
            plug.settimeout(0.05)
            plug.sendall(start)
            with pytest.raises(ConnectionError):
                while True:
                    plug.sendall(drip)
                    try:
                        if plug.recv(1000) == b"":
                            raise ConnectionResetError
                    except TimeoutError:
                        continue


def test_a_client_that_does_not_read_is_dropped(serve: Callable) -> None:
    running = serve(write_seconds=0.3, idle_seconds=0.3)
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.settimeout(0.5)
        with pytest.raises(OSError, match=r"timed out|reset|Broken"):
            while True:
                plug.sendall(b"GET /docs HTTP/1.1\r\n" + HOST + b"\r\n")
        while running.door.admitted:
            time.sleep(0.01)


def test_a_flood_of_requests_is_read_no_faster_than_it_is_answered(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in()
    running = serve(classify)
    classify.gate.clear()
    requests = 1_000
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
        sender = threading.Thread(target=plug.sendall, args=(POST + GET * requests,))
        sender.start()
        while running.app.batcher.rows == 0:
            time.sleep(0.01)
        (connection,) = running.door.admitted
        assert 0 < len(connection.pipeline) <= SLICE // len(GET) + 1
        classify.gate.set()
        answers = b""
        while answers.count(b"HTTP/1.1 200") <= requests:
            answers += plug.recv(2**20)
            assert len(connection.pipeline) <= SLICE // len(GET) + 1
        sender.join()


def test_half_closed_clients_get_their_answers(serve: Callable) -> None:
    running = serve()
    answer = running.send(POST, half_close=True)
    assert (answer.count(b"HTTP/1.1 200"), b"predictions" in answer) == (1, True)
    assert running.send(POST + POST + GET, half_close=True).count(b"HTTP/1.1 200") == 3
    for request in (POST[:-5], GET[:30]):
        assert status_and_error(running.send(request, half_close=True)) == (400, "the request has no end")
    assert running.send(half_close=True) == b""
    while running.door.admitted:
        time.sleep(0.01)


def test_a_half_closed_client_waits_for_the_model(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in()
    running = serve(classify)
    classify.gate.clear()
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
        plug.sendall(POST)
        plug.shutdown(socket.SHUT_WR)
        while running.app.batcher.rows == 0:
            time.sleep(0.01)
        classify.gate.set()
        assert plug.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_garbage_after_a_pipelined_request_does_not_spoil_its_answer(serve: Callable) -> None:
    running = serve()
    answer = running.send(POST + b"GARBAGE\r\n\r\n")
    assert (answer.count(b"HTTP/1.1"), b"HTTP/1.1 200 OK" in answer) == (1, True)
    assert running.call("POST", "/predict", {"texts": ["a"]})[0] == 200


def test_idle_connections_are_closed_for_new_ones(serve: Callable) -> None:
    running = serve(connections=20)
    plugs = []
    for number in range(100):
        plugs.append(socket.create_connection(("127.0.0.1", running.port), 10))
        plugs[-1].sendall((b"", GET[:30], POST[:-5])[number % 3])
    for _ in range(5):  # the newest push out the oldest
        assert running.call("POST", "/predict", {"texts": ["a"]})[0] == 200
    assert len(running.door.admitted) <= 20
    for plug in plugs:
        plug.close()


def test_every_client_of_a_burst_gets_an_answer(serve: Callable) -> None:
    running = serve(connections=20)
    plugs = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(60)]
    time.sleep(0.2)  # so that all are accepted before the first request is there
    for plug in plugs:
        plug.sendall(GET_AND_CLOSE)
    statuses = Counter(int(read_to_the_end(plug).split()[1]) for plug in plugs)
    assert statuses == {200: 20, 503: 40}
    assert running.statuses()["refused 503"] == 40
    for plug in plugs:
        plug.close()


def test_extra_connections_get_503_if_all_others_are_busy(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in()
    running = serve(classify, connections=3)
    classify.gate.clear()
    plugs = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(3)]
    for plug in plugs:
        plug.sendall(POST)
    while running.app.batcher.rows < 3:
        time.sleep(0.01)
    status, error = status_and_error(running.send(GET_AND_CLOSE))
    assert (status, "too many connections" in error) == (503, True)
    classify.gate.set()
    for plug in plugs:
        assert plug.recv(100).startswith(b"HTTP/1.1 200 OK")
        plug.close()
    while running.door.admitted:
        time.sleep(0.01)
    assert running.call("GET", "/v2")[0] == 200
    assert running.statuses()["refused 503"] == 1


def test_refused_connections_do_not_pile_up(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_LINGERING", 64)
    running = serve()
    plugs = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(150)]
    for plug in plugs:
        plug.sendall(b"GARBAGE\r\n\r\n")
    while running.statuses().get("refused 400", 0) < 150:
        time.sleep(0.01)
    assert len(running.door.lingering) <= 64
    for plug in plugs:
        plug.close()
    while running.door.lingering:
        time.sleep(0.01)


def read_to_the_end(plug: socket.socket) -> bytes:
    """Read all that the server answers; a connection that is reset raises ConnectionError."""
    answer = b""
    while chunk := plug.recv(65536):
        answer += chunk
    return answer


def test_a_client_that_is_still_sending_reads_why_it_was_refused(serve: Callable) -> None:
    running = serve(body=1000)
    length = b"Content-Length: 300000\r\n"
    for kind, head, status in (
        ("too large", b"POST /predict HTTP/1.1\r\n" + HOST + length, 413),
        ("no such path", b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Connection: close\r\n" + length, 404),
        ("HTTP/1.0", b"POST /v2 HTTP/1.0\r\n" + length, 405),
    ):
        with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
            plug.sendall(head + b"\r\n" + b"a" * 50_000)
            assert status_and_error(read_to_the_end(plug))[0] == status, kind
    # One that goes on sending without end is closed all the same.
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug, pytest.raises(ConnectionError):
        plug.sendall(b"POST /predict HTTP/1.1\r\n" + HOST + length + b"\r\n")
        while True:
            plug.sendall(b"a")
            time.sleep(0.01)


def test_an_offer_of_another_protocol_is_ignored(serve: Callable) -> None:
    # As Java's HttpClient and curl --http2 send it.
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    running = serve()
    chunked = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for request in (GET, POST, chunked, POST[: POST.index(b"Content-Length")] + b"Content-Length: 0\r\n\r\n"):
        offered = request.replace(HOST, HOST + offer)
        status = 422 if b"Length: 0" in request else 200
        for answer in (
            running.send(offered + offered + GET_AND_CLOSE),  # in one piece
            running.send(*(bytes([byte]) for byte in offered), offered, GET_AND_CLOSE),
        ):
            assert answer.count(b"HTTP/1.1 %d" % status) == (3 if status == 200 else 2), (request, answer)
            assert answer.endswith(b'{"live":true}'), (request, answer)
    for framing in (b"Transfer-Encoding: chunked\r\n\r\nzz", b"Transfer-Encoding: gzip\r\n\r\n"):
        assert status_and_error(running.send(b"POST /predict HTTP/1.1\r\n" + HOST + offer + framing))[0] == 400


def test_fields_behind_the_last_chunk_change_nothing(serve: Callable) -> None:
    running = serve()
    chunks = b"%x;name=value\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    head = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = running.send(head + chunks + b"Host: evil.example\r\nContent-MD5: 0\r\n" + b"a: b\r\n" * 300 + b"\r\n")
    assert b"HTTP/1.1 200 OK" in answer, answer


def test_100_continue_is_sent_only_where_a_body_is_wanted(serve: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    running = serve(body=1000)
    expecting = POST.replace(HOST, HOST + b"Connection: close\r\nExpect: 100-continue\r\n")
    assert running.send(expecting).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    bad_chunk = b"POST /predict HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nzz"
    for request, status in (
        (expecting.replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (expecting.replace(b"Length: ", b"Length: 10"), 413),
        (expecting.replace(b"/predict", b"/nowhere"), 404),
        (bad_chunk, 400),
    ):
        assert running.send(request).startswith(b"HTTP/1.1 %d " % status), request
    assert capsys.readouterr().err == ""


def test_a_url_without_a_path_is_that_of_the_front_page(serve: Callable) -> None:
    running = serve()
    for target, status in ((b"http://localhost:8000", 200), (b"http://localhost/v2", 200), (b"http://[", 400)):
        answer = running.send(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), (target, answer)


def test_a_request_at_work_is_answered_whatever_comes_behind_it(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in()
    running = serve(classify, connections=1)
    for behind, half_close in ((POST[:-5], True), (POST.replace(BODY, b"") + b"{", False), (GET[:30], False)):
        classify.gate.clear()
        with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
            plug.sendall(POST + behind)
            while running.app.batcher.rows == 0:
                time.sleep(0.01)
            if half_close:
                plug.shutdown(socket.SHUT_WR)
                time.sleep(0.1)
            # There is room for one connection, and this one may not be closed for another.
            assert status_and_error(running.send(GET_AND_CLOSE))[0] == 503, behind
            classify.gate.set()
            assert plug.recv(1000).startswith(b"HTTP/1.1 200 OK"), behind
        while running.door.admitted:
            time.sleep(0.01)


def test_a_connection_that_is_closed_leaves_nothing_behind(serve: Callable) -> None:
    running = serve(connections=1)
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
        plug.sendall(GET)
        assert plug.recv(1000).startswith(b"HTTP/1.1 200 OK")
        (connection,) = running.door.admitted
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    while running.door.admitted:
        time.sleep(0.01)
    assert connection.timeout_keep_alive_task is None  # a timer that holds the connection in memory
    # One that does not read its answers is not kept until it does, once there is no room for it.
    with socket.create_connection(("127.0.0.1", running.port), 10) as plug:
        plug.sendall(GET)
        plug.recv(1000)
        (connection,) = running.door.admitted
        answers = running.uvicorn.server_state.total_requests
        while connection.transport.get_write_buffer_size() == 0:
            plug.sendall(b"GET /docs HTTP/1.1\r\n" + HOST + b"\r\n")
            answers += 1
            while running.uvicorn.server_state.total_requests < answers:
                time.sleep(0.0005)
        assert running.call("GET", "/v2")[0] == 200
        while connection in running.uvicorn.server_state.connections:
            time.sleep(0.01)
