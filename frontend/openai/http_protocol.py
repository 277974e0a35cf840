"""One HTTP connection: uvicorn's httptools protocol, with limits on what a client may hold open.

A client that sends its head too slowly, sends too large a head, or hardly reads its answer is cut
off. The application sees a cut as an ordinary disconnect, so the engine's work ends with it. What a
client has not read yet waits in the kernel, and here up to uvicorn's high-water mark of 64 KiB.

A stream of tokens may write parts of its body straight to the connection, through the ASGI
extension ``DIRECT_BODY`` of its scope.
"""

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from frontend.openai.connections import DEFAULT_MAX_CONNECTIONS, ConnectionTable
from ipc.caps import MAX_HEAD_BYTES

DIRECT_BODY = "heliograph.direct_body"

HEAD_TIMEOUT_S = 30.0
STALLED_WRITE_TIMEOUT_S = 30.0
MIN_READ_BYTES = 32 << 10  # in that time; a client that reads less has stopped

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class DirectBody:
    """The body of one response, as its client takes it: bytes leave without a coroutine.

    Head and end of the response are still sent the usual way. In between, these writes and the
    usual ones may follow one another in any order.
    """

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl) -> None:
        self._cycle = cycle
        self._flow = flow
        self._write = cycle.transport.write

    @property
    def takes_now(self) -> bool:
        """Whether the body has begun, has not ended, and its client reads what it is sent."""
        cycle = self._cycle
        return (
            cycle.chunked_encoding is True
            and not self._flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def write(self, data: bytes) -> None:
        """Write a part of the body; only while ``takes_now``, and never nothing."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol; cuts off slow heads, large heads and stalled readers."""

    is_in_head = False  # a head has begun, and is not complete
    began_now = False  # a head began in the bytes that are being parsed
    head_bytes = 0  # of an unfinished head, without the read in which it began
    head_timer: asyncio.TimerHandle | None = None
    stall_timer: asyncio.TimerHandle | None = None
    num_unread = 0  # bytes for the client when the stall timer was started

    def __init__(self, *args: Any, table: ConnectionTable | None = None, **kwargs: Any) -> None:
        """As uvicorn makes it; ``table``: of all connections of this process."""
        super().__init__(*args, **kwargs)
        self.table = ConnectionTable(DEFAULT_MAX_CONNECTIONS) if table is None else table

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first head."""
        super().connection_made(transport)
        if not self.table.open(self):
            transport.write(_FULL)
            transport.close()
            return
        self.head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_timers()
        self.table.close(self)
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close at once."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse, and count what a head that is still not complete has brought."""
        self.began_now = False
        was_in_head = self.is_in_head
        super().data_received(data)
        if was_in_head and self.is_in_head and not self.began_now:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        self.is_in_head = self.began_now = True
        self.head_bytes = 0
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head ended: the request begins, unless the head is too large."""
        self.is_in_head = False
        self.table.note_request(self)
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not self.transport.is_closing():
            super().on_headers_complete()
            self.scope["extensions"] = {DIRECT_BODY: {"body": DirectBody(self.cycle, self.flow)}}

    def on_message_complete(self) -> None:
        """A request is complete; none when its head was refused."""
        if self.cycle is not None:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        """Body bytes; none when the head was refused."""
        if self.cycle is not None:
            super().on_body(body)

    def pause_writing(self) -> None:
        """The client does not take what was written: give it a while."""
        self.flow.pause_writing()
        if self.stall_timer is None:
            self._start_stall_timer()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self.stall_timer is not None:
            self.stall_timer.cancel()
            self.stall_timer = None
        self.flow.resume_writing()

    def on_response_complete(self) -> None:
        """An answer is written: what its client has not read must go out in time, too."""
        super().on_response_complete()
        self.table.note_answered(self)
        if self.stall_timer is None and self.transport.get_write_buffer_size():
            self._start_stall_timer()

    def _start_stall_timer(self) -> None:
        self.num_unread = self.transport.get_write_buffer_size()
        self.stall_timer = self.loop.call_later(STALLED_WRITE_TIMEOUT_S, self._check_reader)

    def _check_reader(self) -> None:
        """Cut off a client that has hardly read anything since the timer was started."""
        self.stall_timer = None
        num_unread = self.transport.get_write_buffer_size()
        if num_unread > max(0, self.num_unread - MIN_READ_BYTES):
            self.transport.abort()
        elif num_unread:
            self._start_stall_timer()

    def _stop_timers(self) -> None:
        for timer in (self.head_timer, self.stall_timer):
            if timer is not None:
                timer.cancel()
        self.head_timer = self.stall_timer = None

    def _refuse_head(self) -> None:
        if self.transport.is_closing():
            return
        sentence = f"headers: above the cap of {MAX_HEAD_BYTES} bytes"
        body = msgspec.json.encode(
            {"error": {"message": sentence, "param": "headers", "code": 431}}
        )
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        self._stop_timers()
        self.transport.close()
