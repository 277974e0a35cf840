"""However and whenever an engine ends, nothing of it stays; and a failed start says why."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.engines import ROOT, TINY
from tests.e2e.processes import Traces, assert_nothing_left
from tests.fuzz.servers import free_port, running_server, wait_until_ready


def server_command(port: int, model: Path = TINY) -> list[str]:
    return [
        sys.executable, "-m", "frontend", "--model", str(model), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--worker-threads", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after_s", [0.2, 0.9, 2.0])
def test_a_signal_during_the_start_leaves_nothing(number: signal.Signals, after_s: float) -> None:
    before = Traces.now()
    with subprocess.Popen(
        server_command(free_port()), cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(after_s)  # the moment is the point of the test
        process.send_signal(number)
        process.wait(20)

    assert_nothing_left(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_under_load_leaves_nothing(number: signal.Signals) -> None:
    before = Traces.now()
    port = free_port()
    with subprocess.Popen(
        [*server_command(port), "--shutdown-timeout", "1"], cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        wait_until_ready(f"http://127.0.0.1:{port}/health", process)
        streams = [open_stream(port) for _ in range(8)]
        for stream in streams:
            assert stream.recv(64).startswith(b"HTTP/1.1 200")
        process.send_signal(number)
        process.wait(20)
        for stream in streams:
            stream.close()
    if number is not signal.SIGKILL:
        assert process.returncode == 0

    assert_nothing_left(before)


def open_stream(port: int, max_tokens: int = 1900, stream: bool = True) -> socket.socket:
    """Send a long request over a plain socket, so that it can be cut at any moment."""
    body = json.dumps(
        {"prompt": "def", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    ).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole answer"])
def test_a_client_that_leaves_frees_its_request(stream: bool) -> None:
    with running_server() as url:
        port = int(url.rpartition(":")[2])
        clients = [open_stream(port, stream=stream) for _ in range(6)]
        wait_for_running(url, 6)
        for client in clients:
            client.close()
        wait_for_running(url, 0)


def wait_for_running(url: str, count: int) -> None:
    """Until the metrics say that so many requests are open."""
    limit = time.monotonic() + 15
    while True:
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        running = sum(float(line.rpartition(" ")[2]) for line in lines)
        if lines and running == count:
            return
        assert time.monotonic() < limit, f"{running} requests run, {count} expected"
        time.sleep(0.1)


def test_a_corrupt_checkpoint_is_named_with_its_own_exit_code(tmp_path: Path) -> None:
    before = Traces.now()
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    shard = model / "model-00002-of-00002.safetensors"
    os.chmod(shard, 0o644)
    shard.write_bytes(shard.read_bytes()[:100_000])
    result = subprocess.run(
        server_command(free_port(), model), cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert result.returncode == 3
    last_lines = "\n".join(result.stderr.strip().splitlines()[-3:])
    assert shard.name in last_lines
    assert_nothing_left(before)


def test_a_busy_port_is_reported_before_the_model_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = time.monotonic()
        result = subprocess.run(
            server_command(port), cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert result.returncode != 0
    assert str(port) in result.stderr.strip().splitlines()[-1]
    assert time.monotonic() - started < 5


def test_a_wrong_flag_ends_at_once_and_is_named() -> None:
    command = [*server_command(free_port()), "--block-size", "17"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert result.returncode == 2
    assert "--block-size" in result.stderr.strip().splitlines()[-1]
