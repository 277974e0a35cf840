"""Many different requests in a pool far too small for them: each gives what it gives alone."""

import random

import pytest

from frontend import LLMEngine, RequestOutput, SamplingParams
from tests.e2e.engines import load_expected, tiny_args

PROMPTS = [case.prompt_ids for case in load_expected()]


def make_requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Seeded requests: branches, stop strings, penalties, filters, log-probabilities."""
    rng = random.Random(7)
    requests = []
    for i in range(count):
        prompt = rng.choice(PROMPTS) + rng.choices(range(300, 8000), k=rng.randrange(24))
        temperature = rng.choice([0.0, 0.7, 1.0])
        n = rng.choice([1, 1, 1, 2, 3]) if temperature else 1
        params = SamplingParams(
            n=n,
            best_of=n + rng.choice([0, 0, 1]) if temperature else None,
            temperature=temperature,
            seed=i,
            max_tokens=rng.randrange(1, 64),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([-1, 20]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            stop=rng.choice([None, None, ["\n"], ["self", "return"]]),
            logprobs=rng.choice([None, None, 2]),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append((prompt, params))
    return requests


def run(
    engine: LLMEngine, requests: list[tuple[list[int], SamplingParams]], aborted: set[int]
) -> dict[int, RequestOutput]:
    """Feed the requests in over time, abort some in flight, return the finished ones."""
    rng = random.Random(11)
    waiting = list(enumerate(requests))
    finished: dict[int, RequestOutput] = {}
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), rng.randrange(1, 8))):
            i, (prompt, params) = waiting.pop(0)
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        for output in engine.step():
            i = int(output.request_id)
            if output.finished:
                finished[i] = output
            elif i in aborted:
                engine.abort_request(output.request_id)
    return finished


def what_was_said(output: RequestOutput) -> list[tuple[list[int], str, str | None]]:
    return [(list(c.token_ids), c.text, c.finish_reason) for c in output.outputs]


@pytest.mark.parametrize(
    "count",
    [pytest.param(60), pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_every_output_equals_its_solo_run_and_no_block_leaks(count: int, mode: str) -> None:
    requests = make_requests(count)
    aborted = set(range(5, count, 9))
    small = tiny_args(
        num_gpu_blocks_override=40, block_size=8, max_model_len=256, max_num_batched_tokens=256,
        preemption_mode=mode, max_num_seqs=24,
    )  # fmt: skip
    engine = LLMEngine.from_engine_args(small)
    together = run(engine, requests, aborted)
    stats = engine.get_stats()

    assert stats.num_preemptions > 0
    assert stats.num_free_gpu_blocks == 39  # all but the null block
    assert stats.num_leaked_blocks == 0

    solo = LLMEngine.from_engine_args(tiny_args(max_model_len=256, max_num_batched_tokens=256))
    for i, request in enumerate(requests):
        if i in together and i not in aborted:
            alone = run(solo, [request], set())[0]
            assert what_was_said(together[i]) == what_was_said(alone), f"request {i}"
    assert len(together) >= count - len(aborted)
