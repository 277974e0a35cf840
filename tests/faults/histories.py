"""What one stream said, event by event, as its reader heard it.

The reader is the same in the disturbed run and in the undisturbed one, and knows nothing of faults.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Choice:
    """One choice of a stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    num_after_end: int = 0  # events with text or tokens behind the finish reason


@dataclass(eq=False)
class History:
    """Everything that the reader of one stream got."""

    name: str  # of what was asked: equal names ask the same
    status: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    usages: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    created: set[int] = field(default_factory=set)
    num_done: int = 0
    num_after_done: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    started_s: float = 0.0  # time.monotonic
    event_times_s: list[float] = field(default_factory=list)
    ended_s: float | None = None  # None: the connection broke, or its reader left
    lost: str | None = None  # why the connection broke

    @property
    def num_tokens(self) -> int:
        """Tokens heard so far, over all choices."""
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def take(self, data: str) -> None:
        """Note one event's data."""
        self.event_times_s.append(time.monotonic())
        if data == "[DONE]":
            self.num_done += 1
            return
        self.num_after_done += bool(self.num_done)
        chunk = json.loads(data)
        if "error" in chunk:
            self.errors.append(chunk["error"])
            return
        self.ids.add(chunk["id"])
        self.created.add(chunk["created"])
        if chunk.get("usage"):
            self.usages.append(chunk["usage"])
        for each in chunk["choices"]:
            choice = self.choices.setdefault(each["index"], Choice())
            text = each["text"] if "text" in each else each.get("delta", {}).get("content") or ""
            ids = each.get("token_ids") or []
            choice.num_after_end += bool(choice.finish_reasons and (text or ids))
            choice.text += text
            choice.token_ids += ids
            if each["finish_reason"] is not None:
                choice.finish_reasons.append(each["finish_reason"])


async def read_stream(
    url: str, path: str, body: dict[str, Any], history: History, leave_after: int | None = None
) -> History:
    """Ask, and listen to the end, or until so many tokens were heard and the reader leaves."""
    where = urlsplit(url)
    history.started_s = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
    except OSError as err:
        history.lost = f"no connection: {err}"
        return history
    try:
        data = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        await writer.drain()
        await _read_head(reader, history)
        if history.status != 200:
            await reader.read()
            history.ended_s = time.monotonic()
            return history
        async for line in _lines(reader, history):
            if line.startswith(b"data: "):
                history.take(line[6:].decode())
            if leave_after is not None and history.num_tokens >= leave_after:
                return history
        history.ended_s = time.monotonic()
    except (OSError, asyncio.IncompleteReadError, ValueError) as err:
        history.lost = f"{type(err).__name__}: {err}"
    finally:
        writer.close()
    return history


async def _read_head(reader: asyncio.StreamReader, history: History) -> None:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    history.status = int(status.split()[1])
    for line in lines:
        name, _, value = line.partition(":")
        history.headers[name.strip().lower()] = value.strip()


async def _lines(reader: asyncio.StreamReader, history: History):  # type: ignore[no-untyped-def]
    """The lines of a body, chunked or not, to its regular end."""
    is_chunked = history.headers.get("transfer-encoding") == "chunked"
    rest = b""
    while True:
        if is_chunked:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            piece = await reader.readexactly(size + 2)
            if size == 0:
                break
            rest += piece[:-2]
        else:
            piece = await reader.read(65536)
            if not piece:
                break
            rest += piece
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
