"""The table exception -> status."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from frontend.openai import generation
from frontend.openai.errors import (
    STATUSES,
    BodyTimeoutError,
    DrainingError,
    error_body,
    error_response,
    public_text,
)
from frontend.openai.generation import read_body
from frontend.openai.protocol import CompletionRequest
from ipc.errors import (
    ConfigError,
    EngineDeadError,
    EngineGenerateError,
    EngineOverloadedError,
    RequestError,
    UnsupportedError,
)
from tests.frontend.openai.fake_engine import make_server


def test_every_entry_of_the_table_can_be_reached() -> None:
    kinds = [kind for kind, _, _ in STATUSES]
    for i, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:i]), kind


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(RequestError("x"), 400, id="request"),
        pytest.param(UnsupportedError("x"), 400, id="unsupported"),
        pytest.param(ConfigError("x"), 400, id="a value error"),
        pytest.param(EngineOverloadedError("x"), 429, id="overloaded"),
        pytest.param(DrainingError("x"), 503, id="draining"),
        pytest.param(EngineDeadError("x"), 503, id="dead"),
        pytest.param(BodyTimeoutError("x"), 408, id="slow body"),
        pytest.param(KeyError("x"), 500, id="a bug"),
    ],
)
def test_statuses(error: Exception, status: int) -> None:
    assert error_response(error).status_code == status


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (7.4, "8"), (900.0, "60")])
def test_retry_after_is_whole_seconds_between_one_and_sixty(seconds: float, header: str) -> None:
    response = error_response(EngineOverloadedError("full", seconds))
    assert response.headers["retry-after"] == header


def test_both_body_shapes_say_the_same() -> None:
    status, body = error_body(RequestError("no", param="n"))
    fields = {"message": "no", "type": "BadRequestError", "param": "n", "code": status}
    assert body == {"error": fields, "object": "error", **fields}


def test_a_body_that_does_not_come_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BODY_TIMEOUT_S", 0.01)
    _, state, _ = make_server()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(BodyTimeoutError) as caught:
        asyncio.run(read_body(request, CompletionRequest, state))
    assert error_response(caught.value).headers["connection"] == "close"


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param("<Parser object at 0x7f3a2b1c0d10>", id="an address in memory"),
        pytest.param("/srv/models/llama/config.json", id="a path"),
        pytest.param("~/models/x", id="a path at home"),
        pytest.param("ipc:///run/user/0/heliograph-17-ab/socket", id="a socket"),
        pytest.param("tcp://10.0.0.7:4000", id="an inner host"),
    ],
)
@pytest.mark.parametrize("kind", [EngineDeadError, EngineGenerateError, ValueError])
def test_errors_tell_nothing_of_this_machine(kind: type[Exception], secret: str) -> None:
    error = kind(f"worker 0 failed: cannot use '{secret}'\n  File \"/srv/x.py\", line 3")
    _, body = error_body(error)
    assert body["message"].startswith("worker 0 failed: cannot use ")
    assert not any(part in str(body) for part in ("0x7f", "/srv", "heliograph-", "10.0.0.7", "~"))
    assert "line 3" not in str(body)


def test_a_clients_own_words_come_back_to_it_but_addresses_do_not() -> None:
    error = RequestError("the model '/models/llama' does not exist; got <f at 0x7ffff00d>")
    assert public_text(error) == (
        "the model '/models/llama' does not exist; got <f at (an address)>"
    )
