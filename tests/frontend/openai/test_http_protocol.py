"""What one connection may hold open: heads, and answers that nobody reads. No sockets, no waiting.

The event loop is a fake whose clock the test moves.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from frontend.openai.connections import ConnectionTable
from frontend.openai.http_protocol import (
    DIRECT_BODY,
    HEAD_TIMEOUT_S,
    MIN_READ_BYTES,
    STALLED_WRITE_TIMEOUT_S,
    BoundedHttpProtocol,
    DirectBody,
)
from ipc.caps import MAX_HEAD_BYTES

REQUEST = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and how the connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended_by: str | None = None
        self.num_unread = 0

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.ended_by is not None

    def close(self) -> None:
        self.ended_by = self.ended_by or "close"

    def abort(self) -> None:
        self.ended_by = self.ended_by or "abort"

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


class FakeTimer:
    """A call that waits for its time."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.is_cancelled = at, call, False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    """A loop whose timers fire when the test moves the clock; tasks are only counted."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[FakeTimer] = []
        self.num_tasks = 0

    def call_later(self, delay: float, call: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(self.now + delay, call))
        return self.timers[-1]

    def create_task(self, work: Any) -> "FakeLoop":
        work.close()
        self.num_tasks += 1
        return self

    def add_done_callback(self, _: Any) -> None:
        """Tasks of this loop never end."""

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer in list(self.timers):
            if timer.at <= self.now and not timer.is_cancelled:
                timer.cancel()
                timer.call()


def make_connection(
    table: ConnectionTable | None = None,
) -> tuple[BoundedHttpProtocol, FakeTransport, FakeLoop]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("tasks do not run here")

    loop, transport = FakeLoop(), FakeTransport()
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off")
    protocol = BoundedHttpProtocol(
        config,
        ServerState(),
        {},
        loop,  # type: ignore[arg-type]
        table=table,
    )
    protocol.connection_made(transport)
    return protocol, transport, loop


