"""A real server under more than it can do: short forms of the loads in scripts/overload.py."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import overload
import pytest

from frontend import LLM
from tests.e2e.engines import ROOT, TINY, greedy
from tests.e2e.processes import Traces, assert_nothing_left
from tests.fuzz.servers import free_port, wait_until_ready

SMALL_QUEUE = ("--max-num-seqs", "4", "--max-waiting-requests", "12")


def test_a_flood_is_refused_with_advice_and_whoever_is_let_in_is_served() -> None:
    with overload.running_server(TINY, *SMALL_QUEUE) as server:
        seen = asyncio.run(overload.flood(server, 200, max_tokens=24))
    assert set(seen["statuses"]) == {200, 429}
    assert seen["statuses"][429] >= 100
    assert seen["without_advice"] == 0
    assert 1 <= min(seen["retry_after"]) <= max(seen["retry_after"]) <= 60
    assert seen["accepted_unfinished"] == 0


@pytest.mark.parametrize("is_twice", [False, True], ids=["time is up", "second signal"])
def test_a_drain_ends_every_stream_with_a_reason(is_twice: bool) -> None:
    before = Traces.now()
    flags = ("--shutdown-timeout", "60" if is_twice else "1", "--max-model-len", "2048")
    with overload.running_server(TINY, *flags) as server:
        seen = asyncio.run(overload.drain(server, 16, 1900, is_twice=is_twice))
    assert seen["late"]["status"] == seen["health"] == 503
    assert seen["late"]["retry_after"] is not None
    assert seen["exit_code"] == 0
    assert seen["not_done"] == 0
    assert "None" not in seen["reasons"]
    assert "abort" in seen["reasons"]
    assert seen["exit_s"] < 10.0  # the machine may be busy; the drain itself is a second
    assert_nothing_left(before)


def test_requests_end_when_their_time_is_up() -> None:
    long = {"prompt": "def", "max_tokens": 1900, "stream": True}

    async def load(server: overload.Server) -> tuple[overload.Answer, ...]:
        patient = overload.request_bytes(**long)
        hurried = overload.request_bytes(headers="X-Request-Timeout: 0.5\r\n", **long)
        seen = [overload.Answer() for _ in range(4)]
        running = [asyncio.create_task(overload.ask(server.port, patient, each)) for each in seen]
        while not all(each.num_chunks for each in seen):  # they take every row
            await asyncio.sleep(0.02)
        queued = await overload.ask(server.port, hurried)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while True:
            answer = await overload.ask(server.port, hurried)
            if answer.status == 200:  # the others have left
                return queued, answer

    with overload.running_server(TINY, *SMALL_QUEUE) as server:
        queued, ran = asyncio.run(load(server))
    assert queued.status == 504
    assert queued.num_chunks == 0
    assert ran.finish_reason == "timeout"
    assert 0 < ran.num_chunks < 1900
    assert ran.is_complete


@contextmanager
def running_daemon(address: str, *flags: str) -> "Iterator[subprocess.Popen[bytes]]":
    command = [
        sys.executable, "-m", "engine_core", "--listen", address, "--model", str(TINY),
        "--dtype", "float32", "--worker-threads", "1", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as daemon:
        try:
            assert daemon.stdout is not None
            assert b"listening" in daemon.stdout.readline()
            yield daemon
        finally:
            daemon.terminate()
            daemon.wait(60)


def test_a_daemon_drains_for_its_frontends(tmp_path: Path) -> None:
    before = Traces.now()
    address, port = f"ipc://{tmp_path}/core", free_port()
    command = [
        sys.executable, "-m", "frontend", "--attach", address, "--host", "127.0.0.1",
        "--port", str(port), "--uvicorn-log-level", "warning",
    ]  # fmt: skip

    async def load(daemon: "subprocess.Popen[bytes]") -> tuple[overload.Answer, list[int]]:
        answer = overload.Answer()
        request = overload.request_bytes(prompt="def", max_tokens=1200, stream=True)
        stream = asyncio.create_task(overload.ask(port, request, answer))
        while not answer.num_chunks:
            await asyncio.sleep(0.02)
        daemon.send_signal(signal.SIGTERM)
        health = overload.request_bytes("/health", "Connection: close\r\n")
        while (await overload.ask(port, health)).status == 200:
            await asyncio.sleep(0.02)
        statuses = [(await overload.ask(port, each)).status for each in (health, request)]
        assert not stream.done(), "the test's stream is too short"
        return await stream, statuses

    with (
        running_daemon(address, "--shutdown-timeout", "60") as daemon,
        subprocess.Popen(command, cwd=ROOT) as server,
    ):
        wait_until_ready(f"http://127.0.0.1:{port}/health", server)
        answer, statuses = asyncio.run(load(daemon))
        assert statuses == [503, 503]
        assert (answer.finish_reason, answer.is_complete) == ("length", True)
        assert daemon.wait(30) == 0
        began_s = time.monotonic()
        server.terminate()
        server.wait(30)
        assert time.monotonic() - began_s < 30
    assert_nothing_left(before)


def test_a_batch_of_any_size_is_no_overload() -> None:
    llm = LLM(
        model=str(TINY), dtype="float32", device="cpu", worker_threads=1, max_num_seqs=4,
        max_waiting_requests=2, max_waiting_tokens=32, disable_log_stats=True,
    )  # fmt: skip
    prompts = ["def f(x): return " * (1 + i % 6) for i in range(60)]
    outputs = llm.generate(prompts, greedy(4), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 60
