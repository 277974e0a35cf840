"""A core or a worker is killed under running streams: a pause, and not a token more or less."""

import asyncio
import contextlib
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import psutil
import pytest

from frontend import LLM, AsyncLLM, SamplingParams
from ipc.errors import EngineDeadError, EngineRestartingError
from ipc.operations import GetStats
from ipc.sampling_params import RequestOutputKind
from tests.e2e.engines import greedy, tiny_args
from tests.e2e.processes import Traces, assert_nothing_left, engine_pids
from tests.fuzz.servers import running_server

LIMIT_S = 90.0
NUM_TOKENS = 80
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logprobs": 2},
    {"min_tokens": 60, "stop": ["return x", "self."]},
    {"temperature": 1.0, "seed": 11, "top_p": 0.9, "prompt_logprobs": 1, "logprobs": 0},
]
Result = list[tuple[list[int], str, str | None, int]]


def params_of(number: int, **overrides: Any) -> SamplingParams:
    return greedy(NUM_TOKENS, **(KINDS[number % len(KINDS)] | overrides))


def prompt_of(number: int) -> str:
    return f"def function_{number}(self, x):"


def find_process(kind: str) -> psutil.Process:
    """The core that this test process has started, or its worker."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        for pid in engine_pids():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if "--core" not in process.cmdline():
                    continue
                if kind == "core":
                    return process
                if workers := process.children():
                    return workers[0]
        assert time.monotonic() < deadline, f"there is no {kind}"
        time.sleep(0.01)


async def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


class Load:
    """Streams on one engine; ``num_outputs`` says how they get on."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self.num_outputs = 0

    async def run(self, name: str, count: int) -> list[Result]:
        """All streams to their ends."""
        return await asyncio.gather(*[self._stream(name, number) for number in range(count)])

    async def _stream(self, name: str, number: int) -> Result:
        params = params_of(number, output_kind=RequestOutputKind.DELTA)
        parts: list[tuple[list[int], list[str]]] = [([], []) for _ in range(params.n)]
        reasons: list[list[str]] = [[] for _ in range(params.n)]
        logprobs = [0] * params.n
        stream = self._llm.generate(prompt_of(number), params, f"{name}-{number}")
        async for output in stream:
            self.num_outputs += 1
            for sequence in output.outputs:
                parts[sequence.index][0].extend(sequence.token_ids)
                parts[sequence.index][1].append(sequence.text)
                logprobs[sequence.index] += len(sequence.logprobs or ())
                if sequence.finish_reason is not None:
                    reasons[sequence.index].append(sequence.finish_reason)
        return [
            (ids, "".join(texts), "+".join(reason), count)
            for (ids, texts), reason, count in zip(parts, reasons, logprobs, strict=True)
        ]

    async def kill(self, kind: str, after: int) -> float:
        """Kill once ``after`` more outputs have come; the seconds until the engine is back."""
        start = self.num_outputs
        await wait_for(lambda: self.num_outputs >= start + after)
        began_s = time.monotonic()
        find_process(kind).kill()
        await wait_for(lambda: self._llm.restarting is not None)
        with pytest.raises(EngineRestartingError):
            await self._llm.check_health()
        await wait_for(lambda: self._llm.restarting is None)
        await self._llm.check_health()
        return time.monotonic() - began_s


@contextlib.asynccontextmanager
async def running_engine(**overrides: Any) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM.from_engine_args(tiny_args(**overrides))
    try:
        await llm.wait_until_ready()
        yield llm
    finally:
        llm.shutdown()


def test_streams_go_on_exactly_through_deaths_of_core_and_worker() -> None:
    before = Traces.now()

    async def main() -> None:
        async with running_engine(max_num_seqs=32) as llm:
            load = Load(llm)
            undisturbed = await load.run("a", 24)
            disturbed = asyncio.create_task(load.run("b", 24))
            for kind in ("core", "worker", "core"):
                await load.kill(kind, after=250)
            assert await disturbed == undisturbed
            assert (await llm.call(GetStats())).num_restarts == 3

    asyncio.run(main())
    assert_nothing_left(before)


def test_what_happens_during_a_restart_is_kept() -> None:
    """New requests wait, aborts count, calls are refused, and a second death changes nothing."""

    async def main() -> None:
        async with running_engine() as llm:
            load = Load(llm)
            undisturbed = await load.run("a", 8)
            aborted = await llm.add_request("aborted", "def f(", greedy(1500))
            running = asyncio.create_task(load.run("b", 8))
            await wait_for(lambda: load.num_outputs > 250)
            find_process("core").kill()
            await wait_for(lambda: llm.restarting is not None)
            late = asyncio.create_task(Load(llm).run("late", 8))
            await llm.abort("aborted")
            with pytest.raises(EngineRestartingError):
                await llm.call(GetStats())
            find_process("worker").kill()  # of the next core, while it loads
            find_process("core").kill()
            assert await running == undisturbed
            assert await late == undisturbed
            outputs = [output async for output in aborted]
            assert outputs[-1].outputs[0].finish_reason == "abort"
            stats = await llm.call(GetStats())
            assert (stats.num_running, stats.num_waiting, stats.num_leaked_blocks) == (0, 0, 0)

    asyncio.run(main())


