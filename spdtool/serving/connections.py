"""Connections that no client can hold for ever: uvicorn's protocol with limits of bytes, of time and of number.

uvicorn and httptools parse and answer. This adds what they leave open: how large a head may be, how
long a client may take to send and to read, how many connections there are, and an answer for a
client that closed its sending side.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from spdtool.serving.flow import AnswerTransport, Backpressure

# Bytes that are parsed at once: a head may be larger than allowed by this much, and so many bytes of
# small requests wait for the answer of an earlier one, of which each takes a few kB of memory.
SLICE = 1024
CHUNKED_FACTOR = 6  # a body of chunks of one byte, "1\r\nX\r\n", is six times as long on the wire
MOST_HEADERS = 256  # of a request: one of five bytes takes 150 bytes of memory
LONGEST_LENGTH = 18  # digits of a Content-Length, which then fits into 64 bits
LINGER_SECONDS = 2.0  # for a client to read the last answer, before its unread data reset the connection
MOST_LINGERING = 256  # connections with their last answer that are still open
TOO_MANY = "there are too many connections (--max-connections of the server): try again in a moment"
REFUSED_STATUS = "refused_status"  # in the state of a request that was refused while its body was read


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection, and all of them, may cost.

    Attributes:
        connections: most connections at once.
        head: bytes of a request's first line and headers.
        body: bytes of a request's body.
        head_seconds: from the first byte of a head, or from the connection, to the head's end.
        body_seconds: from the end of a head to the end of its body.
        idle_seconds: between two requests.
        write_seconds: for a client to read an answer.
    """

    connections: int = 512
    head: int = 2**16
    body: int = 2**20
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 60.0
    write_seconds: float = 30.0


@dataclass
class Door:
    """What the connections of one server share.

    Attributes:
        count: called with the status of every answer that no application gave, and the client's address.
        admitted: connections that count towards the limit.
        receiving: those that wait for a request or for more of one, the one that has waited longest first.
        lingering: connections whose last answer may not be read yet, the oldest first.
    """

    limits: ConnectionLimits
    count: Callable[[int, str], None] = lambda _status, _client: None
    admitted: set[GuardedConnection] = field(default_factory=set)
    receiving: dict[GuardedConnection, None] = field(default_factory=dict)
    lingering: dict[GuardedConnection, None] = field(default_factory=dict)

    def admit(self, connection: GuardedConnection) -> bool:
        """Admit a connection if there is room, or if one that has only waited can be closed for it."""
        if len(self.admitted) >= self.limits.connections:
            oldest = next(iter(self.receiving), None)
            if oldest is None:
                return False
            oldest.give_way()
        self.admitted.add(connection)
        return True

    def keep_until_read(self, connection: GuardedConnection) -> None:
        """Keep a connection for a moment, so that its client can read the last answer."""
        self.admitted.discard(connection)
        self.lingering[connection] = None
        if len(self.lingering) > MOST_LINGERING:
            oldest = next(iter(self.lingering))
            self.forget(oldest)
            oldest.transport.abort()

    def forget(self, connection: GuardedConnection) -> None:
        """Forget a connection that is closed."""
        self.admitted.discard(connection)
        self.receiving.pop(connection, None)
        self.lingering.pop(connection, None)


