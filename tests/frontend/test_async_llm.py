"""AsyncLLM: the contract inside an event loop, on a scripted core."""

import asyncio
import gc
import logging
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import cache
from typing import Any

import pytest

from frontend.async_llm import AsyncLLM, AsyncLLMEngine
from frontend.async_start import EngineStart
from frontend.engine_args import AsyncEngineArgs, EngineArgs
from frontend.lora_request import LoRARequest
from ipc.config import EngineConfig
from ipc.errors import ConfigError, EngineDeadError, EngineStartError, UnsupportedError
from ipc.messages import AbortRequests, SchedulerStats
from ipc.operations import (
    GetStats,
    IsPaused,
    IsSleeping,
    PauseGeneration,
    ResetPrefixCache,
    ResumeGeneration,
    Sleep,
    StopProfile,
    WakeUp,
)
from ipc.sampling_params import SamplingParams
from tests.frontend.builders import TINY, FakeAsyncClient, FakeCore, always, make_tokenizer


@cache
def tiny_config() -> EngineConfig:
    return EngineArgs(model=str(TINY), device="cpu", max_model_len=64).create_engine_config()


def make_llm(core: FakeCore | None = None, **options: Any) -> tuple[AsyncLLM, FakeAsyncClient]:
    """An engine on a scripted core that says "hello"."""
    client = FakeAsyncClient(core or FakeCore(always("hello")))

    async def connect() -> FakeAsyncClient:
        return client

    start = EngineStart(connect, tiny_config(), None, log_stats=False, tokenizer=make_tokenizer())
    return AsyncLLM(engine_start=start, **options), client


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


async def say(llm: AsyncLLM, request_id: str = "a", **options: Any) -> list[str]:
    outputs = llm.generate("hi", SamplingParams(), request_id, **options)
    return [output.outputs[0].text async for output in outputs]


def test_both_names_are_one_class_and_its_2024_arguments_are_there() -> None:
    assert AsyncLLMEngine is AsyncLLM
    code = "import inspect, frontend; print(inspect.signature(frontend.AsyncLLMEngine.__init__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("worker_use_ray", "engine_use_ray", "*args", "log_requests", "max_log_len"):
        assert name in done.stdout


def test_the_first_request_starts_the_loop() -> None:
    llm, _ = make_llm()
    assert not llm.is_running

    async def main() -> None:
        assert await say(llm) == ["h", "he", "hel", "hell", "hello", "hello"]
        assert llm.is_running
        assert not llm.is_stopped

    run(main)


def test_without_the_loop_requests_get_a_dead_engine_until_it_is_started() -> None:
    async def main() -> None:
        llm, _ = make_llm(start_engine_loop=False)
        with pytest.raises(EngineDeadError, match="start_background_loop"):
            await say(llm)
        llm.start_background_loop()
        assert (await say(llm))[-1] == "hello"
        with pytest.raises(RuntimeError, match="runs already"):
            llm.start_background_loop()

    run(main)


def test_the_prompt_has_two_names() -> None:
    async def main() -> None:
        llm, _ = make_llm()
        outputs = llm.generate(
            prompt={"prompt_token_ids": [1]}, sampling_params=SamplingParams(), request_id="a"
        )
        texts = [output.outputs[0].text async for output in outputs]
        assert texts[-1] == "hello"
        with pytest.raises(TypeError, match="needs a prompt"):
            await anext(llm.generate(sampling_params=SamplingParams(), request_id="a"))
        with pytest.raises(TypeError, match="prioritee"):
            await say(llm, prioritee=1)

    run(main)


def test_breaking_out_aborts_in_the_core() -> None:
    async def main() -> None:
        llm, client = make_llm()
        async with aclosing(llm.generate("hi", SamplingParams(), "a")) as outputs:
            async for _ in outputs:
                break
        assert client.core.sent[1:] == [AbortRequests(["1"])]
        assert not client.core.has_unfinished

    run(main)


def test_cancelling_a_task_aborts_in_the_core() -> None:
    async def main() -> None:
        llm, client = make_llm()
        await llm.wait_until_ready()
        client.is_held = True
        task = asyncio.ensure_future(say(llm))
        while not client.core.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client.core.has_unfinished

    run(main)


def test_abort_takes_one_name_or_several() -> None:
    async def main() -> None:
        llm, client = make_llm()
        await llm.abort("nobody")
        await llm.wait_until_ready()
        client.is_held = True
        streams = [await llm.add_request(name, "hi", SamplingParams()) for name in "abc"]
        await llm.abort("a")
        await llm.abort(["b", "c", "unknown"])
        for stream in streams:
            assert (await anext(stream)).outputs[0].finish_reason == "abort"

    run(main)


