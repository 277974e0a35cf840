"""Server-sent events for token streams: bytes in, bytes out, nothing built twice.

Everything of a chunk that a stream's chunks have in common is encoded once; per token only its
text is. The response head leaves with the first event, so an error before it still gets a status.

A chunk leaves in one of two ways. The general one is a coroutine per stream, which waits for its
client and for the engine. While a client keeps up, chunks of plain text take the short one,
``TextShortcut``: written to the connection by the call that takes in a step of the engine.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from frontend.openai.errors import ClientGoneError, error_body
from frontend.request_state import RequestState

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


class ChunkFormat:
    """The chunks of one choice of one stream.

    ``text_chunk`` serves nearly every token; ``chunk`` the ones that carry anything else.
    """

    __slots__ = ("_after_text", "_before_text", "_tail", "_usage_null")

    def __init__(self, head: bytes, index: int, *, is_chat: bool, usage_null: bool) -> None:
        """``head`` is the chunk up to its choices (``stream_head``)."""
        opening = b'"delta":{"content":' if is_chat else b'"text":'
        self._before_text = head + b'{"index":%d,' % index + opening
        self._after_text = b"}," if is_chat else b","
        self._usage_null = b',"usage":null' if usage_null else b""
        plain = b'"logprobs":null,"finish_reason":null,"stop_reason":null}]'
        self._tail = self._after_text + plain + self._usage_null + b"}\n\n"

    def text_chunk(self, text: str) -> bytes:
        """A chunk that brings text and nothing else."""
        return self._before_text + _encode(text) + self._tail

    def chunk(
        self,
        text: str,
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
        usage: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A chunk with anything a chunk may have; ``extra`` are further fields of the choice."""
        fields = {
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            **(extra or {}),
        }
        end = self._usage_null if usage is None else b',"usage":' + _encode(usage)
        choice = self._before_text + _encode(text) + self._after_text + _encode(fields)[1:]
        return choice + b"]" + end + b"}\n\n"


def stream_head(response_id: str, kind: str, created: int, model: str) -> bytes:
    """What all chunks of a stream begin with, up to the opening of ``choices``."""
    fields = {"id": response_id, "object": kind, "created": created, "model": model}
    return b"data: " + _encode(fields)[:-1] + b',"choices":['


