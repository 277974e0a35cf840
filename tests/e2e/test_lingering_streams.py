"""Streams that were asked to linger go on after a lost connection, a lost server, elsewhere.

Two servers on one engine with the bundled model in float32: what a reader has before and after
joins to what an undisturbed stream says, token by token.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from frontend.launcher import Launch
from tests.e2e.engines import ROOT, load_expected, tiny_args
from tests.fuzz.servers import free_port, wait_until_ready

LIMIT_S = 60.0
FIBONACCI = load_expected()[0]
BODY: dict[str, Any] = {
    "prompt": FIBONACCI.prompt,
    "max_tokens": 60,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
    "linger_s": 60,
}


@dataclass
class Heard:
    """What a reader has of a stream, over all its connections."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usages: list[dict[str, Any]] = field(default_factory=list)
    roles: int = 0
    stream_id: str = ""
    last_event_id: str | None = None
    is_done: bool = False

    def read(self, response: http.client.HTTPResponse, until_tokens: int | None = None) -> None:
        """Read events to the end, or until so many tokens are there."""
        event_id = None
        while line := response.readline():
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                event_id = value
            elif value == "[DONE]":
                self.is_done = True
            elif name == "data":
                self._take(json.loads(value))
                self.last_event_id = event_id or self.last_event_id
            heard = sum(map(len, self.token_ids.values()))
            if until_tokens is not None and heard >= until_tokens:
                return

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        assert self.stream_id in ("", chunk["id"])
        self.stream_id = chunk["id"]
        if chunk.get("usage"):
            self.usages.append(chunk["usage"])
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            self.roles += "role" in delta
            text = choice["text"] if "text" in choice else delta.get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            self.token_ids.setdefault(index, []).extend(choice.get("token_ids", []))
            if choice["finish_reason"] is not None:
                self.finish_reasons[index] = choice["finish_reason"]


