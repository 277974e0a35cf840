"""A seeded request gives its own tokens, whoever runs beside it and whatever happens to it."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from frontend import LLMEngine, SamplingParams
from tests.e2e.engines import load_expected, tiny_args

PROMPT = load_expected()[0].prompt_ids
MAX_TOKENS = 48
OBSERVED = "observed"


def seeded(**overrides: object) -> SamplingParams:
    """Sampling with everything on that could depend on others."""
    options: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "seed": 1234,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "logprobs": 1,
    }
    return SamplingParams(**(options | overrides))


Requests = Sequence[tuple[list[int], SamplingParams]]


def make_mates(count: int) -> Requests:
    """Requests that differ in everything, unseeded ones and branches among them."""
    rng = random.Random(count)
    mates = []
    for _ in range(count):
        prompt = rng.choices(range(300, 8000), k=rng.randrange(1, 60))
        params = SamplingParams(
            n=rng.choice([1, 1, 2]),
            temperature=rng.choice([0.7, 1.5]),
            top_p=rng.choice([1.0, 0.5]),
            seed=rng.choice([None, 1234]),
            max_tokens=rng.randrange(1, 40),
            ignore_eos=True,
        )
        mates.append((prompt, params))
    return mates


def make_growing_mates(count: int) -> Requests:
    """Requests that begin small and take ever more memory from whoever is newer."""
    params = SamplingParams(seed=1, max_tokens=100, ignore_eos=True)
    return [([300 + i], params) for i in range(count)]


Said = list[tuple[list[int], list[float]]]  # per branch: token ids and their log-probabilities


def observe(
    engine: LLMEngine,
    *,
    before: Requests = (),
    after: Requests = (),
    params: SamplingParams | None = None,
) -> Said:
    """Run the observed request behind some mates, which run already, and ahead of others."""
    for i, mate in enumerate(before):
        engine.add_request(f"before-{i}", {"prompt_token_ids": mate[0]}, mate[1])
    if before:
        engine.step()
    engine.add_request(OBSERVED, {"prompt_token_ids": PROMPT}, params or seeded())
    for i, mate in enumerate(after):
        engine.add_request(f"after-{i}", {"prompt_token_ids": mate[0]}, mate[1])
    said: Said = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == OBSERVED and output.finished:
                for completion in output.outputs:
                    ids = list(completion.token_ids)
                    chosen = zip(ids, completion.logprobs or [], strict=True)
                    said.append((ids, [position[i].logprob for i, position in chosen]))
    return said


def make_engine(**overrides: object) -> LLMEngine:
    limits = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 40}
    return LLMEngine.from_engine_args(tiny_args(**(limits | overrides)))


@cache
def ample_engine() -> LLMEngine:
    """Memory for everybody; shared, so that what others left in its cache is tested as well."""
    return make_engine()


@cache
def said_alone() -> Said:
    return observe(ample_engine())


@pytest.mark.parametrize("num_mates", [0, 1, 7, 31])
def test_mates_change_neither_tokens_nor_log_probabilities(num_mates: int) -> None:
    assert len(said_alone()[0][0]) == MAX_TOKENS
    mates = make_mates(num_mates)
    said = observe(ample_engine(), before=mates[::2], after=mates[1::2])
    assert said == said_alone()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_changes_nothing(mode: str, n: int) -> None:
    engine = make_engine(num_gpu_blocks_override=24, block_size=8, preemption_mode=mode)
    params = seeded(n=n)
    said = observe(engine, before=make_growing_mates(3), params=params)
    stats = engine.get_stats()
    assert stats.num_preemptions > 0  # of the newest: the observed one
    assert stats.num_free_gpu_blocks == 23
    # Computing again sums in another order, so the last digits of log-probabilities may differ.
    for (ids, logprobs), (solo_ids, solo_logprobs) in zip(
        said, observe(ample_engine(), params=params), strict=True
    ):
        assert ids == solo_ids
        assert logprobs == pytest.approx(solo_logprobs, abs=1e-4)


def test_another_seed_says_something_else() -> None:
    assert observe(ample_engine(), params=seeded(seed=1235)) != said_alone()
