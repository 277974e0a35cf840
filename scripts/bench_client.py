"""A streaming client for /v1/completions in a process of its own: Poisson arrivals, token ids in.

Protocol of the process: a ``Load`` as JSON on stdin, "ready" on stdout, any line on stdin to go,
the result as JSON on stdout. Connections are kept and reused. It speaks HTTP/1.1 over plain asyncio
streams, because a full HTTP library would be the slowest part of the measurement; its own processor
time is in the result, so that a client which was the limit is seen.

TTFT: sent to first chunk with a choice. ITL: gaps between a request's chunks (a server may put
several tokens into one; ``chunks_per_token`` says whether it did). TPOT: (last - first chunk) /
(tokens - 1).
"""

import asyncio
import itertools
import json
import resource
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import bench_workload

Result = dict[str, Any]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send, where, and how fast."""

    host: str
    port: int
    model: str
    id_range: tuple[int, int]
    rate_per_s: float
    duration_s: float
    scale: float = 1.0  # of the lengths


@dataclass(slots=True)
class Stream:
    """What the client saw of one request. Times are ``time.perf_counter()``."""

    sent_at_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


class Client:
    """Owns the connections to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[Connection] = []

    async def stream(self, body: bytes, stream: Stream) -> None:
        """Send one request and note its chunks; a failure ends up in ``stream.error``."""
        stream.sent_at_s = time.perf_counter()
        try:
            connection = await self._connect()
        except OSError as err:
            stream.error = repr(err)
            return
        try:
            await self._exchange(connection, body, stream)
        except (OSError, EOFError, ValueError) as err:
            stream.error = repr(err)[:200]
            connection[1].close()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        """Close every connection."""
        for _, writer in self._idle:
            writer.close()

    async def _connect(self) -> Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server closes what has been idle for long
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address, limit=_MAX_LINE_BYTES)

    async def _exchange(self, connection: Connection, body: bytes, stream: Stream) -> None:
        reader, writer = connection
        host, port = self._address
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"the server answered {status!r}")
        while (await reader.readline()).strip():
            pass  # the head says nothing of interest: our server's streams are chunked
        async for part in _chunks(reader):
            now = time.perf_counter()
            for line in part.splitlines():
                if line.startswith(b"data: {"):
                    _note(line[6:], now, stream)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of a chunked body, through its end."""
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)


def _note(event: bytes, now: float, stream: Stream) -> None:
    if b'"choices":[]' in event:
        stream.num_tokens = json.loads(event)["usage"]["completion_tokens"]
    elif b'"choices":[' in event:
        stream.chunk_times_s.append(now)
    else:
        stream.error = event.decode(errors="replace")[:200]


async def drive(load: Load, arrivals_s: list[float], bodies: list[bytes]) -> Result:
    """Send each request at its time, stream the answers, and sum up what a client feels."""
    client = Client(load.host, load.port)
    streams = [Stream() for _ in bodies]
    start = time.perf_counter() + 0.2
    async with asyncio.TaskGroup() as tasks:
        for at_s, body, stream in zip(arrivals_s, bodies, streams, strict=True):
            await asyncio.sleep(max(0.0, start + at_s - time.perf_counter()))
            tasks.create_task(client.stream(body, stream))
    client.close()
    return summarize(streams, start)


def make_bodies(load: Load, num_requests: int) -> list[bytes]:
    """The requests' bodies, ready to send."""
    work = bench_workload.sharegpt_like(num_requests, load.id_range, load.scale)
    common = {
        "model": load.model, "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return [
        json.dumps(common | {"prompt": prompt, "max_tokens": output_len}).encode()
        for prompt, output_len in zip(work.prompts, work.output_lens, strict=True)
    ]


def summarize(streams: list[Stream], start: float) -> Result:
    """Percentiles over the requests that came through whole."""
    whole = [s for s in streams if s.error is None and s.num_tokens and s.chunk_times_s]
    failed = [s.error for s in streams if s.error is not None]
    if not whole:
        return {"requests": len(streams), "failed": len(failed), "first_error": failed[:1]}
    end = max(s.chunk_times_s[-1] for s in whole)
    ttft = [1e3 * (s.chunk_times_s[0] - s.sent_at_s) for s in whole]
    gaps = [1e3 * (b - a) for s in whole for a, b in itertools.pairwise(s.chunk_times_s)]
    tpot = [
        1e3 * (s.chunk_times_s[-1] - s.chunk_times_s[0]) / (s.num_tokens - 1)
        for s in whole
        if s.num_tokens > 1
    ]
    num_tokens = sum(s.num_tokens for s in whole)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": len(streams),
        "failed": len(failed),
        "first_error": failed[:1],
        "seconds": round(end - start, 2),
        "output_tokens": num_tokens,
        "tok_s": round(num_tokens / (end - start), 1),
        "chunks_per_token": round(sum(len(s.chunk_times_s) for s in whole) / num_tokens, 4),
        "ttft_ms_p50": percentile(ttft, 50),
        "ttft_ms_p99": percentile(ttft, 99),
        "itl_ms_p50": percentile(gaps, 50),
        "itl_ms_p99": percentile(gaps, 99),
        "tpot_ms_p50": percentile(tpot, 50),
        "tpot_ms_p99": percentile(tpot, 99),
        "client_cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
    }


def percentile(values: list[float], percent: float) -> float | None:
    """The value at this rank, rounded; None of nothing."""
    values = sorted(values)
    return round(values[round(percent / 100 * (len(values) - 1))], 3) if values else None


def encode_load(load: Load) -> str:
    """One line of JSON."""
    return json.dumps(asdict(load)) + "\n"


def main() -> None:
    """Be the client process."""
    values = json.loads(sys.stdin.readline())
    load = Load(**(values | {"id_range": tuple(values["id_range"])}))
    arrivals_s = bench_workload.poisson_arrivals_s(load.rate_per_s, load.duration_s)
    bodies = make_bodies(load, len(arrivals_s))
    print("ready", flush=True)
    sys.stdin.readline()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        print(json.dumps(runner.run(drive(load, arrivals_s, bodies))), flush=True)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
