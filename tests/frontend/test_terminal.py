"""A chat in the terminal, with a scripted server at the other end."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from frontend.terminal import UrlChat, talk
from ipc.errors import ConfigError, EngineGenerateError
from ipc.sampling_params import SamplingParams


class ScriptedServer(http.server.BaseHTTPRequestHandler):
    """Answers every chat with the number of its messages, as a stream."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer k":
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error":"Unauthorized"}')
            return
        self.send_response(200)
        self.end_headers()
        for text in ("I know ", f"{len(body['messages'])} messages"):
            chunk = {"choices": [{"delta": {"content": text}}]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        if body["messages"][-1]["content"] == "fail":
            self.wfile.write(b'data: {"error": {"message": "broken row"}}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def scripted_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ScriptedServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What the user types; an exception stands for Ctrl-C; Ctrl-D comes at the end."""
    pending = iter(lines)

    def read(_: str) -> str:
        line = next(pending, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_a_chat_keeps_its_history_forgets_on_reset_and_ends_with_ctrl_d(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one", KeyboardInterrupt, "", "two", "/reset", "three")
    with scripted_server() as url:
        assert talk(UrlChat(url + "/v1", "k", None, SamplingParams()), "Be brief.") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "I know 2 messages", "I know 4 messages", "(forgotten)", "I know 2 messages",
    ]  # fmt: skip


def test_a_failed_answer_is_shown_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "fail", "more")
    with scripted_server() as url:
        talk(UrlChat(url, "k", None, SamplingParams()), None)
    out = capsys.readouterr().out
    assert "(failed: broken row)" in out
    assert "I know 3 messages" in out


def test_a_refused_key_is_reported_with_its_status() -> None:
    with scripted_server() as url:
        chat = UrlChat(url, "wrong", None, SamplingParams())
        with pytest.raises(EngineGenerateError, match="HTTP 401: Unauthorized"):
            list(chat.answer([{"role": "user", "content": "x"}]))


def test_an_answer_can_be_left_in_the_middle() -> None:
    with scripted_server() as url:
        chat = UrlChat(url, "k", None, SamplingParams())
        with closing(chat.answer([{"role": "user", "content": "x"}])) as answer:  # type: ignore[type-var]
            assert next(answer) == "I know "


def test_an_url_needs_a_host() -> None:
    with pytest.raises(ConfigError):
        UrlChat("http://", None, None, SamplingParams())
