"""Hundreds of mixed requests under pressure: every output equals its solo run, nothing leaks.

The simulated executor compares every slot that a step reads with what it must hold.
"""

import random

import pytest

from engine_core.core import EngineCore
from ipc.messages import AddRequest, FinishReason, ResumedBranch
from tests.engine_core.builders import CLIENT, Rig, Setup, make_request
from tests.engine_core.simulated_executor import VOCAB_SIZE, solo_run

NUM_REQUESTS = 40  # in each of the setups below
PROMPT_STEMS = [[(stem * 13 + i * 5) % VOCAB_SIZE for i in range(96)] for stem in range(4)]


def invert(logits: list[float]) -> list[float]:
    """A user's logits processor."""
    return [-value for value in logits]


def random_request(rng: random.Random, req_id: str, max_model_len: int) -> AddRequest:
    """Prompts share stems of any length, so that prefixes are found, copied and evicted."""
    stem = rng.choice(PROMPT_STEMS)[: rng.choice([0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 64])]
    prompt = [*stem, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12)))]
    num_branches = rng.choice([1, 1, 1, 2, 3, 5])
    has_processors = rng.random() < 0.1
    params = {
        "n": 1 if rng.random() < 0.3 else num_branches,
        "best_of": num_branches,
        "seed": rng.randrange(-(2**63), 2**63),
        "max_tokens": rng.choice([1, 2, 5, 16, 17, 33, None]) if rng.random() < 0.9 else 40,
        "ignore_eos": rng.random() < 0.5,
        "stop_token_ids": rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1, 3])),
        "prompt_logprobs": rng.choice([None, None, None, 2]),
        "logprobs": rng.choice([None, None, 3]),
    }
    if params["max_tokens"] != 1 and not has_processors and rng.random() < 0.2:
        params["min_tokens"] = 2
    request = make_request(
        req_id,
        prompt,
        eos_token_ids=[rng.randrange(VOCAB_SIZE)],
        priority=rng.choice([-1, 0, 0, 3]),
        cache_salt=rng.choice([None, None, "a", "b"]),
        has_logits_processors=has_processors,
        **params,
    )
    if rng.random() < 0.15:
        return with_resumed_branches(rng, request, max_model_len)
    return request


def with_resumed_branches(rng: random.Random, request: AddRequest, limit: int) -> AddRequest:
    """The same request as a frontend sends it again after the core died."""
    process = invert if request.has_logits_processors else None
    resumed = []
    for index in range(request.params.num_branches):
        run = solo_run(request, index, limit, process)
        done = rng.randint(0, len(run.token_ids))
        resumed.append(ResumedBranch(index, run.token_ids[:done], done == len(run.token_ids)))
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return AddRequest(**{**fields, "resumed": resumed})


