"""The quick no, and who gets it."""

import pytest

from ipc.errors import EngineDrainingError, EngineOverloadedError
from tests.frontend.openai.fake_engine import FakeEngine, ask, make_server


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("overload", "status"),
    [(EngineOverloadedError("full", 3.0), 429), (EngineDrainingError("e"), 503)],
)
def test_generations_are_refused_with_advice_whatever_their_body(
    path: str, overload: Exception, status: int
) -> None:
    _, _, app = make_server(FakeEngine(overload=overload))
    response = ask(app, "POST", path, content=b"no JSON")
    assert response.status_code == status
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.json()["error"]["code"] == status
    assert "x-request-id" in response.headers


def test_everything_else_is_served_on() -> None:
    _, _, app = make_server(FakeEngine(overload=EngineOverloadedError("full")))
    for path in ("/health", "/v1/models", "/metrics"):
        assert ask(app, "GET", path).status_code == 200
    assert ask(app, "GET", "/v1/completions").status_code == 405


def test_strangers_learn_nothing_about_the_load() -> None:
    _, _, app = make_server(FakeEngine(overload=EngineOverloadedError("full")), api_keys=("k",))
    assert ask(app, "POST", "/v1/completions", json={"prompt": "x"}).status_code == 401
