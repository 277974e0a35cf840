"""JSONL in, JSONL out, through the same application as over HTTP."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from frontend.openai import run_batch
from frontend.openai.errors import error_response
from frontend.openai.run_batch import answer_all, read_lines
from ipc.errors import ConfigError, EngineOverloadedError
from tests.frontend.openai.fake_engine import make_server


def line(custom_id: str, body: dict[str, Any], url: str = "/v1/completions", **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def run(path: Path) -> tuple[int, dict[str, Any]]:
    _, _, app = make_server()
    out = io.BytesIO()
    num_failed = asyncio.run(answer_all(app, list(read_lines(path)), out, at_once=4))
    answers = [json.loads(answer) for answer in out.getvalue().splitlines()]
    return num_failed, {answer["custom_id"]: answer for answer in answers}


def test_every_line_gets_its_answer_or_its_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    lines = [
        line("a", {"prompt": "x"}),
        "",
        line("b", {"messages": messages}, "/v1/chat/completions"),
        line("c", {"prompt": "x", "n": 1000}),
        line("d", {"prompt": "x", "stream": True}),
    ]
    path.write_text("\n".join(lines))
    num_failed, answers = run(path)
    assert num_failed == 1
    assert sorted(answers) == ["a", "b", "c", "d"]
    assert answers["a"]["response"]["body"]["choices"][0]["text"] == "Hello"
    assert answers["b"]["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert answers["a"]["error"] is None
    assert answers["c"]["response"] is None
    assert answers["c"]["error"]["error"]["param"] == "n"
    assert answers["d"]["response"]["body"].endswith("data: [DONE]\n\n")
    assert len({answer["id"] for answer in answers.values()}) == 4


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="no JSON"),
        pytest.param('{"custom_id": "a"}', id="fields missing"),
        pytest.param(line("a", {}, "/v1/embeddings"), id="another route"),
        pytest.param(line("a", {}).replace("POST", "GET"), id="another method"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_starts(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line("ok", {"prompt": "x"}) + "\n" + text + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        list(read_lines(path))


def test_a_request_that_the_engine_has_no_room_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_batch, "RETRY_S", 0.0)
    engine, _, app = make_server()
    statuses = []

    async def full_at_first(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(429 if len(statuses) < 2 else 200)
        answer = error_response(EngineOverloadedError("full")) if statuses[-1] == 429 else app
        await answer(scope, receive, send)

    path = tmp_path / "in.jsonl"
    path.write_text(line("a", {"prompt": "x"}))
    num_failed = asyncio.run(
        answer_all(full_at_first, list(read_lines(path)), io.BytesIO(), at_once=1)
    )
    assert (num_failed, statuses, len(engine.calls)) == (0, [429, 429, 200], 1)