def test_a_name_in_use_is_a_key_error_for_its_second_user_only() -> None:
    async def main() -> None:
        llm, _ = make_llm()
        results = await asyncio.gather(say(llm, "a"), say(llm, "a"), return_exceptions=True)
        assert isinstance(results[1], KeyError)
        assert results[0][-1] == "hello"  # type: ignore[index]

    run(main)


def test_death_is_loud() -> None:
    async def main() -> None:
        llm, client = make_llm()
        await llm.wait_until_ready()
        client.is_held = True
        tasks = [asyncio.ensure_future(say(llm, name)) for name in "ab"]
        while len(client.core.requests) < 2:
            await asyncio.sleep(0)
        client.on_dead(EngineDeadError("worker 0 was killed"))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(result) for result in results} == {"worker 0 was killed"}
        assert (llm.errored, llm.is_stopped, llm.is_running) == (True, True, False)
        assert str(llm.dead_error) == "worker 0 was killed"
        with pytest.raises(EngineDeadError, match="killed"):
            await llm.check_health()
        with pytest.raises(EngineDeadError, match="killed"):
            await say(llm)

    run(main)


def test_set_errored_is_death_too() -> None:
    async def main() -> None:
        llm, _ = make_llm()
        await llm.wait_until_ready()
        stream = await llm.add_request("a", "hi", SamplingParams())
        llm.set_errored(RuntimeError("poison"))
        with pytest.raises(EngineDeadError, match="poison"):
            await anext(stream)
        assert llm.errored

    run(main)


def test_a_failed_start_is_told_to_everybody() -> None:
    async def connect() -> FakeAsyncClient:
        raise EngineStartError("loading weights: no such file")

    async def main() -> None:
        start = EngineStart(connect, tiny_config(), None, log_stats=False)
        llm = AsyncLLM(engine_start=start)
        results = await asyncio.gather(say(llm, "a"), say(llm, "b"), return_exceptions=True)
        assert {type(result) for result in results} == {EngineStartError}
        assert llm.errored
        assert "loading weights" in str(llm.dead_error)
        with pytest.raises(EngineStartError, match="loading weights"):
            await llm.wait_until_ready()

    run(main)


def test_shutdown_ends_streams_and_is_no_error() -> None:
    async def main() -> None:
        llm, client = make_llm()
        stream = await llm.add_request("a", "hi", SamplingParams())
        llm.shutdown()
        llm.shutdown(timeout=1.0)
        assert client.is_closed
        assert (llm.is_stopped, llm.errored) == (True, False)
        with pytest.raises(EngineDeadError, match="shut down"):
            await anext(stream)
        with pytest.raises(EngineDeadError, match="shut down"):
            await say(llm)

    run(main)


def test_collecting_it_closes_the_client() -> None:
    async def main() -> None:
        llm, client = make_llm()
        await say(llm)
        del llm
        gc.collect()
        assert client.is_closed

    run(main)


def test_it_belongs_to_the_loop_of_its_first_use() -> None:
    llm, _ = make_llm()

    async def main() -> None:
        await say(llm)

    run(main)
    with pytest.raises(RuntimeError, match="event loop of its first use"):
        run(main)


def test_several_live_in_one_loop() -> None:
    async def main() -> None:
        pairs = [make_llm(FakeCore(always(text))) for text in ("one", "two")]
        texts = await asyncio.gather(*(say(llm) for llm, _ in pairs))
        assert [text[-1] for text in texts] == ["one", "two"]

    run(main)


def test_control_operations_reach_the_core() -> None:
    results = {
        GetStats: SchedulerStats(num_running=2),
        IsPaused: True,
        IsSleeping: False,
        ResetPrefixCache: True,
        StopProfile: ["trace.json"],
    }

    async def main() -> None:
        llm, client = make_llm(FakeCore(always("x"), results=results))
        assert (await llm.get_stats()).num_running == 2
        await llm.check_health()
        await asyncio.sleep(0)
        await llm.pause_generation(mode="keep")
        assert await llm.is_paused()
        await llm.resume_generation()
        await llm.sleep(level=2)
        assert not await llm.is_sleeping()
        await llm.wake_up()
        assert await llm.reset_prefix_cache()
        assert await llm.stop_profile() == ["trace.json"]
        await llm.do_log_stats()
        assert client.core.calls == [
            GetStats(),
            GetStats(),  # the question of the health check
            PauseGeneration("keep"),
            IsPaused(),
            ResumeGeneration(),
            Sleep(2),
            IsSleeping(),
            WakeUp(),
            ResetPrefixCache(),
            StopProfile(),
        ]

    run(main)


