"""How a session takes a core's refusals, deadlines and its drain."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from frontend.async_session import AsyncSession
from frontend.stat_loggers import StatLoggerGroup
from ipc.errors import (
    DeadlineExceededError,
    EngineDrainingError,
    EngineOverloadedError,
    RequestError,
)
from ipc.messages import (
    EngineDraining,
    EngineOutput,
    EngineOutputs,
    FinishReason,
    SchedulerStats,
)
from tests.frontend.builders import (
    FakeAsyncClient,
    FakeCore,
    always,
    make_config,
    make_limits,
    make_request,
    make_tokenizer,
)


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


def make_session() -> tuple[AsyncSession, FakeAsyncClient]:
    """A session on a core that is asked and does not answer by itself."""
    client = FakeAsyncClient(FakeCore(always("hello"), make_limits(max_waiting_tokens=100)))
    client.is_held = True
    config = make_config()
    return AsyncSession(client, config, make_tokenizer(), StatLoggerGroup(config, [])), client


def refuse(client: FakeAsyncClient, kind: type[Exception], **stats: float) -> None:
    """Let the core refuse the request that was sent last."""
    req_id = client.core.sent[-1].req_id
    output = EngineOutput(
        req_id, 0, 0, [], FinishReason.ERROR, error="no", error_kind=kind.__name__
    )
    numbers = SchedulerStats(**stats)  # type: ignore[arg-type]
    client.on_message(EngineOutputs(0, 1, [output], stats=numbers), ())


def test_a_refusal_of_the_core_says_when_to_come_back() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request("a"))
        refuse(client, EngineOverloadedError, retry_after_s=23.0)
        with pytest.raises(EngineOverloadedError) as err:
            await anext(stream)
        assert err.value.retry_after_s == 23.0

    run(main)


def test_a_deadline_that_came_in_the_queue_is_an_error_of_its_own() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request("a"))
        refuse(client, DeadlineExceededError)
        with pytest.raises(DeadlineExceededError):
            await anext(stream)

    run(main)


def test_a_timeout_travels_as_a_deadline() -> None:
    async def main() -> None:
        session, client = make_session()
        new = make_request("a")
        new.timeout = 5
        before_s = time.monotonic()
        await session.open(new)
        assert before_s + 5 <= client.core.sent[-1].deadline_s <= time.monotonic() + 5
        new = make_request("b")
        new.timeout = -1.0
        with pytest.raises(RequestError, match="timeout"):
            await session.open(new)

    run(main)


def test_what_would_be_too_much_is_not_even_sent() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request("a"))
        stats = SchedulerStats(num_waiting_tokens=99, retry_after_s=4.0)
        client.on_message(EngineOutputs(0, 1, [], stats=stats), ())
        with pytest.raises(EngineOverloadedError) as err:
            await session.open(make_request("b", "some words"))
        assert err.value.retry_after_s == 4.0
        assert len(client.core.sent) == 1
        stream.close()

    run(main)


def test_a_drain_is_known_at_once_and_open_streams_go_on() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request("a"))
        client.on_message(EngineDraining(0, "stopped by SIGTERM"), ())
        for refused in (session.check_health, session.check_admission):
            with pytest.raises(EngineDrainingError, match="SIGTERM"):
                refused()
        with pytest.raises(EngineDrainingError):
            await session.open(make_request("b"))
        client.is_held = False
        client.pump()
        assert [output.outputs[0].text async for output in stream][-1] == "hello"

    run(main)
