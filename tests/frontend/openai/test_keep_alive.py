"""Comments on silent streams while the engine restarts; and keys whose requests end engines."""

from types import SimpleNamespace
from typing import Any

import pytest

from frontend.openai.crash_quota import CrashQuota
from frontend.openai.keep_alive import KeepAlive
from frontend.openai.sse import EventWriter
from ipc.errors import EngineOverloadedError, EngineRestartingError


def make_writer(written: list[bytes]) -> EventWriter:
    direct = SimpleNamespace(takes_now=True, write=written.append)

    async def send(_message: Any) -> None:
        raise AssertionError("the short way is there")

    scope: Any = {"type": "http", "state": {"direct_body": direct}}
    return EventWriter(scope, send, {})


def test_comments_come_every_five_seconds_of_a_restart_and_only_then() -> None:
    written: list[bytes] = []
    begun, silent = make_writer(written), make_writer([])
    begun.has_begun = True
    engine = SimpleNamespace(restarting=None)
    state: Any = SimpleNamespace(engine=engine, open_streams={begun, silent})
    keep_alive = KeepAlive(state)
    for now_s in range(20):
        keep_alive.tick(float(now_s))
    assert written == []

    engine.restarting = EngineRestartingError("the engine is restarting")
    for tenth in range(200, 312):
        keep_alive.tick(tenth / 10)
    assert written == [b": keep-alive\n\n"] * 2

    engine.restarting = None
    keep_alive.tick(60.0)
    engine.restarting = EngineRestartingError("again")
    keep_alive.tick(61.0)
    assert len(written) == 2


def test_a_key_whose_requests_ended_the_engine_twice_waits_for_the_minute_to_pass() -> None:
    quota = CrashQuota()
    quota.note("a", 0.0)
    quota.check("a", 1.0)
    quota.note("a", 10.0)
    with pytest.raises(EngineOverloadedError, match="2 requests of this key") as caught:
        quota.check("a", 20.0)
    assert caught.value.retry_after_s == 40.0
    quota.check("b", 20.0)
    quota.check(None, 20.0)
    quota.check("a", 60.0)
