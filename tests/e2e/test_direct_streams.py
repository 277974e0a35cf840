"""Streams whose text takes the short way to the connection say what the whole answer says.

A real server process on a scripted engine: tokens come much faster than any client reads them.
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontend.engine_args import EngineArgs
from frontend.engine_setup import with_executor_path
from frontend.launcher import Launch
from tests.e2e.engines import ROOT, TINY
from tests.fuzz.servers import free_port, wait_until_ready

SCRIPTED = "tests.engine_core.scripted_executor:ScriptedExecutor"
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """An engine core whose model says anything, at once."""
    args = EngineArgs(model=str(TINY), load_format="dummy", max_num_seqs=64, disable_log_stats=True)
    launch = Launch(with_executor_path(args.create_engine_config(), SCRIPTED), shows_progress=False)
    try:
        yield launch.wait_ready(LIMIT_S)
    finally:
        launch.terminate()


@contextlib.contextmanager
def serving(address: str, *flags: str) -> Iterator[int]:
    """A server on that engine; its port."""
    port = free_port()
    command = [
        sys.executable, "-m", "frontend", "--attach", address, "--host", "127.0.0.1",
        "--port", str(port), "--uvicorn-log-level", "error", "--disable-log-requests", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield port
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def port(address: str) -> Iterator[int]:
    with serving(address) as port:
        yield port


def ask(port: int, path: str, **body: Any) -> bytes:
    """The body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            assert response.status == 200
            return response.read()


def raw_request(**body: Any) -> bytes:
    """A request for completions, as it goes over the wire."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def events_of(data: bytes) -> list[Any]:
    frames = data.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def joined(events: list[Any]) -> dict[int, tuple[str, str | None]]:
    """The text and the finish reason of each choice."""
    found: dict[int, tuple[str, str | None]] = {}
    for event in events:
        for choice in event["choices"]:
            text, _ = found.get(choice["index"], ("", None))
            delta = choice.get("delta", {}).get("content")
            found[choice["index"]] = (
                text + (choice.get("text") or delta or ""),
                choice["finish_reason"],
            )
    return found


BODY: dict[str, Any] = {"max_tokens": 200, "seed": 3, "ignore_eos": True, "temperature": 1.0}
CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"n": 3}, id="three branches"),
    pytest.param({"stop": ["e "]}, id="a stop string"),
    pytest.param({"max_tokens": 1}, id="one token"),
    pytest.param({"logprobs": 1}, id="logprobs"),
    pytest.param({"return_token_ids": True}, id="token ids"),
    pytest.param({"skip_special_tokens": False, "include_stop_str_in_output": True}, id="all text"),
]


@pytest.mark.parametrize("extra", CASES)
@pytest.mark.parametrize("options", [None, {}, {"continuous_usage_stats": True}], ids=str)
def test_a_stream_of_completions_says_what_the_whole_answer_says(
    port: int, extra: dict[str, Any], options: dict[str, Any] | None
) -> None:
    body = BODY | {"prompt": ["Hi", "def f(x):"]} | extra
    whole = json.loads(ask(port, "/v1/completions", **body))
    if options is not None:
        body["stream_options"] = {"include_usage": True} | options
    events = events_of(ask(port, "/v1/completions", **body, stream=True))
    expected = {c["index"]: (c["text"], c["finish_reason"]) for c in whole["choices"]}
    assert joined(events) == expected
    if options is not None:
        usage = events[-1]["usage"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[name] == whole["usage"][name]


def test_a_stream_of_chat_says_what_the_whole_answer_says(address: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    body = BODY | {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    with serving(address, "--chat-template", template) as port:
        whole = json.loads(ask(port, "/v1/chat/completions", **body))
        options = {"include_usage": True}
        events = events_of(
            ask(port, "/v1/chat/completions", **body, stream=True, stream_options=options)
        )
    expected = {c["index"]: (c["message"]["content"], c["finish_reason"]) for c in whole["choices"]}
    assert joined(events) == expected
    assert [e["choices"][0]["delta"].get("role") for e in events[:2]] == ["assistant"] * 2
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


class Marking:
    """A user's middleware: marks every part of a streamed body with a comment."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_marked(message: Message) -> None:
            if message.get("more_body"):
                message["body"] = b": seen\n" + message["body"]
            await send(message)

        await self._app(scope, receive, send_marked)


def test_a_middleware_of_the_users_own_sees_every_event(address: str) -> None:
    middleware = f"{Marking.__module__}.{Marking.__qualname__}"
    with serving(address, "--middleware", middleware) as port:
        body = BODY | {"prompt": "Hi", "max_tokens": 1900}
        stream = ask(port, "/v1/completions", **body, stream=True)
        whole = ask(port, "/v1/completions", **body)
    frames = stream.split(b"\n\n")[:-1]
    assert all(frame.startswith(b": seen\ndata: ") for frame in frames)
    expected = json.loads(whole)["choices"][0]["text"]
    assert joined(events_of(stream.replace(b": seen\n", b"")))[0][0] == expected


def test_a_reader_that_pauses_gets_everything_in_fewer_chunks(address: str) -> None:
    num_branches, num_tokens = 32, 1900
    with serving(address) as port:
        body = BODY | {"prompt": "Hi", "max_tokens": num_tokens, "n": num_branches}
        whole = json.loads(ask(port, "/v1/completions", **body))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(raw_request(**body, stream=True))
            time.sleep(3.0)  # the engine has finished long before
            with connection.makefile("rb") as file:
                received = file.read()
        chunked = received.split(b"\r\n\r\n", 1)[1]
        events = events_of(unchunk(chunked))
    expected = {c["index"]: (c["text"], c["finish_reason"]) for c in whole["choices"]}
    assert joined(events) == expected
    assert len(events) < num_branches * num_tokens / 2, "text did not merge"


def unchunk(data: bytes) -> bytes:
    """The body that a chunked transfer coding carries."""
    parts = []
    while data:
        size, data = data.split(b"\r\n", 1)
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)


def test_a_client_that_leaves_aborts_its_request(port: int) -> None:
    def num(name: str, label: str = "") -> float:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            with connection.getresponse() as response:
                text = response.read().decode()
        found = re.search(rf"^heliograph:{name}\{{{label}[^}}]*\}} (\S+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    aborted = ("request_success_total", 'finished_reason="abort"')
    before = num(*aborted)
    body = BODY | {"prompt": "Hi", "max_tokens": 1900, "n": 16, "stream": True}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(raw_request(**body))
        assert connection.recv(1000)
    limit = time.monotonic() + LIMIT_S
    while num(*aborted) == before or num("num_requests_running"):
        assert time.monotonic() < limit, "the request goes on"
        time.sleep(0.05)
