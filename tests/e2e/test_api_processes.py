"""Several API processes on one port: shared work, shared numbers, deaths of each kind, the end."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from frontend.engine_args import EngineArgs
from frontend.engine_setup import with_executor_path
from frontend.launcher import Launch
from ipc.errors import ExitCode
from tests.e2e.engines import ROOT, TINY, tiny_args
from tests.e2e.processes import Traces, assert_nothing_left
from tests.fuzz.servers import free_port, wait_until_ready

NUM_PROCESSES = 2
PACED = "scripts.bench_paced_executor:PacedExecutor"
STEP_MS = 10
LIMIT_S = 30.0


@dataclass
class Server:
    """The process in front, and its port."""

    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def api_pids(self) -> list[int]:
        """The API processes that run now."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "--arguments-fd" in child.cmdline()]

    def status(self, path: str, key: str) -> int:
        """The status of a GET with an API key."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
            return connection.getresponse().status

    def get(self, path: str) -> str:
        """The body of a GET, by a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            return response.read().decode()


@dataclass
class Stream:
    """A streamed completion, read by a thread."""

    port: int
    num_tokens: int
    text: str = ""
    is_whole: bool = False
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        body = {"prompt": "Hi", "max_tokens": self.num_tokens, "seed": 7, "stream": True}
        headers = {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            data = json.dumps(body | {"ignore_eos": True})
            connection.request("POST", "/v1/completions", data, headers)
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    self.text += json.loads(line[6:])["choices"][0]["text"]
                self.is_whole |= line.startswith(b"data: [DONE]")


def until(is_so: Callable[[], Any], what: str) -> None:
    """Wait for something that another process does."""
    limit = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


@contextlib.contextmanager
def scripted_engine() -> Iterator[str]:
    """An engine core whose model says anything at 100 tokens a second; its address."""
    args = EngineArgs(
        model=str(TINY),
        load_format="dummy",
        max_num_seqs=64,
        model_loader_extra_config={"step_ms": STEP_MS},
        disable_log_stats=True,
    )
    launch = Launch(with_executor_path(args.create_engine_config(), PACED), shows_progress=False)
    try:
        yield launch.wait_ready(LIMIT_S)
    finally:
        launch.terminate()


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server of two API processes, both listening."""
    port = free_port()
    command = [
        sys.executable, "-m", "frontend", "--host", "127.0.0.1", "--port", str(port),
        "--api-server-count", str(NUM_PROCESSES), "--uvicorn-log-level", "error",
        "--disable-log-requests", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            server = Server(process, port)
            until(lambda: num_listeners(port) == NUM_PROCESSES, "not all of them listen")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def num_listeners(port: int) -> int:
    """Listening sockets on a loopback port."""
    with open("/proc/net/tcp") as table:
        sockets = [line.split() for line in table][1:]
    listening = "0A"
    return sum(s[1] == f"0100007F:{port:04X}" and s[3] == listening for s in sockets)


def counter(metrics: str, name: str) -> float:
    found = re.search(rf"^heliograph:{name}_total\{{[^}}]*\}} (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_connections_are_shared_and_each_process_tells_the_numbers_of_all() -> None:
    before = Traces.now()
    with scripted_engine() as address, serving("--attach", address) as server:
        assert len(server.api_pids) == NUM_PROCESSES
        streams = [Stream(server.port, 20) for _ in range(32)]
        for stream in streams:
            stream.thread.join(LIMIT_S)
        assert all(stream.is_whole for stream in streams)
        assert len({stream.text for stream in streams}) == 1, "one seed, one answer"

        time.sleep(1.0)  # a little more than an API process may be behind the others
        for _ in range(16):  # whichever process answers
            metrics = server.get("/metrics")
            assert counter(metrics, "generation_tokens") == 32 * 20
    assert server.process.returncode == 0
    assert_nothing_left(before)


def test_a_process_that_dies_takes_only_its_own_streams_and_is_replaced() -> None:
    with scripted_engine() as address, serving("--attach", address) as server:
        streams = [Stream(server.port, 200) for _ in range(32)]
        until(lambda: all(stream.text for stream in streams), "not every stream has begun")
        victim, survivor = server.api_pids
        os.kill(victim, signal.SIGKILL)
        for stream in streams:
            stream.thread.join(LIMIT_S)
        num_whole = sum(stream.is_whole for stream in streams)
        assert 0 < num_whole < len(streams), "connections were not shared"

        until(lambda: num_listeners(server.port) == NUM_PROCESSES, "it was not replaced")
        assert victim not in server.api_pids
        assert survivor in server.api_pids
        after = [Stream(server.port, 5) for _ in range(32)]
        for stream in after:
            stream.thread.join(LIMIT_S)
        assert all(stream.is_whole for stream in after)
    assert server.process.returncode == 0


def test_a_signal_to_stop_lets_the_streams_of_all_processes_finish() -> None:
    before = Traces.now()
    with scripted_engine() as address, serving("--attach", address) as server:
        streams = [Stream(server.port, 150) for _ in range(16)]
        until(lambda: all(stream.text for stream in streams), "not every stream has begun")
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.thread.join(LIMIT_S)
        assert all(stream.is_whole for stream in streams)
        assert server.process.wait(LIMIT_S) == 0
    assert_nothing_left(before)


def test_an_engines_death_without_recovery_ends_the_server_with_its_exit_code() -> None:
    before = Traces.now()
    args = tiny_args()
    flags = ("--model", args.model, "--dtype", "float32", "--worker-threads", "1", "--no-recovery")
    with serving(*flags) as server:
        tree = psutil.Process(server.process.pid).children(recursive=True)
        (core,) = [p for p in tree if "engine_core" in p.cmdline() and "--core" in p.cmdline()]
        core.kill()
        assert server.process.wait(LIMIT_S) == ExitCode.CORE_DIED
    assert_nothing_left(before)


def test_the_api_processes_end_with_the_process_in_front() -> None:
    before = Traces.now()
    with scripted_engine() as address, serving("--attach", address) as server:
        server.process.kill()
        server.process.wait()
    assert_nothing_left(before)


def test_api_keys_are_in_no_command_line_and_no_environment_of_a_child() -> None:
    keys = {"given": "planted-key-of-a-flag", "set": "planted-key-of-the-environment"}
    os.environ["VLLM_API_KEY"] = keys["set"]
    try:
        with (
            scripted_engine() as address,
            serving("--attach", address, "--api-key", keys["given"]) as server,
        ):
            children = psutil.Process(server.process.pid).children(recursive=True)
            assert len(children) == NUM_PROCESSES
            for child in children:
                shown = f"{child.cmdline()} {child.environ()}"
                assert not [key for key in keys.values() if key in shown]
            for key, status in ((keys["given"], 200), (keys["set"], 200), ("x", 401)):
                for _ in range(2 * NUM_PROCESSES):
                    assert server.status("/v1/models", key) == status
    finally:
        del os.environ["VLLM_API_KEY"]


def test_a_port_in_use_is_known_before_anything_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [
            sys.executable, "-m", "frontend", "--attach", "ipc:///nowhere", "--host", "127.0.0.1",
            "--port", str(taken.getsockname()[1]), "--api-server-count", "2",
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == ExitCode.START_FAILED
    assert "cannot listen on" in ended.stderr.splitlines()[-1]


def test_processes_that_cannot_start_are_not_started_for_ever() -> None:
    command = [
        sys.executable, "-m", "frontend", "--attach", "ipc:///nowhere/core",
        "--host", "127.0.0.1", "--port", str(free_port()), "--api-server-count", "2",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == ExitCode.START_FAILED, ended.stderr
