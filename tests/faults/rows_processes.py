"""Runs in which processes are stopped, killed, drained or crowded: D05, D08, D14-D17, D23, D24."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from frontend import AsyncLLM
from frontend.launcher import Launch
from tests.e2e.engines import ROOT, TINY, tiny_args
from tests.faults import oracles
from tests.faults.history import History
from tests.faults.http_client import Ask, ask, ask_all
from tests.faults.mixed_traffic import MODEL, completion, decode, encode, mixed, streams
from tests.faults.outcomes import Outcome
from tests.faults.rows_clients import by_name, integrity
from tests.faults.server_tree import Server, serving, until, wait_gone
from tests.fuzz.servers import free_port

POISON = "\u4e16"
HANG_BUDGET_S = 30.0


async def d05_stopped_core(count: int = 5) -> Outcome:
    """The core is stopped, not killed: found by its silence, replaced; the streams go on."""
    outcome = Outcome("D05", f"{count} x SIGSTOP of the core under 16 streams")
    requests = streams("d05-", 16, 200)
    with serving() as server:
        reference = by_name(await ask_all(server.port, requests, at_once=16))
        for _ in range(count):
            running = asyncio.create_task(ask_all(server.port, requests, at_once=16))
            await asyncio.sleep(1.0)
            core = server.core_pid()
            os.kill(core, signal.SIGSTOP)
            try:
                seconds = await until(
                    lambda core=core: core not in server.pids("engine_core"),
                    HANG_BUDGET_S + 15,
                    "end of the stopped core",
                )
                outcome.at_most("seconds until it was ended", seconds, HANG_BUDGET_S + 2, "s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(core, signal.SIGCONT)
            histories = await running
            outcome.none_of("O1 of all streams", integrity(histories))
            outcome.none_of("O2 of all streams", oracles.check_equality(histories, reference))
    return outcome


async def d08_poison(count: int = 63) -> Outcome:
    """A request that kills each core that computes it, among others that must not notice."""
    outcome = Outcome("D08", f"one poison among {count} streams")
    (token,) = encode(POISON)[:1]
    flags = ("--debug-faults", "--failpoints", f"worker.before_forward=abort%{token}")
    requests = streams("d08-", count, 120)
    with serving("--max-num-seqs", str(count + 1)) as server:
        reference = by_name(await ask_all(server.port, requests, at_once=count))
    with serving(*flags, "--max-num-seqs", str(count + 1), expects_clean_end=False) as server:
        cores = {server.core_pid()}
        running = asyncio.create_task(ask_all(server.port, requests, at_once=count))
        await asyncio.sleep(1.0)
        poison = asyncio.create_task(ask(server.port, completion("poison", POISON, 8)))
        while not (poison.done() and running.done()):
            cores.update(server.pids("engine_core")[1:])  # the first is the supervisor
            await asyncio.sleep(0.05)
        histories, bad = await running, await poison
        again = await ask(server.port, completion("poison", POISON, 8))
    outcome.none_of("O1 of the others", integrity(histories))
    outcome.none_of("O2 of the others", oracles.check_equality(histories, reference))
    outcome.at_most("cores that it killed", len(cores) - 1, 3)
    outcome.at_most("status of the poison is 500, off by", abs(bad.status - 500), 0)
    outcome.at_most("status of the same again is 422, off by", abs(again.status - 422), 0)
    return outcome


async def d14_drain(count: int = 64, limit_s: float = 30.0) -> Outcome:
    """SIGTERM under load: new ones are refused, open ones end with a reason, nothing is left."""
    outcome = Outcome("D14", f"SIGTERM with {count} streams, limit {limit_s:g} s; then twice")
    flags = ("--max-num-seqs", str(count), "--shutdown-timeout", f"{limit_s:g}")
    for is_twice in (False, True):
        with serving(*flags, expects_clean_end=False) as server:
            tree = server.tree()
            requests = streams("d14-", count, 1500 if is_twice else 300)
            running = asyncio.create_task(ask_all(server.port, requests, at_once=count))
            await asyncio.sleep(2.0)
            server.process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            if is_twice:
                await asyncio.sleep(0.3)
                started = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
            else:
                await asyncio.sleep(0.05)
                late = await ask(server.port, completion("late", "Hello", 4))
                refused_ms = (late.ended_s - late.started_s) * 1e3
                outcome.at_most("new one refused with 503, off by", abs(late.status - 503), 0)
                outcome.at_most("new one refused within", refused_ms, 100, "ms")
            histories = await running
            code = await asyncio.to_thread(server.process.wait, 60)
            seconds = time.monotonic() - started
            if is_twice:
                outcome.at_most("second signal: end within", seconds, 2.0, "s")
            else:
                ends = oracles.ENDS | {"abort"}
                found = [w for h in histories for w in _end_of_drained(h, ends)]
                outcome.none_of("streams without an end", found)
                outcome.at_most("end within", seconds, limit_s + 1, "s")
                outcome.at_most("exit code", code, 0)
            await asyncio.to_thread(wait_gone, tree)
    return outcome


def _end_of_drained(history: History, ends: frozenset[str]) -> list[str]:
    """O1, but for the length of what the drain ended early."""
    found = oracles.check_integrity(history, decode, ends=ends)
    return [words for words in found if "abort" not in words]


@contextlib.contextmanager
def engine_daemon() -> Iterator[str]:
    """An engine of its own that servers attach to; its address."""
    config = tiny_args(max_num_seqs=64, served_model_name=MODEL).create_engine_config()
    launch = Launch(config, shows_progress=False)
    try:
        yield launch.wait_ready(60)
    finally:
        launch.terminate()


async def d15_lost_frontend() -> Outcome:
    """One of two frontends is killed: the other's streams go on, its own requests are let go."""
    outcome = Outcome("D15", "kill -9 of 1 of 2 frontends, 16 streams each")
    requests = streams("d15-", 16, 300)
    with (
        engine_daemon() as address,
        serving("--attach", address) as stays,
        serving("--attach", address, expects_clean_end=False) as dies,
    ):
        reference = by_name(await ask_all(stays.port, requests, at_once=16))
        lost = asyncio.create_task(
            ask_all(dies.port, streams("lost-", 16, 1500, seed=1), at_once=16)
        )
        running = asyncio.create_task(ask_all(stays.port, requests, at_once=16))
        num_open = await _most_open(address, 32)
        dies.process.kill()
        started = time.monotonic()
        seconds = await _until_let_go(address, 16, started)
        await lost
        histories = await running
    outcome.none_of("O1 of the other's streams", integrity(histories))
    outcome.none_of("O2 of the other's streams", oracles.check_equality(histories, reference))
    outcome.at_least("requests of both when one was killed", num_open, 32)
    outcome.at_most("its requests and blocks are let go within", seconds, 12, "s")
    return outcome


