"""Connections that no client can hold for ever: uvicorn's protocol with limits of bytes, of time and of number.

uvicorn and httptools parse and answer. This adds what they leave open: how large a head may be, how
long a client may take to send and to read, how many connections there are, and an answer for a
client that closed its sending side.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SLICE = 4096  # bytes that are parsed at once: a head may be larger than allowed by this much
CHUNKED_FACTOR = 6  # a body of chunks of one byte, "1\r\nX\r\n", is six times as long on the wire
LONGEST_LENGTH = 18  # digits of a Content-Length, which then fits into 64 bits
LINGER_SECONDS = 2.0  # for a refused client to read why, before its unread data reset the connection
MOST_LINGERING = 64  # refused connections that are still open
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
        lingering: refused connections, the oldest first.
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
        """Keep a refused connection for a moment, so that its client can read why."""
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


class Backpressure(FlowControl):
    """uvicorn's flow control, which reads on only where `is_behind()` is false.

    uvicorn reads on after every answer, so that a client which sends requests faster than they are
    answered fills the memory of the server.
    """

    def __init__(self, transport: asyncio.Transport, is_behind: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_behind = is_behind

    def resume_reading(self) -> None:
        """Read on, unless earlier requests wait for their answers."""
        if not self._is_behind():
            super().resume_reading()


class GuardedConnection(HttpToolsProtocol):
    """One connection: its requests are parsed and answered as by uvicorn, within the limits of a door."""

    def __init__(self, door: Door, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._door, self._limits = door, door.limits
        self._unparsed = bytearray()  # bytes behind requests that are not answered yet
        self._received = 0  # bytes of the head or of the body that is being received
        self._in_head = True
        self._message_begun = False
        self._refused = False
        self._cycles: deque[RequestResponseCycle] = deque()  # requests that may not be answered yet
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection if there is room."""
        super().connection_made(transport)
        self.flow = Backpressure(transport, self._is_behind)
        if self._door.admit(self):
            self._wait_for_client(self._limits.head_seconds)
        else:
            self._refuse(503, "there are too many connections: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._door.forget(self)
        # uvicorn tells the latest request only; an earlier one would write to a transport that is closed.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
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
        super().on_message_begin()
        self._received, self._in_head, self._message_begun = 0, True, True
        self._wait_for_client(self._limits.head_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Check a header; what is raised here becomes the status 400."""
        # bytes.isdigit knows ASCII digits only. llhttp lets leading zeros without end pass, and
        # int() does not.
        if name.lower() == b"content-length" and not (value.strip().isdigit() and len(value) <= LONGEST_LENGTH):
            raise ValueError("Content-Length is no number")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the time of a body, and the application."""
        super().on_headers_complete()
        self._cycles.append(self.cycle)
        self._received, self._in_head = 0, False
        self._wait_for_client(self._limits.body_seconds)

    def on_message_complete(self) -> None:
        """Stop the time: the client has sent all of its request."""
        self._received, self._in_head, self._message_begun = 0, True, False
        self._stop_waiting()
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before its body was there
            self._wait_for_client(self._limits.idle_seconds)

    # What uvicorn calls

    def on_response_complete(self) -> None:
        """Parse on, or wait for the next request."""
        super().on_response_complete()
        while self._cycles and self._cycles[0].response_complete:  # they are answered in their order
            self._cycles.popleft()
        if self.transport.is_closing():
            self._close()
            return
        self._parse()
        self.flow.resume_reading()
        if not self._refused and not self._message_begun and self.cycle.response_complete:
            self._wait_for_client(self._limits.idle_seconds)

    def shutdown(self) -> None:
        """Close the connection behind the answers that it waits for."""
        super().shutdown()
        if self.transport.is_closing():
            self._close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, msg)

    # Our own

    def give_way(self) -> None:
        """Close the connection for a newer one."""
        if self._message_begun and not self._is_answering():
            self._write_refusal(408, "too many connections wait: send the request again, and faster")
        self._refused = True
        self._stop_waiting()
        self._door.forget(self)
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
                super().data_received(part)

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
        if in_body and self.pipeline:  # its turn would come behind answers that are not there yet
            self.transport.abort()
        elif in_body and self.cycle.response_complete:  # answered before its body was there
            self._close()
        elif self._is_answering() and (not in_body or self.cycle.response_started):
            self.cycle.keep_alive = False  # an answer is on its way, and another may not be mixed with it
        else:
            self._write_refusal(status, message, counted=not in_body)
            if in_body:  # the application sees its client leave, and counts the request with this status
                self.cycle.scope["state"][REFUSED_STATUS] = status
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            # Closed at once, a connection with unread data is reset, and the client never reads the answer.
            self.transport.write_eof()
            self.flow.resume_reading()
            self._door.keep_until_read(self)
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)

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
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._limits.write_seconds, self.transport.abort)