def test_a_death_before_the_first_token_and_between_chunks_of_a_prompt() -> None:
    async def main() -> None:
        flags: dict[str, Any] = {"max_num_batched_tokens": 32, "enable_prefix_caching": False}
        async with running_engine(**flags) as llm:
            prompt = "x = [" + "1, " * 400
            params = greedy(5, prompt_logprobs=0)

            async def generate(name: str) -> tuple[list[int], int]:
                outputs = [output async for output in llm.generate(prompt, params, name)]
                logprobs = outputs[-1].prompt_logprobs
                assert logprobs is not None
                assert len(logprobs) == len(outputs[-1].prompt_token_ids)
                return outputs[-1].outputs[0].token_ids, len(logprobs)

            undisturbed = await generate("a")
            for after_steps in (0, 5):
                steps = (await llm.call(GetStats())).num_steps
                disturbed = asyncio.create_task(generate(f"b{after_steps}"))
                while (await llm.call(GetStats())).num_steps < steps + after_steps:
                    pass
                find_process("core").kill()
                assert await disturbed == undisturbed

    asyncio.run(main())


def test_a_batch_of_llm_goes_on_with_logits_processors_and_more_than_the_core_holds() -> None:
    def favour(token_ids: list[int], logits: Any) -> Any:
        logits[100 + len(token_ids) % 7] += 3.0
        return logits

    args = tiny_args(max_num_seqs=4, max_waiting_requests=4)
    options = {name: getattr(args, name) for name in ("dtype", "device", "worker_threads")}
    llm = LLM(args.model, max_num_seqs=4, max_waiting_requests=4, **options)
    params = [params_of(number) for number in range(18)]
    params[5] = greedy(40, logits_processors=[favour])
    prompts = [prompt_of(number) for number in range(18)]

    def results(llm: LLM) -> list[Any]:
        return [
            [(o.token_ids, o.text, o.finish_reason) for o in output.outputs]
            for output in llm.generate(prompts, params, use_tqdm=True)
        ]

    undisturbed = results(llm)
    step, num_steps = llm.llm_engine.step, 0

    def counting_step() -> list[Any]:
        nonlocal num_steps
        num_steps += 1
        if num_steps in (30, 150):
            find_process("core" if num_steps == 30 else "worker").kill()
        return step()

    llm.llm_engine.step = counting_step  # type: ignore[method-assign]
    assert results(llm) == undisturbed
    assert num_steps > 150
    assert llm.llm_engine.get_stats().num_restarts == 2
    llm.llm_engine._session.close()


def test_an_attached_frontend_goes_on_too() -> None:
    async def main() -> None:
        async with running_engine() as owner:
            address = owner._start.session._client._engine.link.address  # type: ignore[union-attr]
            guest = AsyncLLM.attach(address)
            try:
                load, other = Load(guest), Load(owner)
                undisturbed = await load.run("a", 8)
                running = asyncio.create_task(load.run("b", 8))
                owners = asyncio.create_task(other.run("b", 8))
                await load.kill("core", after=100)
                await load.kill("worker", after=100)
                assert await running == undisturbed
                assert await owners == undisturbed
            finally:
                guest.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="one process"),
        pytest.param(("--api-server-count", "2"), id="two processes", marks=pytest.mark.slow),
    ],
)
def test_the_openai_client_sees_a_pause_and_nothing_else(flags: tuple[str, ...]) -> None:
    """Three kills under streams of the official client; health tells of each."""

    async def stream(client: openai.AsyncOpenAI, number: int, seen: list[int]) -> Any:
        ids: list[int] = []
        text, reasons, usages = "", [], []
        chunks = await client.completions.create(
            model="tiny",
            prompt=prompt_of(number),
            max_tokens=NUM_TOKENS,
            temperature=float(number % 2),
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for chunk in chunks:
            seen.append(number)
            for choice in chunk.choices:
                text += choice.text
                ids += choice.model_extra.get("token_ids") or []  # type: ignore[union-attr]
                if choice.finish_reason is not None:
                    reasons.append(choice.finish_reason)
            if chunk.usage is not None:
                usages.append(chunk.usage.completion_tokens)
        return ids, text, reasons, usages

    async def main(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            seen: list[int] = []
            undisturbed = await asyncio.gather(*[stream(client, n, seen) for n in range(8)])
            assert [len(ids) for ids, *_ in undisturbed] == [NUM_TOKENS] * 8
            assert undisturbed[0][2:] == (["length"], [NUM_TOKENS])
            running = [asyncio.create_task(stream(client, n, seen)) for n in range(8)]
            for kind in ("core", "worker", "core"):
                start = len(seen)
                await wait_for(lambda start=start: len(seen) > start + 60)  # type: ignore[misc]
                find_process(kind).kill()
                await wait_for_health(url, 503)
                await wait_for_health(url, 200)
            assert await asyncio.gather(*running) == undisturbed

    with running_server("--served-model-name", "tiny", *flags) as url:
        asyncio.run(main(url))
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        assert 'num_engine_restarts_total{model_name="tiny"} 3.0' in metrics


async def wait_for_health(url: str, status: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while await asyncio.to_thread(health, url) != status:
        assert time.monotonic() < deadline, f"/health never said {status}"
        await asyncio.sleep(0.02)


def health(url: str) -> int:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as err:
        return err.code


def test_without_recovery_a_death_is_the_end() -> None:
    async def main() -> None:
        async with running_engine(recovery=False) as llm:
            load = Load(llm)
            running = asyncio.create_task(load.run("a", 4))
            await wait_for(lambda: load.num_outputs > 20)
            find_process("core").kill()
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await running
            assert llm.errored

    asyncio.run(main())
