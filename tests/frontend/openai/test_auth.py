"""Keys and the envelope: closed by default, whatever the path, the Host header or the scheme."""

import asyncio
from typing import Any

import httpx
import pytest

from frontend.openai.auth import OPEN_PATHS, Authentication
from tests.frontend.openai.fake_engine import FakeEngine, ask, complete, make_server

KEYS = ("first-key", "second-key")


def paths_of(app: Any) -> set[tuple[str, str]]:
    """Every (method, path) of the application, those outside the description included."""
    schema = app.openapi()["paths"]
    found = {(method.upper(), path) for path, methods in schema.items() for method in methods}
    return found | {("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/nowhere")}


def test_without_a_key_only_the_open_paths_answer() -> None:
    _, _, app = make_server(api_keys=KEYS)
    open_found = set()
    for method, path in sorted(paths_of(app)):
        response = ask(app, method, path.replace("{name}", "fake"))
        if response.status_code == 401:
            assert response.json() == {"error": "Unauthorized"}
        else:
            open_found.add(path)
    assert open_found == OPEN_PATHS


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_every_path(key: str) -> None:
    _, _, app = make_server(api_keys=KEYS)
    headers = {"authorization": f"Bearer {key}"}
    for method, path in sorted(paths_of(app)):
        response = ask(app, method, path.replace("{name}", "fake"), headers=headers)
        assert response.status_code != 401, path


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("Bearer wrong", id="wrong key"),
        pytest.param("Bearer FIRST-KEY", id="case changed"),
        pytest.param("Bearer first-key extra", id="something behind"),
        pytest.param("Bearer first-ke", id="prefix"),
        pytest.param("Bearer ", id="empty"),
        pytest.param("first-key", id="no scheme"),
        pytest.param("Basic first-key", id="other scheme"),
    ],
)
def test_other_values_are_refused(value: str) -> None:
    _, _, app = make_server(api_keys=KEYS)
    response = ask(app, "GET", "/v1/models", headers={"authorization": value})
    assert response.status_code == 401


@pytest.mark.parametrize(
    "host", ["x/?", "x/health?", "server/health", "server#/health", "[::1]/health"]
)
def test_a_hostile_host_header_opens_nothing(host: str) -> None:
    _, _, app = make_server(api_keys=KEYS)
    headers = {"host": host, "x-forwarded-prefix": "/health", "x-original-url": "/health"}
    assert ask(app, "GET", "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/health/../v1/models", "/metrics/x", "/v1/health", "/HEALTH"]
)
def test_paths_near_an_open_one_stay_closed(path: str) -> None:
    _, _, app = make_server(api_keys=KEYS)
    assert ask(app, "GET", path).status_code in (401, 404)
    headers = [(b"host", b"server")]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    assert not Authentication(app, KEYS)._is_open(scope)


def test_the_root_path_is_taken_off_before_paths_are_compared() -> None:
    _, _, app = make_server(api_keys=KEYS, root_path="/llm")
    for path, status in (
        ("/llm/health", 200),
        ("/health", 200),
        ("/llm/v1/models", 401),
        ("/v1/models", 401),
    ):
        assert ask(app, "GET", path).status_code == status, path
    headers = {"authorization": "Bearer first-key"}
    for path in ("/llm/v1/models", "/v1/models"):
        assert ask(app, "GET", path, headers=headers).status_code == 200
    assert "/llm/openapi.json" in ask(app, "GET", "/docs", headers=headers).text


