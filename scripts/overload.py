#!/usr/bin/env python3
"""More than a server can do, on purpose: floods, overload, slow clients, a drain under load.

Each command starts a server on a model of its own choice, loads it, and prints what clients saw as
JSON: ``scripts/overload flood --requests 10000``. The client is one event loop on plain sockets.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "scripts" / "demo_models" / "tiny"
START_LIMIT_S = 120.0
READ_LIMIT_S = 300.0


@dataclass(slots=True)
class Answer:
    """What one client saw. Times are seconds after its request was sent."""

    status: int = 0  # 0: the connection ended without an answer
    retry_after: int | None = None
    head_s: float = 0.0
    first_s: float | None = None  # first token
    end_s: float = 0.0
    num_chunks: int = 0  # with text: about one per token
    finish_reason: str | None = None
    is_complete: bool = False  # the stream said [DONE]


@dataclass(slots=True)
class Server:
    """A running server under test."""

    process: "subprocess.Popen[bytes]"
    port: int
    peak_rss: int = field(default=0)

    def rss(self) -> int:
        """Resident bytes of the whole tree."""
        main = psutil.Process(self.process.pid)
        total = 0
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        self.peak_rss = max(self.peak_rss, total)
        return total

    def own_rss(self) -> int:
        """Resident bytes of the process that the clients are connected to."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def num_fds(self) -> int:
        """Descriptors of the process that the clients are connected to."""
        return int(psutil.Process(self.process.pid).num_fds())