def role_chunk(head: bytes, index: int, role: str, fields: Mapping[str, Any]) -> bytes:
    """The first chunk of a chat choice: who speaks, and no text.

    Args:
        fields: further fields of the chunk, ``usage`` say.
    """
    choice = {
        "index": index,
        "delta": {"role": role, "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    end = b"," + _encode(fields)[1:] if fields else b"}"
    return head + _encode(choice) + b"]" + end + b"\n\n"


def usage_chunk(head: bytes, usage: Mapping[str, Any]) -> bytes:
    """The last chunk of a stream that was asked for its usage: no choices."""
    return head + b'],"usage":' + _encode(usage) + b"}\n\n"


def event(body: Any) -> bytes:
    """Any JSON as one event."""
    return b"data: " + _encode(body) + b"\n\n"


class Body(Protocol):
    """A connection's own way to take parts of a body: ``http_protocol.DirectBody``."""

    @property
    def takes_now(self) -> bool:
        """Whether ``write`` may be called."""

    def write(self, data: bytes) -> None:
        """Write at once."""


class EventWriter:
    """Writes the events of one stream. The response's head leaves with the first of them."""

    def __init__(self, scope: Scope, send: Send, head: Message) -> None:
        self._send = send
        self._send_body: Send = scope["state"].get("send_body", send)
        self._head = head
        self.has_begun = False
        self._direct: Body | None = scope["state"].get("direct_body")
        self._keeping: asyncio.Task[None] | None = None  # sends a comment

    async def __call__(self, data: bytes) -> None:
        """Write events; returns when the client is ready for more."""
        if not self.has_begun:
            self.has_begun = True
            await self._send(self._head)
        await self._send_body({"type": "http.response.body", "body": data, "more_body": True})

    def keep_alive(self) -> None:
        """Write a comment, unless nothing was written yet or the client does not keep up."""
        if not self.has_begun:
            return  # an error can still become a status
        if self._direct is not None:
            if self._direct.takes_now:
                self._direct.write(KEEP_ALIVE)
        elif self._keeping is None or self._keeping.done():
            message = {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
            self._keeping = asyncio.ensure_future(_send_quietly(self._send_body, message))

    def shortcut(self, formats: Sequence[ChunkFormat]) -> "TextShortcut | None":
        """The short way for one job's text, where the connection has one."""
        return None if self._direct is None else TextShortcut(self._direct, formats)

    async def end(self) -> None:
        """Write what every stream ends with."""
        await self(DONE)
        await self._send_body({"type": "http.response.body", "body": b"", "more_body": False})


class TextShortcut:
    """Writes the new text of one job, and nothing else of it.

    Offered the news of a step (``OutputStream.offer_news_to``), it leaves to the job's coroutine
    whatever is more than text, and everything while the client does not keep up: the text of
    several steps is then one chunk.
    """

    __slots__ = ("_formats", "_out")

    def __init__(self, out: Body, formats: Sequence[ChunkFormat]) -> None:
        self._out = out
        self._formats = formats

    def __call__(self, state: RequestState) -> bool:
        """Write what is new; False when that is for the coroutine to do."""
        formats = self._formats
        if state.num_unfinished != len(formats) or not self._out.takes_now:
            return False
        state.is_news = False
        data = b""
        for index, chunk_format in enumerate(formats):
            if text := state.take_text(index):
                data += chunk_format.text_chunk(text)
        if data:
            self._out.write(data)
        return True


class EventStream(Response):
    """A response whose events ``produce`` writes, until it returns or the client leaves.

    An exception before the first event is raised, to become a status; after it, it becomes an
    error event, and the stream ends in order.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[EventWriter], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
        open_streams: "set[EventWriter] | None" = None,
    ) -> None:
        """Serve what ``produce`` writes; while it does, its writer is in ``open_streams``."""
        self.status_code = 200
        self.background = background
        self.body = b""
        self._produce = produce
        self._open_streams: set[EventWriter] = set() if open_streams is None else open_streams
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.headers.update(headers or {})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        write = EventWriter(scope, send, head)

        async def run() -> None:
            self._open_streams.add(write)
            try:
                await self._produce(write)
            except Exception as error:  # whatever it is, the reader of the stream is told
                if not write.has_begun:
                    raise
                await write(_error_event(error))
            finally:
                self._open_streams.discard(write)
            await write.end()

        try:
            await unless_disconnected(receive, run())
        except ClientGoneError:
            logger.debug("a client left its stream")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` until it ends or the client leaves.

    It runs in a task of its own: a token then wakes a short chain of coroutines, not the whole
    stack of the web framework.

    Raises:
        ClientGoneError: the client left; the work was cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(_wait_for_disconnect(receive))
            worker = tasks.create_task(work)
            worker.add_done_callback(lambda _: watcher.cancel())
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return worker.result()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that matters of a task group's: a real one before a client's leaving."""
    errors = []
    for error in group.exceptions:
        errors.append(first_error(error) if isinstance(error, BaseExceptionGroup) else error)
    real = [error for error in errors if not isinstance(error, ClientGoneError)]
    return (real or errors)[0]


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError("the client closed the connection")


async def _send_quietly(send: Send, message: Message) -> None:
    with contextlib.suppress(OSError):  # the client is gone, which its own stream will see
        await send(message)


def _error_event(error: Exception) -> bytes:
    status, body = error_body(error)
    if status == 500:
        logger.error("a stream failed inside the server", exc_info=error)
    return event(body)
