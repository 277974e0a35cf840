"""The HTTP path alone: one API process or several, an engine core without a model, many streams.

The clients are processes of their own that read raw bytes and count events, so that they are not
the limit; how busy they were is part of the result. What one token costs is CPU time over
tokens, which other work on the machine disturbs less than the clock.
"""

import argparse
import itertools
import json
import random
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
SCRIPTED = "tests.engine_core.scripted_executor:ScriptedExecutor"
PACED = "scripts.bench_paced_executor:PacedExecutor"
NUM_WATCHED = 16  # streams per client whose gaps between chunks are looked at
EVENT = b"data: "
MODEL = ROOT / "scripts" / "demo_models" / "tiny"
TAIL_BYTES = 24  # of a stream, kept to recognise marks that two reads share, and its end
SHORT_LEN = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one client process asks for."""

    port: int
    num_streams: int
    output_len: int
    rate: float  # requests per second; 0: all at once
    is_chat: bool
    input_len: int = 32


@dataclass(slots=True)
class Seen:
    """What one client process saw. Times are ``time.monotonic()``, one clock for all."""

    num_events: int = 0
    num_bytes: int = 0
    num_reads: int = 0
    num_complete: int = 0  # streams that ended with [DONE]
    first_s: float = 0.0  # the first byte of the first answer
    last_s: float = 0.0  # the last byte of the last one
    gaps_ms: list[float] = field(default_factory=list)  # of the watched streams
    cpu_s: float = 0.0


@dataclass(slots=True)
class EventCounter:
    """Counts the events of one stream, however its bytes are cut."""

    tail: bytes = b""

    def take(self, data: bytes) -> int:
        """How many events begin in these bytes, or have their mark completed by them."""
        whole = self.tail + data
        num_new = whole.count(EVENT) - self.tail.count(EVENT)
        self.tail = whole[-TAIL_BYTES:]
        return num_new


class Client:
    """Reads many streams in one thread, as bytes."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._counters: dict[int, EventCounter] = {}
        self._arrivals_s: dict[int, list[float]] = {}
        self._seen = Seen()

    def run(self) -> Seen:
        """Open every stream at its time, and read until all have ended."""
        random_, began_s = random.Random(7), time.process_time()
        load, due_s = self._load, time.monotonic()
        num_left = load.num_streams
        while num_left or self._sockets:
            now_s = time.monotonic()
            while num_left and due_s <= now_s:
                self._open(num_left)
                num_left -= 1
                due_s += random_.expovariate(load.rate) if load.rate else 0.0
            wait_s = max(0.0, due_s - time.monotonic()) if num_left else None
            for descriptor, _ in self._poll.poll(wait_s, 4096):
                self._read(descriptor)
        gaps = (itertools.pairwise(times) for times in self._arrivals_s.values())
        self._seen.gaps_ms = [1e3 * (b - a) for pairs in gaps for a, b in pairs]
        self._seen.cpu_s = time.process_time() - began_s
        return self._seen

    def _open(self, number: int) -> None:
        load = self._load
        body: Result = {
            "max_tokens": load.output_len, "ignore_eos": True, "stream": True,
            "temperature": 1.0, "seed": number,
        }  # fmt: skip
        if load.is_chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Hi"}]
        else:
            path, body["prompt"] = "/v1/completions", [300 + i for i in range(load.input_len)]
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", load.port))
        connection.sendall(head.encode() + data)
        connection.setblocking(False)
        descriptor = connection.fileno()
        self._sockets[descriptor] = connection
        self._counters[descriptor] = EventCounter()
        if number <= NUM_WATCHED:
            self._arrivals_s[descriptor] = []
        self._poll.register(descriptor, select.EPOLLIN)

    def _read(self, descriptor: int) -> None:
        seen = self._seen
        data = self._sockets[descriptor].recv(1 << 18)
        seen.num_reads += 1
        if not data:
            tail = self._counters.pop(descriptor).tail
            seen.num_complete += tail.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
            self._poll.unregister(descriptor)
            self._sockets.pop(descriptor).close()
            return
        seen.last_s = time.monotonic()
        seen.first_s = seen.first_s or seen.last_s
        seen.num_bytes += len(data)
        seen.num_events += self._counters[descriptor].take(data)
        if (arrivals_s := self._arrivals_s.get(descriptor)) is not None:
            arrivals_s.append(seen.last_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    add = parser.add_argument
    add("--streams", type=int, nargs="+", default=[1, 64, 1024], help="streams at once, each size")
    add("--output-len", type=int, default=200, help="tokens per stream")
    add("--step-ms", type=float, default=10.0, help="time of an engine step; 0: as fast as it goes")
    add("--arrivals", type=float, default=0.0, help="requests per second; 0: all at once")
    add("--requests", type=int, default=400, help="how many, with --arrivals")
    add("--chat", action="store_true", help="the chat endpoint in place of completions")
    add("--api-server-count", type=int, default=1, help="API processes on one port")
    add("--clients", type=int, default=2, help="client processes")
    add("--rounds", type=int, default=1, help="repeats")
    add("--port", type=int, default=8231)
    add("--model", default=str(MODEL), help="directory whose tokenizer is used")
    add("--output", help="file that the JSON lines are appended to")


def run(args: argparse.Namespace) -> int:
    """Measure every size, a JSON line each."""
    for num_streams in args.streams * args.rounds:
        line = json.dumps({"kind": "sse"} | measure(args, num_streams))
        print(line, flush=True)
        if args.output:
            with Path(args.output).open("a") as file:
                file.write(line + "\n")
    return 0


def measure(args: argparse.Namespace, num_streams: int) -> Result:
    """Start core and API processes, drive them, and sum up."""
    args = argparse.Namespace(**vars(args) | {"streams": num_streams})
    sys.path.insert(0, str(ROOT))
    from frontend.core_client import ProcessCoreClient
    from frontend.engine_args import EngineArgs
    from frontend.engine_setup import with_executor_path
    from frontend.launcher import Launch

    engine_args = EngineArgs(
        model=args.model,
        load_format="dummy",
        max_num_seqs=max(args.streams, 8),
        max_num_batched_tokens=max(2048, 64 * args.streams),  # all prompts in one step
        enable_prefix_caching=False,
        model_loader_extra_config={"step_ms": args.step_ms},
        disable_log_stats=True,
    )
    config = with_executor_path(
        engine_args.create_engine_config(), PACED if args.step_ms else SCRIPTED
    )
    launch = Launch(config, shows_progress=False)
    try:
        launch.wait_ready()
        assert launch.address is not None
        core = ProcessCoreClient(launch.address)
        try:
            return _measure_servers(args, launch.address, core)
        finally:
            core.close()
    finally:
        launch.terminate()


def _measure_servers(args: argparse.Namespace, address: str, core: Any) -> Result:
    command = [
        sys.executable, "-m", "frontend", "--attach", address, "--host", "127.0.0.1",
        "--port", str(args.port), "--uvicorn-log-level", "warning", "--disable-log-requests",
        "--disable-log-stats", "--disable-access-log",
    ]  # fmt: skip
    if args.api_server_count > 1:
        command += ["--api-server-count", str(args.api_server_count)]
    with subprocess.Popen(command, cwd=ROOT) as server:
        try:
            _wait_until_listening(args.port, server)
            _drive(args, core, output_len=SHORT_LEN, rate=0.0)
            _, short_s = _drive(args, core, output_len=SHORT_LEN, rate=0.0)
            seen, spent_s = _drive(args, core, output_len=args.output_len, rate=args.arrivals)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return _summary(args, seen, short_s, spent_s)


def _wait_until_listening(port: int, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port)) as probe:
                probe.sendall(b"GET /health HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
                if b" 200 " in probe.recv(4096):
                    return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server ended with exit code {server.returncode}")


def _drive(
    args: argparse.Namespace, core: Any, *, output_len: int, rate: float
) -> tuple[list[Seen], dict[str, float]]:
    """Run the client processes; what each saw, and the CPU seconds of ours meanwhile.

    Without a rate all streams begin with the same step: the engine pauses until they are open.
    """
    from ipc.operations import GetStats, PauseGeneration, ResumeGeneration

    clients = []
    before = _cpu_s_by_module()
    if not rate:
        core.call(PauseGeneration("keep"))
    for number in range(args.clients):
        load = Load(
            port=args.port,
            num_streams=len(
                range(number, args.streams if not rate else args.requests, args.clients)
            ),
            output_len=output_len,
            rate=rate / args.clients,
            is_chat=args.chat,
        )
        command = [sys.executable, __file__, json.dumps(asdict(load))]
        if load.num_streams:
            clients.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    if not rate:
        while core.call(GetStats()).num_waiting < args.streams:
            time.sleep(0.05)
        core.call(ResumeGeneration())
    answers = [client.communicate()[0] for client in clients]
    spent_s = {name: s - before.get(name, 0.0) for name, s in _cpu_s_by_module().items()}
    return [Seen(**json.loads(answer)) for answer in answers], spent_s


def _cpu_s_by_module() -> dict[str, float]:
    """CPU seconds of the processes below this one, by the package that they run."""
    seconds: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        arguments = process.cmdline()
        name = arguments[arguments.index("-m") + 1] if "-m" in arguments else "other"
        times = process.cpu_times()
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def _summary(
    args: argparse.Namespace, seen: list[Seen], short_s: dict[str, float], spent_s: dict[str, float]
) -> Result:
    """One line of results.

    Without arrivals the cost of a request is that of short ones, and is taken out of the cost of
    a token; with arrivals a token pays its share of its request.
    """
    num_requests = args.requests if args.arrivals else args.streams
    num_tokens = num_requests * args.output_len
    seconds = max(s.last_s for s in seen) - min(s.first_s for s in seen)
    gaps_ms = sorted(gap for s in seen for gap in s.gaps_ms)
    num_paid, paid_s = num_tokens, spent_s
    if not args.arrivals:
        num_paid = num_requests * (args.output_len - SHORT_LEN)
        paid_s = {name: spent_s[name] - short_s[name] for name in short_s}
    us_per_token = {name: round(1e6 * s / num_paid, 2) for name, s in paid_s.items()}
    return {
        "streams": args.streams,
        "step_ms": args.step_ms,
        "arrivals_s": args.arrivals,
        "api_processes": args.api_server_count,
        "complete": sum(s.num_complete for s in seen) == num_requests,
        "seconds": round(seconds, 2),
        "tok_s": round(num_tokens / seconds),
        "api_us_per_token": us_per_token["frontend"],
        "api_ms_per_short_request": round(1e3 * short_s["frontend"] / args.streams, 2),
        "core_us_per_token": us_per_token["engine_core"],
        "client_us_per_token": round(1e6 * sum(s.cpu_s for s in seen) / num_tokens, 2),
        "busiest_client": round(max(s.cpu_s for s in seen) / seconds, 2),
        "events_per_token": round(sum(s.num_events for s in seen) / num_tokens, 3),
        "bytes_per_token": round(sum(s.num_bytes for s in seen) / num_tokens, 1),
        "gap_ms_p50": round(gaps_ms[len(gaps_ms) // 2], 2) if gaps_ms else None,
        "gap_ms_p99": round(gaps_ms[len(gaps_ms) * 99 // 100], 2) if gaps_ms else None,
        "gap_ms_max": round(gaps_ms[-1], 2) if gaps_ms else None,
    }


if __name__ == "__main__":
    print(json.dumps(asdict(Client(Load(**json.loads(sys.argv[1]))).run())))