async def _most_open(address: str, wanted: int) -> int:
    """How many requests the core has, once it has as many as wanted or some seconds are over."""
    watcher = AsyncLLM.attach(address, None, log_stats=False)
    try:
        num_open, deadline = 0, time.monotonic() + 10
        while num_open < wanted and time.monotonic() < deadline:
            stats = await watcher.get_stats()
            num_open = stats.num_running + stats.num_waiting
        return num_open
    finally:
        watcher.shutdown()


async def _until_let_go(address: str, num_others: int, started: float) -> float:
    """Seconds from ``started`` until the core has no more requests than the others'."""
    watcher = AsyncLLM.attach(address, None, log_stats=False)
    try:
        while time.monotonic() - started < 20:
            stats = await watcher.get_stats()
            if stats.num_running + stats.num_waiting <= num_others:
                break
            await asyncio.sleep(0.05)
        return time.monotonic() - started
    finally:
        watcher.shutdown()


async def d16_lost_parent() -> Outcome:
    """The API process, then the supervisor is killed: the tree goes, and a new start works."""
    outcome = Outcome("D16", "kill -9 of each parent under 16 streams, then a start")
    for which in ("API process", "supervisor"):
        with serving(expects_clean_end=False) as server:
            tree = server.tree()
            running = asyncio.create_task(
                ask_all(server.port, streams("d16-", 16, 1500), at_once=16)
            )
            await asyncio.sleep(1.0)
            victim = tree[0] if which == "API process" else tree[0].children()[0]
            rest = [p for p in tree if p.pid != victim.pid]
            victim.kill()
            started = time.monotonic()
            below = [p for p in rest if which == "API process" or p.pid != tree[0].pid]
            await asyncio.to_thread(wait_gone, below, 20.0)
            seconds = time.monotonic() - started
            outcome.at_most(f"{which}: the processes below gone", seconds, 10, "s")
            await running
        with serving() as server:
            histories = await ask_all(server.port, streams("after-", 4, 8), at_once=4)
        outcome.none_of(f"{which}: O1 after a new start", integrity(histories))
    return outcome


