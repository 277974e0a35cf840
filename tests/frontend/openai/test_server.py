"""A server as a process of its own, on the scripted engine: sockets, signals, exit codes, TLS."""

import asyncio
import gc
import http.client
import json
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from frontend.openai.server import HttpServer, ListenOptions, check_certificates, uvicorn_config
from ipc.errors import ConfigError
from tests.frontend.openai.fake_engine import make_server

ROOT = Path(__file__).parents[3]
READY_S = 30.0


class Server:
    """A running server process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process = process
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    @contextmanager
    def post(self, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json"}
        with closing(self.connect()) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with connection.getresponse() as response:
                yield response

    def get_status(self, path: str) -> int:
        with closing(self.connect()) as connection:
            connection.request("GET", path)
            return connection.getresponse().status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.frontend.openai.serve_fake", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


@contextmanager
def serving(answer: str = "Hello", hang_after: str = "never", *flags: str) -> Iterator[Server]:
    """A server that is ready, stopped at the end whatever happens."""
    port = free_port()
    process = start(answer, hang_after, "--host", "127.0.0.1", "--port", str(port), *flags)
    try:
        server = Server(process, port)
        # The socket listens from the start, so this waits in its backlog until it is served.
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=READY_S)) as probe:
            wait_for_listener(process, port)
            probe.request("GET", "/version")
            assert probe.getresponse().status == 200
        yield server
    finally:
        process.kill()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def wait_for_listener(process: "subprocess.Popen[str]", port: int) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it listened"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except ConnectionRefusedError:
            pause(0.02)
        else:
            return
    raise AssertionError("the server does not listen")


def pause(seconds: float) -> None:
    """Between two looks at another process."""
    select.select([], [], [], seconds)


def test_the_official_client_gets_whole_answers_and_streams() -> None:
    with serving("Hé, world") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="never")
        with client:
            messages: list[Any] = [{"role": "user", "content": "Hi"}]
            answer = client.chat.completions.create(model="fake", messages=messages)
            assert answer.choices[0].message.content == "Hé, world"
            chunks = client.chat.completions.create(
                model="fake", messages=messages, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            received = list(chunks)
            text = "".join(c.choices[0].delta.content or "" for c in received if c.choices)
            assert text == "Hé, world"
            assert received[-1].usage is not None
            completion = client.completions.create(model="fake", prompt="x", logprobs=2)
            assert completion.choices[0].logprobs is not None
            assert completion.choices[0].logprobs.tokens == list("Hé, world")
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model="fake", prompt="x", n=1000)
            assert caught.value.param == "n"
            assert [model.id for model in client.models.list()] == ["fake", "alias"]


def test_a_signal_lets_open_streams_finish_refuses_new_ones_and_exits_with_zero() -> None:
    with (
        serving("x" * 16, "slow") as server,
        server.post({"prompt": "a", "stream": True}) as stream,
    ):
        assert stream.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        assert wait_for_status(server, "/health", 503)
        with server.post({"prompt": "b"}) as refused:
            assert refused.status == 503
            assert refused.getheader("Retry-After") is not None
        rest = stream.read()
        assert rest.count(b'"text":"x"') == 15
        assert b'"finish_reason":"stop"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(10) == 0


def test_streams_that_outlast_the_drain_are_aborted_and_end_in_order() -> None:
    with (
        serving("x" * 12, "3", "--shutdown-timeout", "0.3") as server,
        server.post({"prompt": "a", "stream": True}) as stream,
    ):
        assert stream.readline().startswith(b"data: ")
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        rest = stream.read()
        assert b'"finish_reason":"abort"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 6


def wait_for_status(server: Server, path: str, status: int) -> bool:
    """The signal needs a moment to arrive."""
    for _ in range(50):
        if server.get_status(path) == status:
            return True
        pause(0.01)
    return False


def test_a_second_signal_ends_at_once() -> None:
    with (
        serving("x" * 12, "3", "--shutdown-timeout", "60") as server,
        server.post({"prompt": "a", "stream": True}) as stream,
    ):
        assert stream.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        assert wait_for_status(server, "/health", 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(3) == 0


def test_a_taken_port_is_one_line_and_exit_code_three_before_any_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("x", "never", "--host", "127.0.0.1", "--port", str(port))
        _, errors = process.communicate(timeout=READY_S)
    assert process.returncode == 3
    (line,) = errors.strip().splitlines()
    assert f"cannot listen on 127.0.0.1:{port}" in line


def test_a_unix_socket_is_private_replaces_a_leftover_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(path))
    process = start("Hello", "never", "--uds", str(path))
    try:
        answer = b""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(READY_S)
            while not answer:
                try:
                    client.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    assert process.poll() is None
                    pause(0.02)
                    continue
                assert path.stat().st_mode & 0o777 == 0o600
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200 ")
        process.terminate()
        process.communicate(timeout=10)
        assert process.returncode == 0
        assert not path.exists()
    finally:
        process.kill()


def test_hostile_clients_are_cut_off_and_leave_nothing_behind() -> None:
    with serving("x" * 16, "5") as server:
        for head in (b"X: " + b"a" * 40_000, b"X: " + b"a" * 400_000, b"X-1: 1\r\n" * 10_000):
            assert answer_to_head(server, head).startswith((b"HTTP/1.1 431 ", b"(reset)"))
        assert server.get_status("/health") == 200
        asyncio.run(vanish_often(server.port, 20))
        loads = iter(lambda: get_load(server), 0)
        assert sum(1 for _ in loads) < 500, "requests of clients that left are still open"


def answer_to_head(server: Server, head: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        try:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head)
            client.sendall(b"\r\n\r\n")
            return client.recv(100)
        except ConnectionError:  # the rest of a long head was still on its way
            return b"(reset)"


def get_load(server: Server) -> int:
    with closing(server.connect()) as connection:
        connection.request("GET", "/load")
        return int(json.loads(connection.getresponse().read())["server_load"])


async def vanish_often(port: int, times: int) -> None:
    """Begin streams and break their connections."""
    body = b'{"prompt": ["a", "b"], "stream": true, "n": 2}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )

    async def vanish() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        await reader.readuntil(b"data: ")
        writer.transport.abort()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(times):
            tasks.create_task(vanish())


def test_a_body_in_one_byte_chunks_arrives_and_a_connection_serves_many_requests() -> None:
    with serving() as server, closing(server.connect()) as connection:
        text = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
        chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
        for _ in range(2):
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            connection.send(chunked)
            response = connection.getresponse()
            assert response.status == 200
            assert json.loads(response.read())["choices"][0]["text"] == "Hel"


def test_tls_asks_for_client_certificates_when_told_to(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    subprocess.run(
        [*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    flags += ["--ssl-ca-certs", str(certificate), "--ssl-cert-reqs", "2"]
    port = free_port()
    process = start("Hello", "never", "--host", "127.0.0.1", "--port", str(port), *flags)
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    try:
        wait_for_listener(process, port)
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            health_over_tls(port, context)
        context.load_cert_chain(certificate, key)
        assert health_over_tls(port, context) == 200
    finally:
        process.kill()
        process.communicate(timeout=10)


def health_over_tls(port: int, context: ssl.SSLContext) -> int:
    with closing(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=READY_S, context=context)
    ) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


def test_certificates_that_cannot_be_used_are_a_configuration_error() -> None:
    process = start("x", "never", "--ssl-certfile", "/nowhere.pem")
    _, errors = process.communicate(timeout=READY_S)
    assert process.returncode == 2
    assert "--ssl-certfile" in errors


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        pytest.param({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile", id="key"),
        pytest.param({"ssl_ca_certs": "ca.pem"}, "--ssl-ca-certs needs --ssl-certfile", id="ca"),
        pytest.param({"ssl_cert_reqs": 2}, "--ssl-cert-reqs needs --ssl-certfile", id="reqs"),
        pytest.param(
            {"ssl_certfile": "cert.pem", "ssl_cert_reqs": 2},
            "--ssl-cert-reqs 2 needs --ssl-ca-certs",
            id="no authorities",
        ),
    ],
)
def test_tls_flags_that_would_do_nothing_alone_are_refused(
    flags: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_certificates(ListenOptions(**flags))


def test_the_stat_loggers_write_every_ten_seconds_whether_or_not_the_engine_steps() -> None:
    async def tick() -> int:
        engine, state, app = make_server()
        server = HttpServer(uvicorn_config(app, ListenOptions()), state, 30.0)
        for counter in range(250):
            assert not await server.on_tick(counter)
        return engine.num_stats_lines

    assert asyncio.run(tick()) == 2


def test_garbage_is_collected_while_nobody_waits_and_only_where_there_is_some() -> None:
    collections: list[str] = []

    def note(phase: str, details: dict[str, int]) -> None:
        if phase == "start" and details["generation"] == 2:
            collections.append(phase)

    async def tick(num_requests: int, num_open: int) -> int:
        _, state, app = make_server()
        server = HttpServer(uvicorn_config(app, ListenOptions()), state, 30.0)
        server.server_state.total_requests, state.num_open = num_requests, num_open
        collections.clear()
        for counter in range(50):
            assert not await server.on_tick(counter)
        return len(collections)

    gc.callbacks.append(note)
    gc.disable()  # only what the server asks for
    try:
        assert asyncio.run(tick(num_requests=3, num_open=0)) == 1
        assert asyncio.run(tick(num_requests=3, num_open=1)) == 0
        assert asyncio.run(tick(num_requests=0, num_open=0)) == 0
    finally:
        gc.enable()
        gc.callbacks.remove(note)