class GuardedConnection(HttpToolsProtocol):
    """One connection: its requests are parsed and answered as by uvicorn, within the limits of a door."""

    def __init__(self, door: Door, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._door, self._limits = door, door.limits
        self._unparsed = bytearray()  # bytes behind requests that are not answered yet
        self._received = 0  # bytes of the head or of the body that is being received
        self._in_head = True
        self._message_begun = False
        self._refused = False  # nothing further is parsed
        self._problem: tuple[int, str] | None = None  # status and message for what a callback of the parser raises
        self._repeats_head = False  # the parser is fed a head that it has parsed already
        self._cycles: deque[RequestResponseCycle] = deque()  # requests that may not be answered yet
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._end_deadline: asyncio.TimerHandle | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection if there is room."""
        super().connection_made(transport)
        self.flow = Backpressure(transport, self._is_behind)
        self._answers = AnswerTransport(transport, self._has_ended, self._end)
        if self._door.admit(self):
            self._wait_for_client(self._limits.head_seconds)
        else:
            self._refuse(503, TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._door.forget(self)
        # uvicorn tells the latest request only; an earlier one would write to a transport that is closed.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        # A timer that is left behind keeps the connection in memory until its time comes.
        for timer in (self._write_deadline, self._end_deadline):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, as far as earlier requests are answered."""
        if not self._refused:
            self._unparsed += data
            self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Let a client that has closed its sending side still get its answers; return whether to stay open."""
        if self._message_begun and not self._refused:
            self._refuse(400, "the request has no end")
        if self._refused:  # a transport that does not stay open closes itself behind what was written
            return self._is_answering() and self not in self._door.lingering
        if self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.keep_alive = False  # the latest request: the connection is closed behind its answer
        return True

    def pause_writing(self) -> None:
        """Give a client that does not read its answer some time."""
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing to a client that reads again."""
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()

    # What the parser calls

    def on_message_begin(self) -> None:
        """Start the time of a head."""
        if self._repeats_head:
            return
        super().on_message_begin()
        self._received, self._in_head, self._message_begun = 0, True, True
        self._wait_for_client(self._limits.head_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Check a header; what is raised here becomes the status 400, or that of `_problem`."""
        # Fields behind the last chunk may not replace those of the head.
        if self._repeats_head or not self._in_head:
            return
        if len(self.headers) >= MOST_HEADERS:
            self._problem = (431, f"the head has more than {MOST_HEADERS} fields")
            raise ValueError(self._problem[1])
        # bytes.isdigit knows ASCII digits only. llhttp lets leading zeros without end pass, and
        # int() does not.
        if name.lower() == b"content-length" and not (value.strip().isdigit() and len(value) <= LONGEST_LENGTH):
            raise ValueError("Content-Length is no number")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the time of a body, and the application."""
        if self._repeats_head:
            return
        # A proxy's form of a request, http://host, may lack the path.
        if not self.url.startswith(b"/") and httptools.parse_url(self.url).path is None:
            self.url += b"/"
        super().on_headers_complete()
        self.cycle.transport = self._answers
        if self.scope["http_version"] == "1.0":  # which has no 100 Continue
            self.cycle.waiting_for_100_continue = False
        self._cycles.append(self.cycle)
        self._received, self._in_head = 0, False
        self._wait_for_client(self._limits.body_seconds)

    def on_message_complete(self) -> None:
        """Stop the time: the client has sent all of its request."""
        if self.parser.should_upgrade() and self._framing():  # its body follows: see `_restart_parser`
            return
        self._received, self._in_head, self._message_begun = 0, True, False
        self._stop_waiting()
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before its body was there
            self._wait_for_client(self._limits.idle_seconds)

    # What uvicorn calls

    def on_response_complete(self) -> None:
        """Parse on, or wait for the next request."""
        while self._cycles and self._cycles[0].response_complete:  # they are answered in their order
            self._cycles.popleft()
        if self._has_ended() and not self._cycles:
            return
        super().on_response_complete()
        self._parse()
        self.flow.resume_reading()
        if self._refused:
            return
        if self._message_begun:  # its time starts again: the client may have waited for this answer
            self._wait_for_client(self._limits.head_seconds if self._in_head else self._limits.body_seconds)
        elif self.cycle.response_complete:
            self._wait_for_client(self._limits.idle_seconds)

    def shutdown(self) -> None:
        """Close the connection behind the answers that it waits for."""
        super().shutdown()
        if self.transport.is_closing():
            self._close()

    # Our own

    def give_way(self) -> None:
        """Close the connection for a newer one."""
        self._refused = True
        self._stop_waiting()
        self._door.forget(self)
        if self.transport.get_write_buffer_size():  # it is no longer counted: it may not stay open until it is read
            self.transport.abort()
            return
        if self.cycle is None and not self._message_begun:
            # In a burst of clients its first request is on the way: closed at once, the client would not know why.
            self._write_refusal(503, TOO_MANY)
            self._linger()
            return
        if self._message_begun and not self._is_answering():
            self._write_refusal(408, "too many connections wait: send the request again, and faster")
        self._close()

    def _parse(self) -> None:
        """Parse slice by slice: a head without end is noticed early, and few requests wait for an answer."""
        while self._unparsed and not self._refused and not self.transport.is_closing():
            if self.pipeline:
                self.flow.pause_reading()
                return
            part = bytes(self._unparsed[:SLICE])
            del self._unparsed[:SLICE]
            self._received += len(part)
            if self._in_head and self._received > self._limits.head + SLICE:
                self._refuse(431, f"the head is larger than {self._limits.head:,} bytes")
            elif self._received > self._limits.head + CHUNKED_FACTOR * self._limits.body:
                self._refuse(413, f"the body is larger than {self._limits.body:,} bytes")
            else:
                self._feed(part)

    def _has_ended(self) -> bool:
        """Whether nothing further is read, and nothing written but answers that have been asked for."""
        return self._refused or self.transport.is_closing()

    def _end(self) -> None:
        """Close the connection behind its last answer."""
        # Closed at once, a connection with unread data is reset, and the client never reads the answer.
        if self._message_begun or self._unparsed or self.pipeline or self.flow.read_paused:
            self._linger()
        else:
            self._close()

    def _feed(self, part: bytes) -> None:
        """Parse some bytes; a client that offers another protocol is answered in this one."""
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as upgrade:
                self._unparsed[:0] = part[upgrade.args[0] :]
                self._restart_parser()
        except httptools.HttpParserError:
            self._refuse(*(self._problem or (400, "Invalid HTTP request received.")))

    def _restart_parser(self) -> None:
        """Parse on behind a head that offers another protocol.

        httptools takes such a head for the end of the request, although Java's HttpClient offers
        HTTP/2 with every first request, and sends its body.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        if self._message_begun:
            self._repeats_head = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self._framing() + b"\r\n")
            self._repeats_head = False

    def _framing(self) -> bytes:
        """Return the fields of the head that say where the body ends; empty if there is none."""
        fields = b""
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value)):
                fields += name + b": " + value + b"\r\n"
        return fields

    def _is_behind(self) -> bool:
        """Whether requests that came already wait for the answers of earlier ones."""
        return not self._refused and bool(self.pipeline or self._unparsed)

    def _is_answering(self) -> bool:
        """Whether an application is at work, or has started an answer, on this connection."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_client(self, seconds: float) -> None:
        """Give the client some time for what it has to send next."""
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._give_up)
        # A request that has come as a whole is waiting for its answer: only others may be closed for a newer one.
        if not self._cycles or self._cycles[0].more_body:
            self._door.receiving[self] = None

    def _stop_waiting(self) -> None:
        self._door.receiving.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()

    def _give_up(self) -> None:
        """The client took too long."""
        if self.flow.read_paused:  # it is the application that lets the client wait
            self._wait_for_client(1.0)
        elif self._message_begun:
            what = "head" if self._in_head else "body"
            self._refuse(408, f"the {what} of the request did not come in time")
        else:
            self._close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, where no answer has been started, and close the connection."""
        self._stop_waiting()
        self._refused = True
        self._unparsed.clear()
        in_body = self._message_begun and not self._in_head
        if in_body and self.pipeline:  # its turn would come behind answers that are not there yet: it gets none
            self.pipeline.popleft()
            self._cycles.pop()
            self.cycle = self._cycles[-1]
            self.cycle.keep_alive = False
        elif in_body and self.cycle.response_complete:  # answered before its body was there
            self._end()
        elif self._is_answering() and (not in_body or self.cycle.response_started):
            self.cycle.keep_alive = False  # an answer is on its way, and another may not be mixed with it
        else:
            self._write_refusal(status, message, counted=not in_body)
            if in_body:  # the application sees its client leave, and counts the request with this status
                self.cycle.scope["state"][REFUSED_STATUS] = status
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._linger()

    def _linger(self) -> None:
        """Close our side of the connection, and the whole of it when the client has, or after a moment."""
        self._refused = True
        self._stop_waiting()
        self._unparsed.clear()
        self.pipeline.clear()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._door.keep_until_read(self)
        self._end_deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _write_refusal(self, status: int, message: str, *, counted: bool = True) -> None:
        """Write an answer of our own, in JSON as every error."""
        body = json.dumps({"error": message}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if counted:
            self._door.count(status, self.client[0] if self.client else "-")

    def _close(self) -> None:
        """Close the connection; what the client does not read in time is dropped."""
        self._stop_waiting()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._end_deadline = self.loop.call_later(self._limits.write_seconds, self.transport.abort)


class EndingServer(uvicorn.Server):
    """uvicorn's server, which leaves no connection open: uvloop does not end before they are closed.

    Attributes:
        unanswered: connections whose clients had not got their answers when it ended.
    """

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door, self.unanswered = door, 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests in flight, as long as uvicorn waits for them, and close every connection."""
        await super().shutdown(sockets)
        connections = list(self.server_state.connections)
        # Clients of lingering connections have their answer, and only have not closed their side yet.
        self.unanswered = sum(connection not in self._door.lingering for connection in connections)
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0.01)  # in which the event loop tells each of them