@pytest.mark.parametrize("sent", [b"", REQUEST[:20]], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    protocol, transport, loop = make_connection()
    if sent:
        protocol.data_received(sent)
    loop.advance(HEAD_TIMEOUT_S - 1)
    assert transport.ended_by is None
    loop.advance(1)
    assert transport.ended_by == "abort"


def test_a_head_in_time_stops_the_clock_however_slowly_the_answer_comes() -> None:
    protocol, transport, loop = make_connection()
    for at in range(len(REQUEST)):
        protocol.data_received(REQUEST[at : at + 1])
    loop.advance(10 * HEAD_TIMEOUT_S)
    assert transport.ended_by is None
    assert loop.num_tasks == 1


def test_a_second_head_on_the_connection_has_its_own_clock() -> None:
    protocol, transport, loop = make_connection()
    protocol.data_received(REQUEST + REQUEST[:20])
    loop.advance(HEAD_TIMEOUT_S)
    assert transport.ended_by == "abort"


@pytest.mark.parametrize("piece", [100, 10**6], ids=["in pieces", "at once"])
def test_a_large_head_is_refused_before_it_is_complete_or_when_it_is(piece: int) -> None:
    protocol, transport, loop = make_connection()
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (4 * MAX_HEAD_BYTES) + b"\r\n\r\n"
    for at in range(0, len(head), piece):
        if transport.ended_by is None:
            protocol.data_received(head[at : at + piece])
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    assert b"headers: above the cap of 32768 bytes" in transport.written
    assert transport.ended_by == "close"
    assert loop.num_tasks == 0


def test_a_large_body_is_no_large_head() -> None:
    protocol, transport, loop = make_connection()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    protocol.data_received(head + b"a" * 400_000)
    protocol.data_received(b"a" * 600_000)
    assert transport.ended_by is None
    assert loop.num_tasks == 1


def test_a_reader_that_stalls_is_cut_off_and_one_that_resumes_is_not() -> None:
    for resumes in (True, False):
        protocol, transport, loop = make_connection()
        protocol.data_received(REQUEST)
        transport.num_unread = 100_000
        protocol.pause_writing()
        loop.advance(STALLED_WRITE_TIMEOUT_S - 1)
        if resumes:
            protocol.resume_writing()
        loop.advance(1)
        assert transport.ended_by == (None if resumes else "abort")


async def answer_in_parts(protocol: BoundedHttpProtocol, *, is_direct: bool) -> None:
    body = protocol.scope["extensions"][DIRECT_BODY]["body"]
    assert isinstance(body, DirectBody)
    send = protocol.cycle.send
    assert not body.takes_now, "the head must be sent first"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one", b"x" * 300):
        assert body.takes_now
        if is_direct:
            body.write(part)
        else:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    assert not body.takes_now, "the body has ended"


def test_a_direct_body_writes_the_bytes_of_the_usual_way() -> None:
    written = []
    for is_direct in (False, True):
        protocol, transport, _ = make_connection()
        protocol.data_received(REQUEST)
        asyncio.run(answer_in_parts(protocol, is_direct=is_direct))
        written.append(transport.written)
    assert written[0] == written[1]
    assert written[1].endswith(b"3\r\none\r\n12c\r\n" + b"x" * 300 + b"\r\n0\r\n\r\n")


def test_a_direct_body_takes_nothing_from_a_stalled_or_lost_connection() -> None:
    protocol, _, _ = make_connection()
    protocol.data_received(REQUEST)
    body: DirectBody = protocol.scope["extensions"][DIRECT_BODY]["body"]  # type: ignore[assignment]
    head = {"type": "http.response.start", "status": 200, "headers": []}
    asyncio.run(protocol.cycle.send(head))  # type: ignore[arg-type]
    protocol.pause_writing()
    assert not body.takes_now
    protocol.resume_writing()
    assert body.takes_now
    protocol.connection_lost(None)
    assert not body.takes_now


def test_no_clock_outlives_the_connection() -> None:
    protocol, _, loop = make_connection()
    protocol.data_received(REQUEST[:20])
    protocol.pause_writing()
    protocol.connection_lost(None)
    assert all(timer.is_cancelled for timer in loop.timers)


def test_what_is_left_of_an_answer_must_be_read_in_time() -> None:
    protocol, transport, loop = make_connection()
    protocol.data_received(REQUEST)
    transport.num_unread = 60_000
    protocol.cycle.response_complete = True
    protocol.on_response_complete()
    transport.num_unread = 20_000  # it reads, if slowly
    loop.advance(STALLED_WRITE_TIMEOUT_S)
    assert transport.ended_by != "abort"
    transport.num_unread = 19_000
    transport.ended_by = None  # whatever keep-alive did
    loop.advance(STALLED_WRITE_TIMEOUT_S)
    assert transport.ended_by == "abort"


def test_a_reader_of_a_large_answer_may_take_its_time_but_not_stop() -> None:
    protocol, transport, loop = make_connection()
    protocol.data_received(REQUEST)
    transport.num_unread = 10 << 20
    protocol.pause_writing()
    for _ in range(5):
        transport.num_unread -= MIN_READ_BYTES + 1
        loop.advance(STALLED_WRITE_TIMEOUT_S)
        assert transport.ended_by is None
    transport.num_unread -= 30  # a byte a second
    loop.advance(STALLED_WRITE_TIMEOUT_S)
    assert transport.ended_by == "abort"


def test_silent_connections_make_room_for_new_ones() -> None:
    table = ConnectionTable(2)
    silent, _, _ = first = make_connection(table)
    busy, _, _ = second = make_connection(table)
    busy.data_received(REQUEST)
    third = make_connection(table)
    assert [each[1].ended_by for each in (first, second, third)] == ["abort", None, None]
    third[0].data_received(REQUEST)
    fourth = make_connection(table)
    assert fourth[1].ended_by == "close"
    assert fourth[1].written.startswith(b"HTTP/1.1 503")
    silent.connection_lost(None)
    assert len(table) == 2
