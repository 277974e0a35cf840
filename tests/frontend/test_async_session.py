"""The asynchronous session: streams, leaving, merging, death, user code off the loop."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import uvloop

from frontend.async_session import AsyncSession, OutputStream
from frontend.inputs import NewRequest
from frontend.request_state import RequestState
from frontend.stat_loggers import StatLoggerGroup
from ipc.errors import (
    EngineDeadError,
    EngineGenerateError,
    EngineOverloadedError,
    RequestError,
    UnsupportedError,
)
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    FinishReason,
    LogitsRow,
    ProcessedLogits,
)
from ipc.records import TensorRef
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import (
    FakeAsyncClient,
    FakeCore,
    always,
    make_config,
    make_limits,
    make_request,
    make_tokenizer,
)

LOOPS = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(uvloop.new_event_loop, id="uvloop"),
]


def run(
    main: Callable[[], Awaitable[None]], loop: Callable[[], Any] = asyncio.new_event_loop
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())  # type: ignore[arg-type]


def make_session(
    core: FakeCore | None = None, *, is_held: bool = False
) -> tuple[AsyncSession, FakeAsyncClient]:
    """A session on a scripted core that says "hello"; held, it waits for ``pump``."""
    client = FakeAsyncClient(core or FakeCore(always("hello")))
    client.is_held = is_held
    config = make_config()
    return AsyncSession(client, config, make_tokenizer(), StatLoggerGroup(config, [])), client


async def read_all(stream: OutputStream) -> list[str]:
    return [output.outputs[0].text async for output in stream]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_hundred_streams_at_once(loop: Callable[[], Any]) -> None:
    async def main() -> None:
        session, _ = make_session(FakeCore(always("hello"), make_limits(max_num_seqs=100)))
        streams = [await session.open(make_request(str(i))) for i in range(100)]
        texts = await asyncio.gather(*map(read_all, streams))
        assert {text[-1] for text in texts} == {"hello"}
        assert session.outputs.num_open == 0

    run(main, loop)


def test_a_consumer_that_keeps_up_gets_every_step() -> None:
    async def main() -> None:
        session, _ = make_session()
        texts = await read_all(await session.open(make_request()))
        assert texts == ["h", "he", "hel", "hell", "hello", "hello"]

    run(main)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param(RequestOutputKind.DELTA, ["he", "llo"], id="deltas join"),
        pytest.param(RequestOutputKind.CUMULATIVE, ["he", "hello"], id="the last one replaces"),
        pytest.param(RequestOutputKind.FINAL_ONLY, ["hello"], id="only the end"),
    ],
)
def test_a_slow_consumer_gets_steps_merged(kind: RequestOutputKind, expected: list[str]) -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request(output_kind=kind))
        texts = []
        for num_steps in (2, 4):
            for _ in range(num_steps):
                session.take_in(client.core.step(), ())
            if num_steps == 4 or kind is not RequestOutputKind.FINAL_ONLY:
                texts.append((await anext(stream)).outputs[0].text)
        assert texts == expected
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(main)


def test_one_step_wakes_all_waiting_consumers_once() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        streams = [await session.open(make_request(str(i))) for i in range(5)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        session.take_in(client.core.step(), ())
        outputs = await asyncio.gather(*tasks)
        assert [output.outputs[0].text for output in outputs] == ["h"] * 5
        for stream in streams:
            stream.close()

    run(main)


def test_a_listener_is_offered_the_news_of_all_that_came_before_its_consumer_is_woken() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request(output_kind=RequestOutputKind.DELTA))
        offered: list[str] = []

        def listen(state: RequestState) -> bool:
            if state.is_finished:
                return False
            state.is_news = False
            offered.append(state.take_text(0))
            return True

        stream.offer_news_to(listen)
        reader = asyncio.ensure_future(read_all(stream))
        await asyncio.sleep(0)
        for num_steps in (1, 3):
            for _ in range(num_steps):  # a loop that lags finds several messages
                session.take_in(client.core.step(), ())
            await asyncio.sleep(0)
        assert offered == ["h", "ell"]
        while client.core.has_unfinished:
            session.take_in(client.core.step(), ())
            await asyncio.sleep(0)
        assert "".join([*offered, *(await reader)]) == "hello"

    run(main)


def test_a_listener_that_fails_fails_its_own_stream_alone() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        streams = [
            await session.open(make_request(name, output_kind=RequestOutputKind.DELTA))
            for name in ("bad", "good")
        ]

        def fail(state: RequestState) -> bool:
            raise ValueError("scripted")

        told: list[str] = []

        def listen(state: RequestState) -> bool:
            told.append(state.request_id)
            return False

        for stream, listener in zip(streams, (fail, listen), strict=True):
            stream.offer_news_to(listener)
        readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        session.take_in(client.core.step(), ())
        with pytest.raises(ValueError, match="scripted"):
            await readers[0]
        assert (await readers[1]).outputs[0].text == "h"
        assert told == ["good"]
        for stream in streams:
            stream.close()
        assert session.outputs.num_open == 0

    run(main)


def test_a_listener_is_not_called_while_its_consumer_is_busy() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request(output_kind=RequestOutputKind.DELTA))
        stream.offer_news_to(lambda state: pytest.fail("the consumer has its turn"))
        session.take_in(client.core.step(), ())
        await asyncio.sleep(0)
        assert (await anext(stream)).outputs[0].text == "h"
        stream.close()

    run(main)


def test_leaving_early_aborts_in_the_core() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request())
        await anext(stream)
        stream.close()
        stream.close()
        assert client.core.sent[1:] == [AbortRequests(["1"])]
        assert not client.core.has_unfinished
        await session.open(make_request())  # the name is free again

    run(main)


def test_dropping_a_stream_unread_aborts_it_too() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request())
        assert client.core.has_unfinished
        del stream
        gc.collect()
        await asyncio.sleep(0)
        assert not client.core.has_unfinished
        assert session.outputs.num_open == 0

    run(main)


def test_cancelling_a_reader_and_closing_leaves_nothing() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request())

        async def read() -> None:
            try:
                await anext(stream)
            finally:
                stream.close()

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client.core.has_unfinished

    run(main)


def test_an_aborted_stream_ends_with_reason_abort() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request())
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        session.abort(["a", "unknown"])
        output = await task
        assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
        assert await read_all(stream) == []
        assert client.core.sent[1:] == [AbortRequests(["1"])]

    run(main)


def test_a_stop_string_is_told_to_the_core() -> None:
    async def main() -> None:
        session, client = make_session()
        texts = await read_all(await session.open(make_request(stop="l")))
        assert texts[-1] == "he"
        assert client.core.sent[1:] == [AbortBranches([("1", 0)])]

    run(main)


def test_a_name_in_use_fails_for_its_second_user_only() -> None:
    async def main() -> None:
        session, _ = make_session()
        first = await session.open(make_request("a"))
        with pytest.raises(KeyError):
            await session.open(make_request("a"))
        assert (await read_all(first))[-1] == "hello"
        assert (await read_all(await session.open(make_request("a"))))[-1] == "hello"

    run(main)


def test_too_many_requests_are_refused_and_nothing_is_sent() -> None:
    async def main() -> None:
        limits = make_limits(max_num_seqs=1, max_waiting_requests=1)
        session, client = make_session(FakeCore(always("x"), limits), is_held=True)
        streams = [await session.open(make_request(str(i))) for i in range(2)]
        with pytest.raises(EngineOverloadedError, match="2 requests are in flight, at most 2"):
            await session.open(make_request("c"))
        assert len(client.core.sent) == 2
        streams[0].close()
        await session.open(make_request("c"))

    run(main)


@pytest.mark.parametrize(
    "die",
    [
        pytest.param(lambda client: client.on_dead(EngineDeadError("killed")), id="by the link"),
        pytest.param(
            lambda client: client.on_message(EngineFailed(0, "killed", 5), ()), id="by last words"
        ),
    ],
)
def test_death_reaches_every_stream_and_every_later_request(die: Callable[[Any], None]) -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        streams = [await session.open(make_request(str(i))) for i in range(3)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams[:2]]
        await asyncio.sleep(0)
        die(client)
        results = await asyncio.gather(*tasks, anext(streams[2]), return_exceptions=True)
        assert [str(result) for result in results] == ["killed"] * 3
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert len(set(map(id, results))) == 3
        with pytest.raises(EngineDeadError, match="killed"):
            await session.open(make_request("later"))

    run(main)


def test_one_request_that_fails_fails_alone() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        bad, good = await session.open(make_request("a")), await session.open(make_request("b"))
        error = EngineOutput("1", 0, 0, [], FinishReason.ERROR, error="NaN")
        session.take_in(EngineOutputs(0, 0, [error]), ())
        with pytest.raises(EngineGenerateError, match="NaN"):
            await anext(bad)
        with pytest.raises(StopAsyncIteration):
            await anext(bad)
        client.is_held = False
        client.pump()
        assert (await read_all(good))[-1] == "hello"

    run(main)


def test_logits_processors_run_off_the_loop_and_answer_the_core() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        threads, loop_turns = [], 0
        may_go_on = threading.Event()

        def slow(output_ids: list[int], logits: Any) -> Any:
            threads.append(threading.current_thread())
            assert may_go_on.wait(60)
            return logits + 1

        stream = await session.open(make_request(logits_processors=[slow]))
        answered = asyncio.Event()
        send = client.send

        def note(message: Any, frames: Any = ()) -> None:
            send(message, frames)
            answered.set()

        client.send = note  # type: ignore[method-assign]
        row = LogitsRow("1", 0, 2, TensorRef(0, "float32", [1]))
        session.take_in(EngineOutputs(0, 0, [], [row]), [b"\0\0\0\0"])
        for _ in range(10):
            loop_turns += 1
            await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.wait_for(answered.wait(), 60)
        assert isinstance(client.core.sent[-1], ProcessedLogits)
        assert loop_turns == 10
        assert threads[0] is not threading.main_thread()
        stream.close()
        session.close()

    run(main)


def test_long_texts_are_tokenised_beside_the_loop() -> None:
    async def main() -> None:
        limits = make_limits(max_model_len=100_000, num_gpu_blocks=10_000)
        session, client = make_session(FakeCore(always("x"), limits))
        threads = []
        tokenizer = make_tokenizer()
        encode = tokenizer.encode

        def note(*arguments: Any) -> list[int]:
            threads.append(threading.current_thread() is threading.main_thread())
            return encode(*arguments)

        tokenizer.encode = note  # type: ignore[method-assign]
        session.inputs.tokenizer = tokenizer
        for text in ("short", "long " * 5000):
            await read_all(await session.open(make_request(prompt=text)))
        assert threads == [True, False]
        assert len(client.core.requests["2"].prompt_token_ids) == 25_000

    run(main)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        pytest.param("", RequestError, id="empty"),
        pytest.param({"prompt": "a", "multi_modal_data": 1}, UnsupportedError, id="media"),
    ],
)
def test_refused_requests_leave_nothing(prompt: Any, kind: type[Exception]) -> None:
    async def main() -> None:
        session, client = make_session()
        with pytest.raises(kind):
            await session.open(NewRequest("a", prompt, make_request().params))
        assert client.core.sent == []
        assert session.outputs.num_open == 0

    run(main)


def test_draining_waits_for_what_is_open_now() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        first = await session.open(make_request("a", max_tokens=1))
        drained = asyncio.ensure_future(session.wait_until_drained())
        await asyncio.sleep(0)
        later = await session.open(make_request("b", max_tokens=5))
        assert not drained.done()
        session.take_in(client.core.step(), ())
        await drained
        assert session.outputs.num_open == 1
        for stream in (first, later):
            stream.close()
        await session.wait_until_drained()

    run(main)


def test_closing_ends_streams_and_the_client() -> None:
    async def main() -> None:
        session, client = make_session(is_held=True)
        stream = await session.open(make_request())
        session.close()
        session.close()
        assert client.is_closed
        with pytest.raises(EngineDeadError, match="shut down"):
            await anext(stream)

    run(main)


def test_closing_after_the_loop_was_closed_is_quiet() -> None:
    loop = asyncio.new_event_loop()
    kept: list[Any] = []

    async def main() -> None:
        session, _ = make_session(is_held=True)
        stream = await session.open(make_request())
        kept.extend([session, stream, asyncio.ensure_future(anext(stream))])
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    loop.close()
    session, stream, task = kept
    session.close()
    assert stream.finished
    task._log_destroy_pending = False


def test_streams_work_with_aclosing_and_break() -> None:
    async def main() -> None:
        session, client = make_session()
        stream = await session.open(make_request())

        async def generate() -> Any:
            try:
                async for output in stream:
                    yield output
            finally:
                stream.close()

        async with aclosing(generate()) as outputs:
            async for _ in outputs:
                break
        assert not client.core.has_unfinished

    run(main)


class FakePool:
    """A pool of one worker, which says everything is "x"."""

    def __init__(self) -> None:
        self.is_closed = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [120]

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        await asyncio.sleep(0)
        return [120]

    def close(self) -> None:
        self.is_closed = True


def test_a_pool_tokenises_every_text_and_is_closed() -> None:
    async def main() -> None:
        client, config, pool = FakeAsyncClient(FakeCore(always("a"))), make_config(), FakePool()
        loggers = StatLoggerGroup(config, [])
        session = AsyncSession(client, config, make_tokenizer(), loggers, pool)
        await read_all(await session.open(make_request(prompt="short")))
        assert client.core.requests["1"].prompt_token_ids == [120]
        results = await asyncio.gather(
            session.open(make_request("same")),
            session.open(make_request("same")),
            return_exceptions=True,
        )
        assert isinstance(results[1], KeyError)  # both were free when they began to tokenise
        session.close()
        assert pool.is_closed

    run(main)
