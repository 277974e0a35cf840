"""The streaming client, against a server that writes what the test says."""

import asyncio
from collections.abc import Awaitable, Callable

from bench_client import Client, Load, Stream, make_bodies, summarize

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"id":"x","choices":[{"text":" data: {","index":0}],"usage":null}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def request_of(reader: asyncio.StreamReader) -> bytes:
    """One request's body."""
    length = 0
    while line := (await reader.readline()).strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return await reader.readexactly(length)


async def stream_from(handler: Handler, num_streams: int = 1) -> tuple[list[Stream], int]:
    """What the client made of as many requests, one after the other; and its connections."""
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = Client("127.0.0.1", server.sockets[0].getsockname()[1])
        streams = [Stream() for _ in range(num_streams)]
        for stream in streams:
            await client.stream(b'{"prompt":[1]}', stream)
            await asyncio.sleep(0.02)  # for the server's end of the connection, if it leaves
        client.close()
    return streams, num_connections


def test_chunks_are_timed_and_the_usage_counted_on_one_kept_connection() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            assert await request_of(reader) == b'{"prompt":[1]}'
            writer.write(HEAD + chunked(TOKEN, TOKEN + TOKEN, USAGE + DONE))

    streams, num_connections = asyncio.run(stream_from(answer, num_streams=2))
    for stream in streams:
        assert stream.error is None
        assert (len(stream.chunk_times_s), stream.num_tokens) == (3, 3)
        assert stream.sent_at_s < stream.chunk_times_s[0]
    assert num_connections == 1


def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(HEAD + chunked(TOKEN, USAGE, DONE))

    streams, num_connections = asyncio.run(stream_from(answer_once, num_streams=3))
    assert [stream.error for stream in streams] == [None] * 3
    assert num_connections == 3


def test_a_refusal_is_the_requests_error() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")

    (stream,), _ = asyncio.run(stream_from(refuse))
    assert stream.error is not None
    assert "429" in stream.error


def test_an_error_event_and_a_stream_cut_short_fail_the_request() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(HEAD + chunked(TOKEN, b'data: {"error":{"message":"out of luck"}}\n\n', DONE))

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(HEAD + chunked(TOKEN)[:-5])

    (failed,), _ = asyncio.run(stream_from(fail))
    assert failed.error is not None
    assert "out of luck" in failed.error
    (cut,), _ = asyncio.run(stream_from(leave))
    assert cut.error is not None
    assert "IncompleteRead" in cut.error or "invalid literal" in cut.error


def test_figures_are_percentiles_over_whole_requests() -> None:
    streams = [
        Stream(sent_at_s=10.0, chunk_times_s=[10.0 + 0.001 * k, 10.1, 10.3], num_tokens=3)
        for k in range(1, 102)
    ]
    streams.append(Stream(sent_at_s=10.0, chunk_times_s=[99.0], error="gone"))
    found = summarize(streams, start=10.0)
    assert (found["requests"], found["failed"], found["first_error"]) == (102, 1, ["gone"])
    assert (found["ttft_ms_p50"], found["ttft_ms_p99"]) == (51.0, 100.0)
    assert found["itl_ms_p99"] == 200.0
    assert found["tpot_ms_p50"] == 124.5
    assert (found["seconds"], found["tok_s"]) == (0.3, 1010.0)
    assert found["chunks_per_token"] == 1.0


def test_bodies_ask_for_exactly_the_tokens_of_the_load() -> None:
    load = Load(
        host="h", port=1, model="m", id_range=(300, 8000), rate_per_s=1, duration_s=1, scale=0.1
    )
    first, second = make_bodies(load, 2)
    assert b'"ignore_eos": true' in first
    assert b'"model": "m"' in first
    assert first != second