@dataclass
class Server:
    """A server of its own process."""

    process: "subprocess.Popen[bytes]"
    port: int

    @contextlib.contextmanager
    def request(
        self, method: str, path: str, body: Any = None, status: int = 200, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            sent = {"Content-Type": "application/json"} | {
                name.replace("_", "-"): value for name, value in headers.items()
            }
            connection.request(method, path, data, sent)
            with connection.getresponse() as response:
                assert response.status == status, response.read()
                yield response


@contextlib.contextmanager
def serving(address: str) -> Iterator[Server]:
    port = free_port()
    command = [
        sys.executable, "-m", "frontend", "--attach", address, "--host", "127.0.0.1",
        "--port", str(port), "--uvicorn-log-level", "error", "--disable-log-requests",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield Server(process, port)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    launch = Launch(tiny_args().create_engine_config(), shows_progress=False)
    try:
        yield launch.wait_ready(LIMIT_S)
    finally:
        launch.terminate()


@pytest.fixture(scope="module")
def first(address: str) -> Iterator[Server]:
    with serving(address) as server:
        yield server


@pytest.fixture(scope="module")
def second(address: str) -> Iterator[Server]:
    with serving(address) as server:
        yield server


def listen(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> Heard:
    """An undisturbed stream."""
    heard = Heard()
    with server.request("POST", path, body) as response:
        heard.read(response)
    assert heard.is_done
    return heard


def begin(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> Heard:
    """A stream whose reader leaves after a few tokens."""
    heard = Heard()
    with server.request("POST", path, body) as response:
        heard.read(response, until_tokens=7)
    assert not heard.is_done
    return heard


def go_on(server: Server, heard: Heard) -> None:
    """Come back by query, and read to the end."""
    path = f"/v1/streams/{heard.stream_id}?after={heard.last_event_id}"
    with server.request("GET", path) as response:
        heard.read(response)


def assert_same(heard: Heard, whole: Heard) -> None:
    assert heard.is_done
    assert heard.texts == whole.texts
    assert heard.token_ids == whole.token_ids
    assert heard.finish_reasons == whole.finish_reasons
    assert [u["completion_tokens"] for u in heard.usages] == [
        u["completion_tokens"] for u in whole.usages
    ]
    assert heard.roles == whole.roles


def eventually(holds: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


CASES = [
    pytest.param("/v1/completions", {}, id="completion"),
    pytest.param("/v1/completions", {"n": 3, "temperature": 1, "seed": 5}, id="three choices"),
    pytest.param("/v1/completions", {"stop": ["fib", "zzz"], "ignore_eos": False}, id="stop"),
    pytest.param("/v1/completions", {"echo": True}, id="echo"),
    pytest.param(
        "/v1/chat/completions",
        {"prompt": None, "messages": [{"role": "user", "content": "Count to ten."}]},
        id="chat",
    ),
]


@pytest.mark.parametrize(("path", "changes"), CASES)
def test_a_reader_that_comes_back_misses_nothing(
    first: Server, second: Server, path: str, changes: dict[str, Any]
) -> None:
    body = {name: value for name, value in (BODY | changes).items() if value is not None}
    whole = listen(first, body, path)
    for server in (first, second):
        heard = begin(first, body, path)

        go_on(server, heard)

        assert_same(heard, whole)


def test_a_header_names_the_last_event_and_a_finished_stream_can_be_read_again(
    first: Server, second: Server
) -> None:
    whole = listen(first, BODY)
    heard = begin(first, BODY)
    go_on(second, heard)
    for _ in range(2):
        again = Heard(stream_id=heard.stream_id)
        with second.request("GET", f"/v1/streams/{heard.stream_id}") as response:
            again.read(response)
        assert_same(again, whole)
    rest = Heard()
    with first.request("GET", f"/v1/streams/{heard.stream_id}", Last_Event_ID="58") as response:
        rest.read(response)
    assert rest.token_ids[0] == whole.token_ids[0][58:]
    assert rest.usages[0]["completion_tokens"] == 60


def test_a_stream_outlives_the_server_that_began_it(address: str, second: Server) -> None:
    whole = listen(second, BODY)
    with serving(address) as doomed:
        heard = begin(doomed, BODY)
        doomed.process.kill()
        doomed.process.wait()
    go_on(second, heard)
    assert_same(heard, whole)


def test_a_stream_that_is_read_here_moves_to_who_asks_for_it(first: Server, second: Server) -> None:
    whole = listen(first, BODY)
    heard = Heard()
    with first.request("POST", "/v1/completions", BODY) as response:
        heard.read(response, until_tokens=7)
        go_on(second, heard)
        left = Heard()
        left.read(response)
    assert_same(heard, whole)
    assert set(left.finish_reasons.values()) <= {"abort", "length"}


def test_nobody_comes_and_the_request_ends(first: Server) -> None:
    heard = begin(first, BODY | {"linger_s": 0.05, "max_tokens": 1900})

    def is_idle() -> bool:
        with first.request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        running = [line for line in lines if line.startswith("heliograph:num_requests_running{")]
        return bool(running) and all(float(line.split()[-1]) == 0 for line in running)

    eventually(is_idle, "the request ran on for nobody")
    with first.request("GET", f"/v1/streams/{heard.stream_id}", status=404):
        pass


def test_what_cannot_linger_or_does_not_exist_is_refused(first: Server, second: Server) -> None:
    for changes in (
        {"stream": False, "stream_options": None},
        {"prompt": ["a", "b"]},
        {"logprobs": 1},
        {"linger_s": 601},
        {"linger_s": -1},
        {"linger_s": "long"},
        {"best_of": 3, "temperature": 1},
    ):
        with first.request("POST", "/v1/completions", BODY | changes, status=400) as response:
            assert b"linger_s" in response.read()
    heard = begin(first, BODY)
    for after in ("x", "-1", "1,", "9" * 30, "1e3", "7,7", "61", ",".join("1" * 200)):
        path = f"/v1/streams/{heard.stream_id}?after={after}"
        with second.request("GET", path, status=400) as response:
            assert b"after" in response.read()
    with second.request("DELETE", f"/v1/streams/{heard.stream_id}") as response:
        assert json.load(response) == {"id": heard.stream_id, "deleted": True}
    for server in (first, second):
        for method in ("GET", "DELETE"):
            with server.request(method, f"/v1/streams/{heard.stream_id}", status=404):
                pass