def test_pausing_clears_the_cache_and_waiting_lets_requests_end() -> None:
    async def main() -> None:
        llm, client = make_llm()
        reader = asyncio.ensure_future(say(llm))
        await llm.wait_until_ready()
        while not client.core.requests:
            await asyncio.sleep(0)
        await llm.pause_generation(mode="wait")
        assert client.core.calls == [PauseGeneration("wait"), ResetPrefixCache()]
        assert (await reader)[-1] == "hello"
        with pytest.raises(ValueError, match="mode must be one of"):
            await llm.pause_generation(mode="stop")

    run(main)


def test_draining_times_out() -> None:
    async def main() -> None:
        llm, client = make_llm()
        await llm.wait_until_ready()
        client.is_held = True
        stream = await llm.add_request("a", "hi", SamplingParams())
        with pytest.raises(TimeoutError):
            await llm.wait_for_requests_to_drain(0.01)
        stream.close()
        await llm.wait_for_requests_to_drain(0.01)

    run(main)


def test_what_it_is_can_be_asked() -> None:
    async def main() -> None:
        llm, _ = make_llm()
        assert (await llm.get_model_config()).max_model_len == 64
        assert await llm.get_decoding_config() is llm.vllm_config.decoding_config
        assert await llm.get_tokenizer() is llm.tokenizer
        assert await llm.get_supported_tasks() == ("generate",)

    run(main)


async def chunks() -> AsyncIterator[str]:
    yield "a"


def test_what_this_version_lacks_is_refused_with_a_sentence() -> None:
    async def main() -> None:
        llm, _ = make_llm()
        adapter = LoRARequest("x", 1, "/x")
        refused: list[Callable[[], Awaitable[Any]]] = [
            lambda: llm.add_lora(adapter),
            lambda: llm.pin_lora(1),
            lambda: llm.collective_rpc("f"),
            lambda: llm.wake_up(["weights"]),
            llm.apply_model,
            lambda: llm.sleep(1, mode="wait"),
            lambda: llm.reset_prefix_cache(reset_running_requests=True),
            llm.init_weight_transfer_engine,
            llm.start_weight_update,
            llm.update_weights,
            llm.finish_weight_update,
            llm.update_weight_version,
            llm.get_weight_version,
            llm.scale_elastic_ep,
            llm.checkpoint_prepare,
            llm.checkpoint_restore,
            llm.handle_fault,
            llm.get_status,
            lambda: say(llm, session_id="s"),
            lambda: say(llm, reasoning_ended=True),
            lambda: anext(llm.generate(chunks(), SamplingParams(), "a")),  # type: ignore[arg-type]
            lambda: say(llm, lora_request=adapter),
        ]
        for use in refused:
            with pytest.raises(UnsupportedError, match="not available"):
                await use()
        with pytest.raises(UnsupportedError, match="not available"):
            llm.encode("a", None, "a")
        with pytest.raises(UnsupportedError, match="cannot be stepped by hand"):
            await llm.engine_step()
        assert await llm.list_loras() == set()
        assert await llm.remove_lora(1) is False
        assert await llm.is_tracing_enabled() is False
        assert await llm.reset_mm_cache() is True
        assert await llm.reset_encoder_cache() is True

    run(main)


def test_it_cannot_be_pickled() -> None:
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(make_llm()[0])


@pytest.mark.parametrize("log_requests", [True, False])
def test_request_lines_can_be_silenced(
    log_requests: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        llm, _ = make_llm(log_requests=log_requests)
        await say(llm, "name")

    with caplog.at_level(logging.INFO, "frontend.request_log"):
        run(main)
    assert ("request name" in caplog.text) is log_requests


def test_bad_arguments_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="gpu-memory-utilization"):
        AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(TINY), gpu_memory_utilization=2.0))
    with pytest.raises(TypeError, match="modle_config"):
        AsyncLLM(modle_config=1)
    with pytest.raises(TypeError, match="by position and by keyword"):
        AsyncLLM(False, False, tiny_config().model_config, model_config=1)
    with pytest.raises(ConfigError, match=r"(?i)ray"):
        AsyncLLM(worker_use_ray=True, vllm_config=tiny_config())


def test_an_engine_that_is_not_connected_yet_has_no_config() -> None:
    llm = AsyncLLM.attach("ipc:///nowhere")
    with pytest.raises(EngineDeadError, match="wait_until_ready"):
        llm.vllm_config  # noqa: B018
    assert llm.tokenizer is None
