"""Deadlines and shares of HTTP requests."""

import asyncio
import time
from typing import Any

import pytest

from frontend.openai.request_limits import RequestLimits
from ipc.errors import DeadlineExceededError, EngineDrainingError, EngineOverloadedError
from tests.frontend.openai.fake_engine import FakeEngine, ask, make_server


def post(app: Any, headers: dict[str, str], **options: Any) -> Any:
    body = {"prompt": "hi", "max_tokens": 5} | options
    return ask(app, "POST", "/v1/completions", json=body, headers=headers)


def test_a_timeout_becomes_a_deadline_of_the_engine() -> None:
    engine = FakeEngine()
    _, _, app = make_server(engine)
    before_s = time.monotonic()
    assert post(app, {"X-Request-Timeout": "2.5"}).status_code == 200
    assert before_s + 2.5 <= engine.calls[0].options["deadline"] <= time.monotonic() + 2.5


def test_the_server_caps_what_clients_ask_and_what_they_do_not() -> None:
    engine = FakeEngine()
    _, _, app = make_server(engine, max_request_timeout=3.0)
    post(app, {"X-Request-Timeout": "1000"})
    post(app, {})
    for call in engine.calls:
        assert call.options["deadline"] <= time.monotonic() + 3.0


def test_without_limits_the_engine_is_asked_as_ever() -> None:
    engine = FakeEngine()
    _, _, app = make_server(engine)
    post(app, {})
    assert not {"deadline", "tenant", "tenant_weight"} & engine.calls[0].options.keys()


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_timeout_that_is_none_is_refused_by_name(text: str) -> None:
    _, _, app = make_server(FakeEngine())
    response = post(app, {"X-Request-Timeout": text})
    assert response.status_code == 400
    assert "X-Request-Timeout" in response.json()["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_expired_request_is_a_gateway_timeout(stream: bool) -> None:
    failure = DeadlineExceededError("the request's time was up while waiting")
    _, _, app = make_server(FakeEngine(fail_after=0, failure=failure))
    assert post(app, {}, stream=stream).status_code == 504


def test_an_engine_that_does_not_keep_the_deadline_is_not_waited_for() -> None:
    async def wait() -> None:
        async with RequestLimits(deadline_s=time.monotonic() - 0.99).in_time():
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError):
        asyncio.run(wait())


def test_overload_and_drain_of_the_engine_are_told_before_the_body_is_read() -> None:
    engine = FakeEngine(overload=EngineOverloadedError("full", 12.2))
    _, _, app = make_server(engine)
    response = post(app, {}, prompt=["not", 5])
    assert (response.status_code, response.headers["retry-after"]) == (429, "13")
    engine.overload = EngineDrainingError("the engine was stopped by SIGTERM")
    response = post(app, {})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_each_key_has_a_number_and_its_weight() -> None:
    engine = FakeEngine()
    _, _, app = make_server(engine, api_keys=("first", "second"), api_key_weights=(1.0, 4.0))
    for key in ("second", "first"):
        assert post(app, {"Authorization": f"Bearer {key}"}).status_code == 200
    shares = [(c.options["tenant"], c.options["tenant_weight"]) for c in engine.calls]
    assert shares == [(2, 4.0), (1, 1.0)]
    assert "second" not in repr([c.options for c in engine.calls])
