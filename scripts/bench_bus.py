"""The message bus under many streams: frontend and core with an executor that answers at once."""

import asyncio
import os
import time
from typing import Any

from bench_processes import usage_by_role, used_between

Result = dict[str, Any]


async def measure_bus(executor_class: str, model: str, num_streams: int, num_tokens: int) -> Result:
    """CPU time per token and stream of frontend and core when the model costs nothing.

    Streams are read from ``AsyncLLM`` as text deltas, so detokenising is part of the figure.
    """
    from frontend import AsyncEngineArgs, AsyncLLM, SamplingParams
    from ipc.sampling_params import RequestOutputKind

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            executor_class=executor_class,
            max_num_seqs=num_streams,
            max_num_batched_tokens=max(2048, num_streams),
            disable_log_stats=True,
            disable_log_requests=True,
        )
    )

    async def read(name: str, length: int) -> int:
        params = SamplingParams(
            temperature=1.0, seed=1, max_tokens=length, ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        count = 0
        async for output in engine.generate({"prompt_token_ids": [5, 6, 7]}, params, name):
            count += len(output.outputs[0].token_ids)
        return count

    try:
        await asyncio.gather(*(read(f"warm-{i}", 8) for i in range(num_streams)))
        before = usage_by_role(os.getpid(), "frontend")
        started = time.perf_counter()
        counts = await asyncio.gather(*(read(f"run-{i}", num_tokens) for i in range(num_streams)))
        seconds = time.perf_counter() - started
        used = used_between(before, usage_by_role(os.getpid(), "frontend"))
    finally:
        engine.shutdown()
    assert counts == [num_tokens] * num_streams, "tokens were lost"
    total = num_streams * num_tokens
    return {
        "streams": num_streams,
        "tokens_per_stream": num_tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(total / seconds, 1),
        "frontend_cpu_us_per_token": round(1e6 * used["frontend"].cpu_s / total, 2),
        "core_cpu_us_per_token": round(1e6 * used["core"].cpu_s / total, 2),
        "wall_us_per_token": round(1e6 * seconds / total, 2),
    }