class Mix:
    """Adds, aborts and answers at random while the core steps."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(setup)
        self.core: EngineCore = self.rig.core
        self.aborted: set[str] = set()
        self.aborted_branches: set[tuple[str, int]] = set()

    def run(self) -> None:
        rig, rng, num_added, num_steps = self.rig, self.rng, 0, 0
        while num_added < NUM_REQUESTS or self.core.has_unfinished:
            while num_added < NUM_REQUESTS and rng.random() < 0.35:
                limit = self.core.limits.max_model_len
                request = random_request(rng, f"r{num_added}", limit)
                rig.add(request)
                self.finish_what_is_resumed_finished(request)
                num_added += 1
            self.abort_something()
            rig.step()
            if rng.random() < 0.6:
                rig.answer_logits(invert)
            num_steps += 1
            assert num_steps < 20_000, "no progress"
        rig.check_idle()

    def finish_what_is_resumed_finished(self, request: AddRequest) -> None:
        for resumed in request.resumed:
            if resumed.is_finished:
                process = invert if request.has_logits_processors else None
                limit = self.core.limits.max_model_len
                run = solo_run(request, resumed.index, limit, process)
                branch = self.rig.branch(request.req_id, resumed.index)
                branch.finish_reason, branch.stop_reason = run.finish_reason, run.stop_reason

    def abort_something(self) -> None:
        rng, rig = self.rng, self.rig
        if rng.random() < 0.03 and rig.requests:
            req_id = rng.choice(list(rig.requests))
            self.aborted.add(req_id)
            self.core.abort_requests(CLIENT, [req_id, "unknown", req_id])
        if rng.random() < 0.03 and rig.requests:
            req_id = rng.choice(list(rig.requests))
            index = rng.randrange(rig.requests[req_id].params.num_branches)
            self.aborted_branches.add((req_id, index))
            self.core.abort_branches(CLIENT, [(req_id, index), (req_id, 999)])

    def check(self) -> None:
        for req_id, request in self.rig.requests.items():
            process = invert if request.has_logits_processors else None
            for index in range(request.params.num_branches):
                run = solo_run(request, index, self.core.limits.max_model_len, process)
                branch = self.rig.branch(req_id, index)
                if req_id in self.aborted or (req_id, index) in self.aborted_branches:
                    assert branch.token_ids == run.token_ids[: len(branch.token_ids)]
                    continue
                assert branch.finish_reason is not None, f"{req_id}/{index} never ended"
                assert branch.finish_reason is not FinishReason.ERROR, branch.error
                assert branch.token_ids == run.token_ids, f"{req_id}/{index}"
                assert branch.finish_reason == run.finish_reason
                assert branch.stop_reason == run.stop_reason
                self.check_logprobs(request, index)

    def check_logprobs(self, request: AddRequest, index: int) -> None:
        branch, prompt = self.rig.branch(request.req_id, index), request.prompt_token_ids
        if request.params.logprobs is not None and not request.has_logits_processors:
            num_resumed = sum(len(r.token_ids) for r in request.resumed if r.index == index)
            own = branch.token_ids[num_resumed:]
            first = len(prompt) + num_resumed
            assert [e.token_ids[0] for e in branch.logprobs] == own
            assert [e.logprobs[0] for e in branch.logprobs] == list(range(first, first + len(own)))
        if request.params.prompt_logprobs is not None and index == 0 and not request.resumed:
            assert branch.prompt_logprobs is not None
            assert [e.token_ids[0] for e in branch.prompt_logprobs] == prompt[1:]
            assert [e.logprobs[0] for e in branch.prompt_logprobs] == list(range(1, len(prompt)))
        if index > 0:
            assert branch.prompt_logprobs is None


SETUPS = {
    "defaults, blocks of 16": Setup(block_size=16, num_gpu_blocks=41),
    "one step in flight": Setup(max_steps_in_flight=1),
    "three steps in flight, small pool": Setup(
        growth_tokens=0, max_steps_in_flight=3, num_gpu_blocks=21
    ),
    "swap, small pool": Setup(
        growth_tokens=0,
        num_gpu_blocks=21,
        num_cpu_blocks=41,
        preemption_mode="swap",
        max_steps_in_flight=3,
    ),
    "swap without prefix caching": Setup(
        growth_tokens=0,
        num_gpu_blocks=21,
        num_cpu_blocks=60,
        preemption_mode="swap",
        enable_prefix_caching=False,
    ),
    "groups swap, host memory is short": Setup(
        growth_tokens=0, num_gpu_blocks=19, num_cpu_blocks=9
    ),
    "tiny chunks": Setup(max_num_batched_tokens=16, max_num_seqs=16),
    "one budget for all, many rows": Setup(
        max_num_batched_tokens=2048, max_num_seqs=64, num_gpu_blocks=41
    ),
    "no chunked prefill": Setup(enable_chunked_prefill=False, max_num_batched_tokens=128),
    "priorities, small pool": Setup(growth_tokens=0, policy="priority", num_gpu_blocks=25),
    "sliding window": Setup(sliding_window=12, num_gpu_blocks=31),
    "sliding window, swap, three in flight": Setup(
        growth_tokens=0,
        sliding_window=17,
        num_gpu_blocks=17,
        max_num_batched_tokens=32,
        num_cpu_blocks=40,
        preemption_mode="swap",
        max_steps_in_flight=3,
    ),
    "sliding window without prefix caching": Setup(
        sliding_window=8, enable_prefix_caching=False, num_gpu_blocks=25, max_num_batched_tokens=16
    ),
    "look-ahead slots, blocks of 32": Setup(
        block_size=32, num_gpu_blocks=12, num_lookahead_slots=5, max_steps_in_flight=3
    ),
    "no prefix caching, few rows": Setup(
        enable_prefix_caching=False, max_num_seqs=3, max_steps_in_flight=3
    ),
    "sliding window, small pool": Setup(
        growth_tokens=0, sliding_window=33, num_gpu_blocks=17, max_num_batched_tokens=32
    ),
    "delay factor": Setup(delay_factor=0.5),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_output_equals_its_solo_run(name: str) -> None:
    mix = Mix(SETUPS[name], seed=len(name))
    mix.run()
    mix.check()
