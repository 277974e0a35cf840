"""Runs in which clients misbehave or ask too much: D06, D07, D12, D18, D19, D20."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from frontend import AsyncLLM
from tests.e2e.engines import greedy, load_expected, tiny_args
from tests.faults import engine_client, oracles
from tests.faults.history import History
from tests.faults.http_client import Ask, ask, ask_all
from tests.faults.mixed_traffic import (
    a_prompt,
    canaries,
    completion,
    decode,
    encode,
    mixed,
    streams,
    undisturbed,
)
from tests.faults.outcomes import Outcome, percentile
from tests.faults.server_tree import Server, serving

AT_ONCE = 64
NUM_CANARIES = 500


def by_name(histories: Sequence[History]) -> dict[str, History]:
    """A reference run."""
    return {history.name: history for history in histories}


def integrity(histories: Sequence[History]) -> list[str]:
    """O1 of all."""
    return [words for h in histories for words in oracles.check_integrity(h, decode)]


async def check_well(
    server: Server, reference: dict[str, History], core: int, outcome: Outcome, count: int
) -> None:
    """O5: the same core, and canaries that are right."""
    histories = await ask_all(server.port, canaries(count), at_once=16)
    found = oracles.check_well(histories, reference, decode)
    found += oracles.check_same_process([core], [server.core_pid()])
    outcome.none_of(f"O5: same core, {count} canaries", found)


async def reference_canaries(server: Server) -> dict[str, History]:
    """What each kind of canary is answered by a fresh engine."""
    return by_name(await ask_all(server.port, canaries(20), at_once=4))


async def d06_disconnects(count: int = 10_000, seed: int = 0) -> Outcome:
    """Half of the clients leave at a random time; the others must not notice, nothing may stay."""
    outcome = Outcome("D06", f"{count} requests, half of them left, mixed, seed {seed}")
    requests = mixed("d06-", count, seed=seed, share_leaving=0.5)
    with serving("--max-num-seqs", str(AT_ONCE), "--max-waiting-requests", "4096") as server:
        healthy = await reference_canaries(server)
        core, before = server.core_pid(), server.holdings()
        histories = await ask_all(server.port, requests, at_once=AT_ONCE)
        after = server.idle_holdings(before)
        # Every tenth of the others is compared with an undisturbed run: the run costs as much.
        stayed = [r.name for r, h in zip(requests, histories, strict=True) if not h.is_cut]
        chosen = set(stayed[:: max(1, len(stayed) // 1000)])
        again = [r for r in undisturbed(requests) if r.name in chosen]
        reference = by_name(await ask_all(server.port, again, at_once=8))
        await check_well(server, healthy, core, outcome, min(NUM_CANARIES, count))
    outcome.none_of("O1 of all streams", integrity(histories))
    compared = [h for h in histories if h.name in chosen]
    found = oracles.check_equality(compared, reference)
    outcome.none_of(f"O2 of {len(compared)} whole answers", found)
    outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
    outcome.at_least("clients that left", sum(h.is_cut for h in histories), count / 8)
    return outcome


async def d07_aborts(  # noqa: PLR0915
    count: int = 10_000, seed: int = 0
) -> Outcome:
    """Aborts at every state, doubled, and of unknown ids, while other streams go on."""
    outcome = Outcome("D07", f"{count} aborts beside 8 streams, seed {seed}")
    rng = random.Random(seed)
    engine = AsyncLLM.from_engine_args(
        tiny_args(max_num_seqs=16, num_gpu_blocks_override=64, max_waiting_requests=4096)
    )
    cases = load_expected()
    states: Counter[str] = Counter()

    async def victim(i: int) -> None:
        """One request that is aborted after a while, or at once, or when it has ended."""
        params = greedy(rng.randrange(1, 40))
        prompt = {"prompt": a_prompt(rng) * rng.choice([1, 1, 8])}
        name = f"victim-{i}"
        reading = asyncio.create_task(engine_client.listen(engine, name, prompt, params))
        pause = rng.choice([0.0, 0.0, rng.uniform(0, 0.2), None])
        await (asyncio.wait([reading]) if pause is None else asyncio.sleep(pause))
        states["ended" if reading.done() else "open"] += 1
        await engine.abort(name)
        await engine.abort([name, f"unknown-{i}", name])
        history = await reading
        ends = {r for branch in history.branches.values() for r in branch.finish_reasons}
        assert ends <= {"abort", "length"}, f"{name}: {ends}"

    async def others() -> list[History]:
        listening = [
            engine_client.listen(
                engine, f"other-{i}", {"prompt_token_ids": cases[i].prompt_ids}, greedy(32)
            )
            for i in range(8)
        ]
        return list(await asyncio.gather(*listening))

    wanted: list[list[int]] = [case.ids for case in cases[:8]]
    try:
        await others()
        before = await engine_client.idle_holdings(engine)
        found: list[str] = []
        slots = asyncio.Semaphore(48)

        async def bounded(i: int) -> None:
            async with slots:
                await victim(i)

        storm = asyncio.gather(*map(bounded, range(count // 4)))  # each is aborted four times
        while True:
            found += [
                f"O2 {h.name}: wrong tokens"
                for h, ids in zip(await others(), wanted, strict=True)
                if h.branches[0].token_ids != ids
            ]
            if storm.done():
                break
        await storm
        after = await engine_client.idle_holdings(engine)
        outcome.none_of("O2 of the others", found)
        outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
        outcome.at_least("aborted while open", states["open"], count / 40)
        outcome.at_least("aborted when ended", states["ended"], 1)
    finally:
        engine.shutdown()
    return outcome


async def d12_burst(count: int = 10_000, queue: int = 1000) -> Outcome:
    """Many more requests at once than may wait: refusals at once, with advice; the rest finish."""
    outcome = Outcome("D12", f"{count} requests at once on a queue of {queue}")
    running = max(1, queue // 16)
    flags = ("--max-num-seqs", str(running), "--max-waiting-requests", str(queue))
    with serving(*flags) as server:
        await ask_all(server.port, streams("w", 4, 8), at_once=4)
        rss = server.rss_bytes()
        requests = [completion(f"d12-{i}", "Hello", 8, stream=False) for i in range(count)]
        histories = await ask_all(server.port, requests, at_once=count)
        grown = server.rss_bytes() - rss
    refused = [h for h in histories if h.status == 429]
    advice = [int(h.headers.get("retry-after", "0")) for h in refused]
    waits = [h.ended_s - h.started_s for h in refused]
    outcome.at_least("refused with 429", len(refused), 0.8 * count)
    outcome.at_least("least Retry-After", min(advice, default=0), 1, "s")
    outcome.at_most("greatest Retry-After", max(advice, default=0), 60, "s")
    outcome.at_most("p99 until refused", percentile(waits, 0.99) * 1e3, 100, "ms")
    outcome.at_most("memory grown", grown / 2**20, 200, "MiB")
    outcome.none_of("O1 of those accepted", integrity([h for h in histories if h.status != 429]))
    return outcome


async def d18_pressure(count: int = 2000, seed: int = 0) -> Outcome:
    """Three times the KV cache is asked for: everyone finishes, and nobody starves."""
    outcome = Outcome("D18", f"{count} requests for 3x the KV cache, seed {seed}")
    blocks, running = 64, 32
    rng = random.Random(seed)
    tokens = 3 * blocks * 16 // running  # of each of those that run
    requests = [
        completion(f"d18-{i}", a_prompt(rng), rng.randrange(tokens // 2, tokens))
        for i in range(count)
    ]
    flags = ("--num-gpu-blocks-override", str(blocks), "--max-num-seqs", str(running))
    with serving(*flags, "--max-waiting-requests", str(count)) as server:
        before = server.holdings()
        histories = await ask_all(server.port, requests, at_once=min(count, 256))
        preemptions = server.metrics()["num_preemptions_total"]
        after = server.idle_holdings(before)
    outcome.none_of("O1 of all streams", integrity(histories))
    outcome.none_of("O4 when idle", oracles.check_leaks(before, after))
    outcome.at_most("preemptions per request, mean", preemptions / count, 8)
    outcome.at_least("preemptions", preemptions, 1)
    outcome.at_most("longest time without a token", longest_silence(histories), 1.0, "s")
    return outcome


def longest_silence(histories: Sequence[History]) -> float:
    """The longest time between two tokens of any stream, while a stream was open."""
    times = sorted(t for h in histories for t in h.event_times_s)
    return max((b - a for a, b in pairwise(times)), default=0.0)


async def d19_impossible(count: int = 200) -> Outcome:
    """Requests that can never fit are refused at once; their neighbours go on."""
    outcome = Outcome("D19", f"{count} impossible requests beside 8 streams")
    with serving("--num-gpu-blocks-override", "32", "--max-model-len", "400") as server:
        neighbours = streams("n", 8, 40)
        reference = by_name(await ask_all(server.port, neighbours, at_once=8))
        running = asyncio.create_task(ask_all(server.port, neighbours, at_once=8))
        kinds = [
            completion("long prompt", [5] * 401, 4),
            completion("longer than any cache", [5] * 4000, 4),
            completion("max_tokens too big", "Hello", 10_000),
            completion("both too long together", [5] * 390, 40),
        ]
        histories = [await ask(server.port, kinds[i % len(kinds)]) for i in range(count)]
        others = await running
    outcome.none_of("O2 of the neighbours", oracles.check_equality(others, reference))
    wrong = [f"{h.name}: status {h.status}" for h in histories if h.status != 400 or not h.errors]
    outcome.none_of("answers that are no 400 with words", wrong)
    waits = [h.ended_s - h.started_s for h in histories]
    outcome.at_most("p99 until refused", percentile(waits, 0.99) * 1e3, 100, "ms")
    return outcome


async def d20_characters(count: int = 2000, seed: int = 0) -> Outcome:
    """Outputs of bytes in any order, and prompts that end inside a character."""
    outcome = Outcome("D20", f"{count} prompts and outputs of partial characters, seed {seed}")
    rng = random.Random(seed)
    texts = [
        "\U0001f642 \U0001f680\u200d\U0001f469",
        "\u4e16\u754c\u3053\u3093",
        "\u0623\u0647\u0644",
        "e\u0301\u00fc",
    ]
    requests: list[Ask] = []
    for i in range(count):
        ids = encode(rng.choice(texts) + a_prompt(rng) + rng.choice(texts))
        cut = ids[: rng.randrange(1, len(ids) + 1)]
        bias = {str(t): 12.0 for t in rng.sample(range(10, 266), 24)}  # single bytes and the like
        request = completion(
            f"d20-{i}", cut, 24, logit_bias=bias, temperature=1.0, seed=rng.randrange(2**31)
        )
        if i % 3 == 0:
            request = replace(request, body={**request.body, "stream": False})
            request.body.pop("stream_options")  # type: ignore[attr-defined]
        requests.append(request)
    with serving("--max-num-seqs", "64") as server:
        started = time.monotonic()
        histories = await ask_all(server.port, requests, at_once=64)
        seconds = time.monotonic() - started
    outcome.none_of("O1: text is that of its ids", integrity(histories))
    broken = sum("\ufffd" in b.text for h in histories for b in h.branches.values())
    outcome.at_least("outputs with bytes that are no text", broken, count / 100)
    outcome.at_least("streams per second", count / seconds, 0.0)
    return outcome
