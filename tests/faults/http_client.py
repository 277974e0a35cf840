"""A raw HTTP client that records everything: no library between the oracle and the bytes.

One connection per request, so that leaving it is exactly one disconnect.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.history import EventReader, History


@dataclass(frozen=True, slots=True)
class Ask:
    """One request and how its client behaves."""

    name: str
    body: Mapping[str, Any]
    path: str = "/v1/completions"
    leaves_after_events: int | None = None
    leaves_after_s: float | None = None
    reads_bytes_per_s: float | None = None  # None: as fast as it can
    headers: Mapping[str, str] = field(default_factory=dict)


async def ask(port: int, request: Ask, *, timeout_s: float = 300.0) -> History:
    """Send one request; its history, whatever becomes of it."""
    history = History(request.name, request.path, request.body, started_s=time.monotonic())
    try:
        async with asyncio.timeout(timeout_s):
            await _ask_and_leave(port, request, history)
    except TimeoutError:
        history.contradictions.append(f"no end within {timeout_s:g} s")
    except (OSError, asyncio.IncompleteReadError, EOFError) as err:
        history.is_broken = True
        history.errors.append(f"connection: {type(err).__name__}: {err}")
    history.ended_s = time.monotonic()
    return history


async def ask_all(port: int, requests: Iterable[Ask], *, at_once: int) -> list[History]:
    """All requests, ``at_once`` at a time, in their order."""
    slots = asyncio.Semaphore(at_once)

    async def one(request: Ask) -> History:
        async with slots:
            return await ask(port, request)

    return list(await asyncio.gather(*map(one, requests)))


async def _ask_and_leave(port: int, request: Ask, history: History) -> None:
    """Like ``_read``, and leave in the middle where the request says so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    if request.reads_bytes_per_s is not None:
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        writer.write(_head_and_body(request))
        await writer.drain()
        if request.leaves_after_s is None:
            await _read(reader, request, history)
            return
        try:
            async with asyncio.timeout(request.leaves_after_s):
                await _read(reader, request, history)
        except TimeoutError:
            history.is_cut = True
    finally:
        writer.transport.abort() if history.is_cut else writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head_and_body(request: Ask) -> bytes:
    body = json.dumps(request.body).encode()
    headers = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **request.headers,
    }
    lines = [f"POST {request.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def _read(reader: asyncio.StreamReader, request: Ask, history: History) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    history.head_s = time.monotonic()
    history.status = int(head[0].split()[1])
    pairs = [line.partition(":") for line in head[1:] if line]
    history.headers = {name.lower(): value.strip() for name, _, value in pairs}
    if not history.headers.get("content-type", "").startswith("text/event-stream"):
        _take_whole(history, await _read_whole(reader, history.headers))
        return
    events = EventReader()
    num_events = 0
    while chunk := await _read_chunk(reader):
        if request.reads_bytes_per_s is not None:
            await asyncio.sleep(len(chunk) / request.reads_bytes_per_s)
        for data in events.feed(chunk):
            history.take_event(data, time.monotonic())
            num_events += 1
            if num_events == request.leaves_after_events:
                history.is_cut = True
                return


def _take_whole(history: History, body: bytes) -> None:
    history.event_times_s.append(time.monotonic())
    try:
        history.take_object(json.loads(body))
    except (ValueError, KeyError) as err:
        history.contradictions.append(f"unreadable answer {body[:200]!r}: {err!r}")


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).strip(), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def _read_whole(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    body = b""
    while chunk := await _read_chunk(reader):
        body += chunk
    return body
