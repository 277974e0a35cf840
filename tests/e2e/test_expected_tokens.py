"""The bundled model gives the oracle's tokens, however it is used and however it is planned."""

import asyncio

import pytest

from frontend import LLM, AsyncLLM, LLMEngine, RequestOutput, SamplingParams
from tests.e2e.engines import greedy, load_expected, tiny_args

EXPECTED = load_expected()


def run_engine(engine: LLMEngine, params: SamplingParams) -> dict[str, RequestOutput]:
    """Add every case, step until all are done, return the last output of each."""
    for i, case in enumerate(EXPECTED):
        engine.add_request(str(i), {"prompt_token_ids": case.prompt_ids}, params)
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    return finished


def assert_expected(outputs: dict[str, RequestOutput]) -> None:
    assert len(outputs) == len(EXPECTED)
    for i, case in enumerate(EXPECTED):
        completion = outputs[str(i)].outputs[0]
        assert list(completion.token_ids) == case.ids, case.prompt
        assert completion.finish_reason == "length"


PLANS = [
    pytest.param({"max_steps_in_flight": 1}, id="one step in flight"),
    pytest.param({"max_steps_in_flight": 3}, id="three steps in flight"),
    pytest.param({"block_size": 8}, id="blocks of 8"),
    pytest.param({"block_size": 32}, id="blocks of 32"),
    pytest.param({"max_num_batched_tokens": 16}, id="chunks of 16"),
    pytest.param({"max_num_batched_tokens": 64, "block_size": 8}, id="chunks of 64"),
    pytest.param({"enable_prefix_caching": False}, id="no prefix caching"),
    pytest.param({"enable_chunked_prefill": False}, id="no chunked prefill"),
    pytest.param(
        {"num_gpu_blocks_override": 14, "preemption_mode": "recompute", "block_size": 8},
        id="preempted, recomputed",
    ),
    pytest.param(
        {"num_gpu_blocks_override": 14, "preemption_mode": "swap", "block_size": 8},
        id="preempted, swapped",
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_planning_never_changes_tokens(plan: dict[str, object]) -> None:
    if "num_gpu_blocks_override" in plan:
        plan = plan | {"max_model_len": 96, "max_num_batched_tokens": 96}
    engine = LLMEngine.from_engine_args(tiny_args(**plan))
    outputs = run_engine(engine, greedy())

    assert_expected(outputs)
    if "preemption_mode" in plan:
        assert engine.get_stats().num_preemptions > 0


def test_stepping_in_a_process_of_its_own_gives_the_same_tokens() -> None:
    engine = LLMEngine.from_engine_args(tiny_args(), enable_multiprocessing=True)
    try:
        assert_expected(run_engine(engine, greedy()))
    finally:
        engine.shutdown()


def test_offline_batch_gives_text_tokens_and_first_log_probabilities() -> None:
    llm = LLM(**vars_of(tiny_args()))
    try:
        outputs = llm.generate([c.prompt for c in EXPECTED], greedy(logprobs=5), use_tqdm=False)
        for case, output in zip(EXPECTED, outputs, strict=True):
            completion = output.outputs[0]
            assert output.prompt_token_ids == case.prompt_ids
            assert list(completion.token_ids) == case.ids
            assert completion.text == case.text
            assert completion.logprobs is not None
            first = completion.logprobs[0]
            for token_id, logprob in case.top_logprobs.items():
                assert first[token_id].logprob == pytest.approx(logprob, abs=1e-4)
    finally:
        llm.llm_engine.shutdown()


def test_async_streams_give_the_same_tokens() -> None:
    async def run() -> None:
        engine = AsyncLLM.from_engine_args(tiny_args())

        async def read(i: int) -> None:
            case = EXPECTED[i]
            last = None
            async for output in engine.generate(case.prompt, greedy(), f"request-{i}"):
                last = output
            assert last is not None
            assert last.finished
            assert list(last.outputs[0].token_ids) == case.ids
            assert last.outputs[0].text == case.text

        try:
            await asyncio.gather(*(read(i) for i in range(len(EXPECTED))))
        finally:
            engine.shutdown()

    asyncio.run(run())


def vars_of(args: object) -> dict[str, object]:
    """The arguments that differ from their defaults, as keyword arguments of LLM."""
    default = type(args)()
    return {k: v for k, v in vars(args).items() if v != getattr(default, k)}
