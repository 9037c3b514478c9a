"""What lies between uvicorn and a transport: when a connection is read on, and how it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


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


class AnswerTransport(asyncio.Transport):
    """What answers are written to; closing it lets the client read the last one first.

    uvicorn closes a transport behind the last answer, whatever the client is still sending. The
    system then resets the connection, and most clients report that instead of the answer.

    Args:
        has_ended: tells whether nothing further is read.
        end: closes the connection behind what was written.
    """

    def __init__(self, transport: asyncio.Transport, has_ended: Callable[[], bool], end: Callable[[], None]) -> None:
        super().__init__()
        self._transport, self._has_ended, self._end = transport, has_ended, end

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write to the client."""
        self._transport.write(data)

    def is_closing(self) -> bool:
        """Tell whether nothing may be written that asks the client for more, such as 100 Continue."""
        return self._has_ended()

    def close(self) -> None:
        """Close the connection behind what was written."""
        self._end()
