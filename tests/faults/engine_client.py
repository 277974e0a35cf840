"""The same histories over ``AsyncLLM``: no HTTP between the oracle and the engine."""

import asyncio
import os
import threading
import time
from typing import Any

import psutil

from frontend import AsyncLLM, SamplingParams
from ipc.sampling_params import RequestOutputKind
from tests.faults.history import History
from tests.faults.oracles import Holdings


async def listen(engine: AsyncLLM, name: str, prompt: Any, params: SamplingParams) -> History:
    """Read one request to its end. Cumulative outputs must never take anything back."""
    body = {"stream": True, "n": params.n, "max_tokens": params.max_tokens, "stop": params.stop}
    history = History(name, "AsyncLLM", body, started_s=time.monotonic(), status=200)
    try:
        async for output in engine.generate(prompt, params, name):
            history.event_times_s.append(time.monotonic())
            history.num_after_done += history.num_done
            history.answer_ids.add(output.request_id)
            for part in output.outputs:
                _take(history, part, is_delta=params.output_kind is RequestOutputKind.DELTA)
            history.num_done += output.finished
    except Exception as err:  # whatever the engine raises is evidence
        history.errors.append(f"{type(err).__name__}: {err}")
    # AsyncLLM tells no usage: what came is what it counts.
    history.usages.append({"completion_tokens": history.num_tokens})
    history.ended_s = time.monotonic()
    return history


def _take(history: History, part: Any, *, is_delta: bool) -> None:
    branch = history.branch(part.index)
    ids, text = list(part.token_ids), part.text
    if not is_delta:
        known, told = branch.token_ids, branch.text
        if ids[: len(known)] != known or not text.startswith(told):
            history.contradictions.append(f"choice {part.index}: output takes something back")
        ids, text = ids[len(known) :], text[len(told) :]
    if branch.finish_reasons and (ids or text):
        branch.num_after_finish += 1
    branch.token_ids += ids
    branch.text += text
    if part.finish_reason is not None and not branch.finish_reasons:
        branch.finish_reasons.append(part.finish_reason)
        branch.num_after_finish = 0


async def holdings(engine: AsyncLLM) -> Holdings:
    """What the engine and this process hold now; cached prefixes are dropped first."""
    await engine.reset_prefix_cache()
    stats = await engine.get_stats()
    session = await engine._ready()
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    in_use = stats.num_gpu_blocks - stats.num_free_gpu_blocks
    return Holdings(
        running=stats.num_running,
        waiting=stats.num_waiting + stats.num_swapped,
        leaked_blocks=stats.num_leaked_blocks + stats.num_cached_blocks,
        blocks_in_use=in_use + stats.num_cpu_blocks - stats.num_free_cpu_blocks,
        journal=len(session.outputs.journal) + session.outputs.num_open,
        tasks=len(asyncio.all_tasks()),
        fds=sum(p.num_fds() for p in tree),
        threads=threading.active_count(),
        processes=len(tree),
        shared_memory=len(os.listdir("/dev/shm")),
    )


async def idle_holdings(engine: AsyncLLM, limit_s: float = 5.0) -> Holdings:
    """What is still held when idle: waits for open requests to end, not for anything else."""
    deadline = time.monotonic() + limit_s
    while True:
        now = await holdings(engine)
        if not (now.running or now.waiting or now.journal) or time.monotonic() >= deadline:
            await asyncio.sleep(0.2)
            return await holdings(engine)
        await asyncio.sleep(0.1)
