"""The small routes, health, draining, and the user's own middleware."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend import __version__
from frontend.openai.api_server import CorsOptions, build_app
from frontend.openai.user_middleware import load_middleware
from ipc.errors import ConfigError
from tests.frontend.openai.fake_engine import FakeEngine, ask, chat, complete, make_server


class TaggingMiddleware:
    """A user's ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tagged(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-class", b"yes")]
            if message["type"] == "http.response.body":
                message["body"] = message.get("body", b"").replace(b"Hello", b"HELLO")
            await send(message)

        await self._app(scope, receive, tagged)


async def tag(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """A user's HTTP middleware."""
    response = await call_next(request)
    response.headers["x-function"] = "yes"
    return response


def test_models_lists_every_name_with_the_first_as_root() -> None:
    _, _, app = make_server()
    answer = ask(app, "GET", "/v1/models").json()
    assert [card["id"] for card in answer["data"]] == ["fake", "alias"]
    assert {card["root"] for card in answer["data"]} == {"fake"}
    assert answer["data"][0]["max_model_len"] == 100
    assert ask(app, "GET", "/v1/models/alias").json()["id"] == "alias"
    assert ask(app, "GET", "/v1/models/other").status_code == 404


def test_any_alias_is_accepted_answers_name_the_first_and_others_are_not_found() -> None:
    _, _, app = make_server()
    assert complete(app, model="alias").json()["model"] == "fake"
    for response in (complete(app, model="gpt-9"), chat(app, model="gpt-9")):
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "NotFoundError"


def test_small_routes_answer() -> None:
    _, _, app = make_server()
    assert ask(app, "GET", "/version").json() == {"version": __version__}
    assert ask(app, "GET", "/load").json() == {"server_load": 0}
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        response = ask(app, method, path)
        assert (response.status_code, response.content) == (200, b"")
    metrics = ask(app, "GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert ask(app, "GET", "/").headers["location"] == "/docs"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
def test_unknown_paths_and_methods_have_an_error_body(method: str, path: str, status: int) -> None:
    _, _, app = make_server()
    response = ask(app, method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status
    assert (path if status == 404 else method) in response.json()["error"]["message"]


def test_embeddings_are_refused_with_a_sentence() -> None:
    _, _, app = make_server()
    response = ask(app, "POST", "/v1/embeddings", json={"input": "x"})
    assert response.status_code == 400
    assert "embeddings are not supported" in response.json()["error"]["message"]


def test_a_dead_engine_turns_health_and_requests_to_503() -> None:
    _, _, app = make_server(FakeEngine(errored=True))
    for response in (ask(app, "GET", "/health"), ask(app, "POST", "/ping"), complete(app)):
        assert response.status_code == 503
        assert "the engine died" in response.json()["error"]["message"]


def test_a_draining_server_admits_nothing_and_says_when_to_come_back() -> None:
    engine, state, app = make_server()
    state.is_draining = True
    for response in (ask(app, "GET", "/health"), complete(app), chat(app)):
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert engine.calls == []


def test_a_bug_says_nothing_of_the_servers_inside() -> None:
    _, _, app = make_server(FakeEngine(fail_after=0, failure=ZeroDivisionError("/secret/path")))
    response = complete(app)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal server error"
    assert "secret" not in response.text


def test_cors_follows_its_flags() -> None:
    _, state, _ = make_server()
    app = build_app(state, CorsOptions(True, ("http://good",), ("GET", "PUT"), ("X-One",)))
    preflight = {"access-control-request-method": "PUT", "access-control-request-headers": "X-One"}
    allowed = ask(app, "OPTIONS", "/v1/models", headers={"origin": "http://good", **preflight})
    assert allowed.headers["access-control-allow-origin"] == "http://good"
    assert allowed.headers["access-control-allow-credentials"] == "true"
    refused = ask(app, "OPTIONS", "/v1/models", headers={"origin": "http://bad", **preflight})
    assert refused.status_code == 400


def test_user_middleware_wraps_streams_and_whole_answers() -> None:
    _, state, _ = make_server(FakeEngine(answer="Hello"))
    here = "tests.frontend.openai.test_api_server"
    paths = (f"{here}.TaggingMiddleware", f"{here}.tag")
    app = build_app(state, middleware=[load_middleware(path) for path in paths])
    for stream in (False, True):
        response = complete(app, stream=stream)
        assert response.status_code == 200
        assert (response.headers["x-class"], response.headers["x-function"]) == ("yes", "yes")
    assert complete(app).json()["choices"][0]["text"] == "HELLO"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("no.such.module", id="no such module"),
        pytest.param("tests.frontend.openai.test_api_server.nothing", id="no such name"),
        pytest.param("nodots", id="not a path"),
        pytest.param("os.sep", id="neither class nor coroutine function"),
        pytest.param("os.getcwd", id="a plain function"),
    ],
)
def test_a_middleware_that_cannot_be_used_is_a_configuration_error(path: str) -> None:
    with pytest.raises(ConfigError, match="--middleware"):
        load_middleware(path)