def test_preflight_requests_pass_and_carry_cors_headers() -> None:
    _, _, app = make_server(api_keys=KEYS)
    headers = {"origin": "http://site", "access-control-request-method": "POST"}
    response = ask(app, "OPTIONS", "/v1/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    refused = ask(app, "GET", "/v1/models", headers={"origin": "http://site"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"


def test_a_websocket_without_key_is_closed() -> None:
    _, _, app = make_server(api_keys=KEYS)
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/health", "headers": [], "state": {}}
    guard = Authentication(app, KEYS)
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_tenants_with_different_keys_never_share_cached_prefixes() -> None:
    engine, _, app = make_server(api_keys=KEYS)
    for key in (*KEYS, KEYS[0]):
        body = {"prompt": "Hi", "cache_salt": "s"}
        headers = {"authorization": f"Bearer {key}"}
        assert ask(app, "POST", "/v1/completions", json=body, headers=headers).status_code == 200
    salts = [call.options["cache_salt"] for call in engine.calls]
    assert salts[0] == salts[2] != salts[1]
    assert all(key not in salt for key in KEYS for salt in salts)


def salts_of(
    app_keys: tuple[str, ...], key: str, *own_salts: str | None, **options: Any
) -> list[Any]:
    """The salts that requests of one key get, for each salt of their own."""
    engine, _, app = make_server(api_keys=app_keys, **options)
    for own in own_salts:
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": "Hi"} | ({} if own is None else {"cache_salt": own})
        assert ask(app, "POST", "/v1/completions", json=body, headers=headers).status_code == 200
    return [call.options["cache_salt"] for call in engine.calls]


def test_a_key_has_the_same_salt_on_every_server_and_other_keys_another() -> None:
    # Several servers may be attached to one engine, each with one key.
    alone = salts_of(("a",), "a", None)
    assert alone == salts_of(("a", "b"), "a", None)
    assert alone != salts_of(("b",), "b", None)
    assert alone[0]


def test_no_salt_of_a_client_reaches_the_prefixes_of_another_key() -> None:
    (victim,) = salts_of(KEYS, KEYS[0], None)
    guesses = (victim, "", f":{victim}", f"{victim}:", "x" * 256)
    made = salts_of(KEYS, KEYS[1], *(guess or None for guess in guesses))
    assert len({victim, *made}) == 1 + len(guesses)
    assert all(1 <= len(salt) <= 256 for salt in made)


def test_prefixes_are_shared_among_keys_when_asked() -> None:
    assert salts_of(KEYS, KEYS[0], None, "s", share_cached_prefixes=True) == [None, "s"]


@pytest.mark.parametrize(
    ("sent", "is_echoed"),
    [("abc-1", True), ("x" * 256, True), ("x" * 257, False), ("tab\there", False)],
    ids=["short", "at the cap", "too long", "not printable"],
)
def test_a_plain_request_id_is_echoed_and_another_replaced(sent: str, is_echoed: bool) -> None:
    _, _, app = make_server()
    response = ask(app, "GET", "/health", headers={"x-request-id": sent})
    assert (response.headers["x-request-id"] == sent) is is_echoed


def test_open_requests_are_counted_and_forgotten() -> None:
    _, state, app = make_server()
    assert complete(app).status_code == 200
    assert complete(app, max_tokens=-1).status_code == 400
    assert state.num_open == 0


def test_a_thousand_requests_under_one_client_id_are_a_thousand_requests() -> None:
    engine, _, app = make_server(FakeEngine(max_model_len=1000))

    async def ask_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            posts = [
                client.post(
                    "/v1/completions",
                    json={"prompt": f"p{i}", "echo": True, "max_tokens": 1, "request_id": "same"},
                    headers={"x-request-id": "same"},
                )
                for i in range(1000)
            ]
            return await asyncio.gather(*posts)

    answers = asyncio.run(ask_all())
    assert [a.json()["choices"][0]["text"] for a in answers] == [f"p{i}H" for i in range(1000)]
    assert {a.headers["x-request-id"] for a in answers} == {"same"}
    assert len({a.json()["id"] for a in answers}) == 1000
    inner = {call.request_id for call in engine.calls}
    assert len(inner) == 1000
    assert not any("same" in req_id for req_id in inner)


def test_no_route_aborts_what_others_asked() -> None:
    engine, _, app = make_server(api_keys=KEYS)
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    for method, path in sorted(paths_of(app)):
        ask(app, method, path.replace("{name}", "x"), headers=headers, json={"rid": "", "id": "c"})
    assert engine.aborted == []
