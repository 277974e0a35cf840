"""A request that kills the core, among many that do not: it fails alone, they go on exactly."""

import asyncio
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from frontend import AsyncLLM, SamplingParams
from ipc.errors import EngineCrashError, RefusedContentError
from ipc.operations import GetStats
from tests.e2e.engines import tiny_args
from tests.engine_core.faulty_executors import POISON
from tests.engine_core.scripted_executor import scripted_token
from tests.fuzz.servers import running_server

NUM_GOOD = 63
PROMPT = [1, 2, 3]


def test_a_poison_request_fails_alone_and_its_content_is_refused() -> None:
    async def main() -> None:
        executor = "tests.engine_core.faulty_executors:PoisonedExecutor"
        args = tiny_args(executor_class=executor, max_num_seqs=64, skip_tokenizer_init=True)
        llm = AsyncLLM.from_engine_args(args)
        progress = 0

        async def generate(prompt: list[int], name: str, seed: int, num_tokens: int) -> list[int]:
            nonlocal progress
            params = SamplingParams(
                max_tokens=num_tokens, seed=seed, ignore_eos=True, detokenize=False
            )
            ids: list[int] = []
            inputs = {"prompt_token_ids": prompt}
            async for output in llm.generate(inputs, params, name):
                ids = output.outputs[0].token_ids
                progress += 1
            return ids

        try:
            await llm.wait_until_ready()
            good = [
                asyncio.create_task(generate(PROMPT, f"g{i}", i, 1500)) for i in range(NUM_GOOD)
            ]
            while progress < NUM_GOOD:
                await asyncio.sleep(0.001)
            with pytest.raises(EngineCrashError, match="engine_crash"):
                await generate([7, POISON, 9], "poison", 1, 10)
            assert (await llm.call(GetStats())).num_restarts <= 3
            for seed, ids in enumerate(await asyncio.gather(*good)):
                assert ids == [scripted_token(seed, 3 + i) for i in range(1500)]
            with pytest.raises(RefusedContentError, match="refused for another"):
                await generate([7, POISON, 9], "again", 2, 10)
            assert len(await generate([7, 8, 9], "other", 2, 10)) == 10
            assert (await llm.call(GetStats())).num_restarts == 3
        finally:
            llm.shutdown()

    asyncio.run(main())


def test_over_http_a_poison_request_is_500_then_422_and_its_neighbours_see_nothing() -> None:
    executor = "tests.engine_core.faulty_executors:PoisonedExecutor"

    def post(prompt: list[int]) -> tuple[int, dict[str, Any]]:
        body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as err:
            return err.code, json.load(err)

    with running_server("--executor-class", executor) as url:
        status, body = post([7, POISON, 9])
        assert (status, body["error"]["type"]) == (500, "engine_crash")
        assert post([7, POISON, 9])[0] == 422
        assert post([7, 8, 9])[0] == 200
