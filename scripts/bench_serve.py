"""Online measurements: a server under Poisson arrivals, and the message bus under many streams.

The client speaks HTTP/1.1 over plain asyncio streams: a full HTTP library would be the slowest
part of the measurement.
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil
from bench_workload import Work

Result = dict[str, Any]


@dataclass(slots=True)
class Stream:
    """What the client saw of one request. Times are ``time.perf_counter()``."""

    sent_at_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


def serve_and_measure(flags: list[str], port: int, work: Work, arrivals_s: list[float]) -> Result:
    """Start a server on loopback, drive it, stop it."""
    command = [sys.executable, "-m", "frontend", "--port", str(port), "--host", "127.0.0.1", *flags]
    started = time.perf_counter()
    with subprocess.Popen(command, start_new_session=True) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            model = asyncio.run(_wait_until_ready(url, server))
            ready_s = time.perf_counter() - started
            result = asyncio.run(drive(url, model, work, arrivals_s))
            cores = _cpu_s(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return result | {"ready_s": round(ready_s, 2), "cpu_s_per_process": cores}


async def drive(url: str, model: str, work: Work, arrivals_s: list[float]) -> Result:
    """Send each request at its time, stream the answers, and sum up what a client feels."""
    bodies = [
        json.dumps(
            {
                "model": model, "prompt": prompt, "max_tokens": output_len, "ignore_eos": True,
                "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
            }
        ).encode()
        for prompt, output_len in zip(work.prompts, work.output_lens, strict=True)
    ]  # fmt: skip
    streams = [Stream() for _ in bodies]
    start = time.perf_counter() + 0.2
    async with asyncio.TaskGroup() as tasks:
        for at_s, body, stream in zip(arrivals_s, bodies, streams, strict=True):
            await asyncio.sleep(max(0.0, start + at_s - time.perf_counter()))
            tasks.create_task(_stream_one(url, body, stream))
    return _summary(streams, start)


async def _stream_one(url: str, body: bytes, stream: Stream) -> None:
    address = urlsplit(url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    stream.sent_at_s = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            stream.error = status.decode(errors="replace").strip()
            return
        async for line in reader:
            if line.startswith(b"data: {"):
                if b'"choices":[]' in line.replace(b" ", b"")[:4096]:
                    stream.num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                else:
                    stream.chunk_times_s.append(time.perf_counter())
        writer.close()
    except OSError as err:
        stream.error = repr(err)


def _summary(streams: list[Stream], start: float) -> Result:
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
    return {
        "requests": len(streams),
        "failed": len(failed),
        "first_error": failed[:1],
        "seconds": round(end - start, 2),
        "tok_s": round(num_tokens / (end - start), 1),
        "chunks_per_token": round(sum(len(s.chunk_times_s) for s in whole) / num_tokens, 4),
        "ttft_ms_p50": _percentile(ttft, 50),
        "ttft_ms_p99": _percentile(ttft, 99),
        "itl_ms_p50": _percentile(gaps, 50),
        "itl_ms_p99": _percentile(gaps, 99),
        "tpot_ms_p50": _percentile(tpot, 50),
        "tpot_ms_p99": _percentile(tpot, 99),
    }


def _percentile(values: list[float], percent: float) -> float | None:
    values = sorted(values)
    return round(values[round(percent / 100 * (len(values) - 1))], 3) if values else None


async def _wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> str:
    """The first served model's name, once the server answers."""
    address = urlsplit(url)
    while server.poll() is None:
        try:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            head = f"GET /v1/models HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close"
            writer.write(head.encode() + b"\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if b" 200 " in answer.split(b"\r\n", 1)[0]:
                return str(json.loads(answer.split(b"\r\n\r\n", 1)[1])["data"][0]["id"])
        except OSError:
            pass
        await asyncio.sleep(0.05)
    raise RuntimeError(f"the server ended with exit code {server.returncode} before it was ready")


def _cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of a process tree, by what each process is."""
    root = psutil.Process(pid)
    seconds: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        arguments = process.cmdline()
        name = arguments[arguments.index("-m") + 1] if "-m" in arguments else "other"
        times = process.cpu_times()
        seconds[name] = round(seconds.get(name, 0.0) + times.user + times.system, 2)
    return seconds


async def measure_bus(executor_class: str, model: str, num_streams: int, num_tokens: int) -> Result:
    """CPU time per token and stream of frontend and core when the model costs nothing.

    Streams are read from ``AsyncLLM`` as text deltas, so detokenising is part of the figure.
    """
    from frontend import AsyncEngineArgs, AsyncLLM, SamplingParams
    from ipc.sampling_params import RequestOutputKind

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            executor_class=executor_class,
            max_num_seqs=num_streams,
            max_num_batched_tokens=max(2048, num_streams),
            disable_log_stats=True,
            disable_log_requests=True,
        )
    )

    async def read(name: str, length: int) -> int:
        params = SamplingParams(
            temperature=1.0, seed=1, max_tokens=length, ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        count = 0
        async for output in engine.generate({"prompt_token_ids": [5, 6, 7]}, params, name):
            count += len(output.outputs[0].token_ids)
        return count

    try:
        await asyncio.gather(*(read(f"warm-{i}", 8) for i in range(num_streams)))
        tree_before, own_before = _cpu_s(os.getpid()), time.process_time()
        started = time.perf_counter()
        counts = await asyncio.gather(*(read(f"run-{i}", num_tokens) for i in range(num_streams)))
        seconds = time.perf_counter() - started
        own_s = time.process_time() - own_before
        tree_after = _cpu_s(os.getpid())
    finally:
        engine.shutdown()
    assert counts == [num_tokens] * num_streams, "tokens were lost"
    core_s = tree_after.get("engine_core", 0.0) - tree_before.get("engine_core", 0.0)
    total = num_streams * num_tokens
    return {
        "streams": num_streams,
        "tokens_per_stream": num_tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(total / seconds, 1),
        "frontend_cpu_us_per_token": round(1e6 * own_s / total, 2),
        "core_cpu_us_per_token": round(1e6 * core_s / total, 2),
        "wall_us_per_token": round(1e6 * seconds / total, 2),
    }