async def d17_slow_clients(count: int = 1000) -> Outcome:
    """Half-open connections and readers of a byte a second: others keep their speed."""
    outcome = Outcome("D17", f"{count} half-open connections and {count} slow readers")
    requests = streams("d17-", 32, 150)
    slow = [
        replace(completion(f"slow-{i}", "Hello", 1500, logprobs=5), reads_bytes_per_s=1.0)
        for i in range(count)
    ]
    with serving("--max-num-seqs", "64", "--max-waiting-requests", str(count + 64)) as server:
        await ask_all(server.port, requests[:4], at_once=4)
        rss = server.rss_bytes()
        alone_s = await _seconds_of(server, requests)
        half_open = []
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", server.port))
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
            half_open.append(one)
        slow_s = await _seconds_of(server, requests)
        reading = asyncio.create_task(ask_all(server.port, slow, at_once=count))
        started = time.monotonic()
        while any(_is_open(one) for one in half_open) and time.monotonic() - started < 60:
            await asyncio.sleep(0.5)
        outcome.at_most("half-open ones cut within", time.monotonic() - started, 40, "s")
        outcome.at_most("memory grown", (server.rss_bytes() - rss) / 2**20, 300, "MiB")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        for one in half_open:
            one.close()
    outcome.at_least("speed beside the half-open ones", alone_s / slow_s, 0.95, "x")
    return outcome


async def _seconds_of(server: Server, requests: list[Ask]) -> float:
    started = time.monotonic()
    histories = await ask_all(server.port, requests, at_once=len(requests))
    assert not integrity(histories)
    return time.monotonic() - started


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


async def d23_soak(seconds: float = 300.0, seed: int = 0) -> Outcome:
    """Mixed load for minutes: memory does not climb, nothing stays."""
    outcome = Outcome("D23", f"{seconds:.0f} s of mixed traffic, seed {seed}")
    samples: dict[int, list[tuple[float, int]]] = {}
    with serving("--max-num-seqs", "32") as server:
        histories = await ask_all(server.port, mixed("warm-", 100, seed=seed), at_once=16)
        before = server.holdings()
        started, number = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            number += 1
            batch = mixed(f"d23-{number}-", 40, seed=seed + number, share_leaving=0.1)
            histories += await ask_all(server.port, batch, at_once=12)
            elapsed = time.monotonic() - started
            if elapsed >= min(60.0, seconds / 5):
                for process in server.tree():
                    samples.setdefault(process.pid, []).append((elapsed, process.memory_info().rss))
        after = server.idle_holdings(before)
    outcome.none_of("O1 of all streams", integrity(histories))
    outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
    growth = max((upper_slope(points) * 86400 / 2**20 for points in samples.values()), default=0)
    outcome.at_most("growth of a process, upper 95 % bound", growth, 512, "MiB/day")
    return outcome


def upper_slope(points: list[tuple[float, int]]) -> float:
    """The upper 95 % bound of the slope of a straight line through points (least squares)."""
    count = len(points)
    if count < 3:
        return 0.0
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return float(slope + 1.96 * (rest / (count - 2) / spread) ** 0.5)


async def d24_starts(count: int = 8) -> Outcome:
    """Many servers at once start or say in a line why not; a busy port is such a line."""
    outcome = Outcome("D24", f"{count} starts at once, and one on a busy port")
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        servers = await asyncio.gather(
            *(asyncio.to_thread(stack.enter_context, serving()) for _ in range(count))
        )
        outcome.at_most("all started within", time.monotonic() - started, 10, "s")
        answers = [await ask(s.port, completion("a", "Hello", 4)) for s in servers]
        outcome.none_of("O1 of an answer of each", integrity(answers))
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        started = time.monotonic()
        failed = await asyncio.to_thread(_start_on, taken.getsockname()[1])
        outcome.at_most("busy port: end within", time.monotonic() - started, 10, "s")
        lines = [line for line in failed.stderr.splitlines() if line.strip()]
        outcome.at_most("busy port: lines that say why", len(lines), 1)
        outcome.at_least("busy port: exit code", failed.returncode, 1)
    return outcome


def _start_on(port: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "frontend", "--model", str(TINY), "--port", str(port)]
    return subprocess.run(
        [*command, "--host", "127.0.0.1", "--uvicorn-log-level", "error"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