@contextlib.contextmanager
def running_server(model: Path, *flags: str) -> Iterator[Server]:
    """Serve ``model``; whoever uses it may have ended it before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "frontend", "--model", str(model), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--worker-threads", "1", "--disable-access-log",
        "--disable-log-requests", "--uvicorn-log-level", "warning", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield Server(process, port)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.05)
    raise SystemExit("the server did not start")


# ---------------------------------------------------------------- one client


def request_bytes(path: str = "/v1/completions", headers: str = "", **body: Any) -> bytes:
    """A request as it goes over the wire."""
    if not body:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
    data = json.dumps({"ignore_eos": True, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


async def ask(port: int, request: bytes, answer: Answer | None = None) -> Answer:
    """Send one request and read its answer to the end; ``answer`` grows meanwhile."""
    answer = Answer() if answer is None else answer
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return answer
    sent_s = time.monotonic()
    try:
        writer.write(request)
        async with asyncio.timeout(READ_LIMIT_S):
            await _read_answer(reader, answer, sent_s)
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        pass  # what was seen so far is what there is
    finally:
        writer.close()
    answer.end_s = time.monotonic() - sent_s
    return answer


async def _read_answer(reader: asyncio.StreamReader, answer: Answer, sent_s: float) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    answer.head_s = time.monotonic() - sent_s
    lines = head.decode().split("\r\n")
    answer.status = int(lines[0].split()[1])
    for line in lines[1:]:
        name, _, value = line.partition(": ")
        if name.lower() == "retry-after":
            answer.retry_after = int(value)
    while line_bytes := await reader.readline():
        if not line_bytes.startswith(b"data: "):
            continue
        if line_bytes.startswith(b"data: [DONE]"):
            answer.is_complete = True
            continue
        chunk = json.loads(line_bytes[6:])
        if "choices" not in chunk:
            continue
        for choice in chunk["choices"]:
            answer.num_chunks += 1
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if answer.first_s is None:
            answer.first_s = time.monotonic() - sent_s


def quantile(values: list[float], share: float) -> float | None:
    """The value that ``share`` of all values do not exceed."""
    if not values:
        return None
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)


# ---------------------------------------------------------------- the loads


async def flood(
    server: Server, num_requests: int, max_tokens: int, over_s: float = 0.0
) -> dict[str, Any]:
    """Everybody at once: most are refused, and at once; whoever is let in is served.

    Args:
        over_s: come within so many seconds instead, so that the client's own queue is short.
    """
    await saturate(server, 64, 2.0, max_tokens, "def f")  # so that memory is touched
    before, own_before = server.rss(), server.own_rss()
    own_peak = 0
    request = request_bytes(prompt="def f", max_tokens=max_tokens, stream=True)
    slots = asyncio.Semaphore(4000)  # sockets of this process

    async def one(delay_s: float) -> Answer:
        nonlocal own_peak
        await asyncio.sleep(delay_s)
        async with slots:
            answer = await ask(server.port, request)
        if answer.status == 200:
            own_peak = max(own_peak, server.own_rss())
        return answer

    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(_watch_rss(server))
        delays = [over_s * i / num_requests for i in range(num_requests)]
        running = [tasks.create_task(one(delay_s)) for delay_s in delays]
        await asyncio.wait(running)
        watcher.cancel()
    answers = [task.result() for task in running]
    refused = [answer for answer in answers if answer.status == 429]
    accepted = [answer for answer in answers if answer.status == 200]
    return {
        "statuses": dict(Counter(answer.status for answer in answers)),
        "retry_after": sorted({a.retry_after for a in refused if a.retry_after is not None}),
        "without_advice": sum(answer.retry_after is None for answer in refused),
        "reject_s": {q: quantile([a.head_s for a in refused], float(q)) for q in ("0.5", "0.99")},
        "accepted_unfinished": sum(not (a.is_complete and a.finish_reason) for a in accepted),
        "rss_growth_mb": (server.peak_rss - before) >> 20,
        "rss_growth_of_the_api_process_mb": max(0, own_peak - own_before) >> 20,
    }


async def _watch_rss(server: Server) -> None:
    while True:
        server.rss()
        await asyncio.sleep(0.25)


async def offer(
    server: Server, rate: float, seconds: float, max_tokens: int, prompt: str
) -> dict[str, Any]:
    """Requests at a steady rate, whatever becomes of them; tokens of those that finished."""
    request = request_bytes(prompt=prompt, max_tokens=max_tokens, stream=True)
    began_s = time.monotonic()
    answers: list[Answer] = []
    async with asyncio.TaskGroup() as tasks:
        for i in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began_s + i / rate - time.monotonic()))
            answers.append(Answer())
            tasks.create_task(ask(server.port, request, answers[-1]))
    elapsed_s = time.monotonic() - began_s
    finished = [answer for answer in answers if answer.is_complete]
    firsts = [answer.first_s for answer in finished if answer.first_s is not None]
    return {
        "rate": round(rate, 2),
        "statuses": dict(Counter(answer.status for answer in answers)),
        "tokens_per_s": round(max_tokens * len(finished) / elapsed_s, 1),
        "first_token_s": {q: quantile(firsts, float(q)) for q in ("0.5", "0.99")},
    }


async def saturate(
    server: Server, clients: int, seconds: float, max_tokens: int, prompt: str
) -> float:
    """Requests per second of clients that each ask again when they are answered."""
    request = request_bytes(prompt=prompt, max_tokens=max_tokens, stream=True)
    ends_s = time.monotonic() + seconds
    count = 0

    async def client() -> None:
        nonlocal count
        while time.monotonic() < ends_s:
            answer = await ask(server.port, request)
            count += answer.is_complete

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return count / seconds


async def goodput(server: Server, clients: int, seconds: float, max_tokens: int) -> dict[str, Any]:
    """Tokens per second at the capacity and at three times as much."""
    prompt = "def f(x):\n    return x + 1\n" * 8
    await saturate(server, clients, min(5.0, seconds), max_tokens, prompt)  # warm up
    capacity = await saturate(server, clients, seconds, max_tokens, prompt)
    once = await offer(server, capacity, seconds, max_tokens, prompt)
    thrice = await offer(server, 3 * capacity, seconds, max_tokens, prompt)
    return {
        "capacity_per_s": round(capacity, 2),
        "1x": once,
        "3x": thrice,
        "ratio": round(thrice["tokens_per_s"] / once["tokens_per_s"], 3),
    }


async def drain(server: Server, streams: int, max_tokens: int, *, is_twice: bool) -> dict[str, Any]:
    """SIGTERM under open streams, and another one a second later if ``is_twice``."""
    answers = [Answer() for _ in range(streams)]
    request = request_bytes(prompt="def", max_tokens=max_tokens, stream=True)
    async with asyncio.TaskGroup() as tasks:
        for answer in answers:
            tasks.create_task(ask(server.port, request, answer))
        while not all(answer.num_chunks for answer in answers):
            await asyncio.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        late = await ask(server.port, request)
        health = await ask(server.port, request_bytes("/health", "Connection: close\r\n"))
        if is_twice:
            await asyncio.sleep(max(0.0, told_s + 1.0 - time.monotonic()))
            server.process.send_signal(signal.SIGTERM)
            told_s = time.monotonic()
        code = await asyncio.to_thread(server.process.wait, 120)
        exit_s = time.monotonic() - told_s
    return {
        "late": {
            "status": late.status,
            "retry_after": late.retry_after,
            "s": round(late.head_s, 3),
        },
        "health": health.status,
        "exit_code": code,
        "exit_s": round(exit_s, 2),
        "reasons": dict(Counter(str(answer.finish_reason) for answer in answers)),
        "not_done": sum(not answer.is_complete for answer in answers),
    }


async def slow(server: Server, streams: int, num_slow: int, max_tokens: int) -> dict[str, Any]:
    """Streams beside clients that hardly send and clients that hardly read."""
    before_rss, before_fds = server.rss(), server.num_fds()
    alone = [await _stream_rate(server, streams, max_tokens) for _ in range(3)]
    opened = [await _open_slow(server.port, b"POST /v1/completions HT") for _ in range(num_slow)]
    body = request_bytes("/openapi.json") * 2  # more than such a client reads in a day
    opened += [await _open_slow(server.port, body) for _ in range(num_slow)]
    began_s = time.monotonic()
    trickle = asyncio.create_task(_trickle(opened))
    watcher = asyncio.create_task(_watch_rss(server))
    beside = [await _stream_rate(server, streams, max_tokens) for _ in range(3)]
    while server.num_fds() > before_fds + 5 and time.monotonic() - began_s < 90:
        await asyncio.sleep(0.5)
    cut_s = time.monotonic() - began_s
    for task in (trickle, watcher):
        task.cancel()
    for each in opened:
        each.close()
    return {
        "alone_tokens_per_s": [round(rate, 1) for rate in alone],
        "beside_tokens_per_s": [round(rate, 1) for rate in beside],
        "ratio": round(statistics.median(beside) / statistics.median(alone), 3),
        "all_cut_after_s": round(cut_s, 1),
        "rss_growth_mb": (server.peak_rss - before_rss) >> 20,
    }


async def _stream_rate(server: Server, streams: int, max_tokens: int) -> float:
    request = request_bytes(prompt="def", max_tokens=max_tokens, stream=True)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask(server.port, request)) for _ in range(streams)]
    answers = [task.result() for task in running]
    if not all(answer.is_complete for answer in answers):
        raise SystemExit(f"streams failed: {Counter(answer.status for answer in answers)}")
    return streams * max_tokens / (time.monotonic() - began_s)


async def _open_slow(port: int, data: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.sock_sendall(connection, data)
    return connection


async def _trickle(connections: list[socket.socket]) -> None:
    """A byte a second from each."""
    while True:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.recv(1)
        await asyncio.sleep(1.0)


def main() -> int:
    """Run one load and print what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("load", choices=("flood", "goodput", "drain", "slow"))
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--requests", type=int, default=10_000, help="flood: how many at once")
    parser.add_argument("--over", type=float, default=0.0, help="flood: come within SECONDS")
    parser.add_argument("--queue", type=int, default=1000, help="requests that may wait")
    parser.add_argument("--streams", type=int, help="drain: 64, slow: 32")
    parser.add_argument("--seconds", type=float, default=120.0, help="goodput: of each rate")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--slow-clients", type=int, default=1000, help="of each kind")
    parser.add_argument("--twice", action="store_true", help="drain: a second signal")
    parser.add_argument("--flag", action="append", default=[], help="one more flag of the server")
    args = parser.parse_args()
    flags = ["--max-num-seqs", "64", "--max-waiting-requests", str(args.queue), *args.flag]
    with running_server(args.model, *flags) as server:
        match args.load:
            case "flood":
                seen = asyncio.run(flood(server, args.requests, args.max_tokens, args.over))
            case "goodput":
                seen = asyncio.run(goodput(server, 64, args.seconds, args.max_tokens))
            case "drain":
                streams, twice = args.streams or 64, args.twice
                seen = asyncio.run(drain(server, streams, args.max_tokens, is_twice=twice))
            case _:
                streams, num_slow = args.streams or 32, args.slow_clients
                seen = asyncio.run(slow(server, streams, num_slow, args.max_tokens))
    print(json.dumps({args.load: seen}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
