"""The whole engine on one GPU: the oracle's tokens, and a real model's shape within its memory.

Figures are printed as JSON lines, so that a run leaves something to read.
"""

import json
import subprocess
import time

import pytest

from frontend import LLM, LLMEngine, SamplingParams
from tests.e2e.engines import ROOT, greedy, load_expected, tiny_args

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
EXPECTED = load_expected()
LLAMA_8B = ROOT / "scripts" / "bench_models" / "llama-8b"


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("budget", [16, 2048])
def test_tiny_model_in_float32_gives_the_oracles_tokens(steps_in_flight: int, budget: int) -> None:
    args = tiny_args(
        device="cuda",
        max_num_batched_tokens=budget,
        max_steps_in_flight=steps_in_flight,
        gpu_memory_utilization=0.1,
    )
    engine = LLMEngine.from_engine_args(args, enable_multiprocessing=True)
    try:
        for i, case in enumerate(EXPECTED):
            engine.add_request(str(i), {"prompt_token_ids": case.prompt_ids}, greedy())
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    ids = list(output.outputs[0].token_ids)
                    assert ids == EXPECTED[int(output.request_id)].ids
    finally:
        engine.shutdown()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_deterministic_engine_says_the_same_in_any_batch(steps_in_flight: int) -> None:
    prompts = [[(7 * i + j * j) % 8000 + 100 for j in range(5 + 23 * i)] for i in range(12)]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=96, ignore_eos=True, detokenize=False)
        for i, t in enumerate([0.0, 1.0] * 6)
    ]

    def run(**changes: int | bool) -> list[list[int]]:
        args = tiny_args(
            dtype="bfloat16", device="cuda", deterministic=True, load_format="dummy",
            max_steps_in_flight=steps_in_flight, **changes,
        )  # fmt: skip
        llm = LLM.from_engine(LLMEngine.from_engine_args(args, enable_multiprocessing=False))
        try:
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]
        finally:
            llm.llm_engine.shutdown()

    alone = run(max_num_seqs=1)
    assert run(max_num_seqs=16) == alone
    small = run(
        max_num_seqs=8, enable_chunked_prefill=True, max_num_batched_tokens=64,
        num_gpu_blocks_override=64, enable_prefix_caching=False,
    )  # fmt: skip
    assert small == alone, "in chunks, and with preemptions"


def used_bytes() -> int:
    """Device memory in use by every process, as the driver counts it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(query).split()[0]) * 2**20


def test_8b_shape_serves_64_requests_within_its_planned_memory() -> None:
    before = used_bytes()
    started = time.perf_counter()
    args = tiny_args(
        model=str(LLAMA_8B), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
        device="cuda", max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=8192,
        gpu_memory_utilization=0.9,
    )  # fmt: skip
    engine = LLMEngine.from_engine_args(args, enable_multiprocessing=True)
    try:
        ready_s = time.perf_counter() - started
        params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True, detokenize=False)
        for i in range(64):
            prompt = [1000 + (i * 131 + j * 17) % 90_000 for j in range(512)]
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        started, num_steps, num_tokens, peak = time.perf_counter(), 0, 0, 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            num_steps += bool(outputs)
            num_tokens += sum(len(o.outputs[0].token_ids) for o in outputs if o.finished)
            if num_steps % 32 == 0:
                peak = max(peak, used_bytes())
        seconds = time.perf_counter() - started
    finally:
        engine.shutdown()
    total = int(
        subprocess.check_output(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        ).split()[0]
    )
    planned = 0.9 * total * 2**20
    used = peak - before
    print(
        json.dumps(
            {
                "ready_s": round(ready_s, 2), "seconds": round(seconds, 3), "steps": num_steps,
                "tok_s": round(num_tokens / seconds, 1),
                "ms_per_step": round(1e3 * seconds / num_steps, 3),
                "planned_gib": round(planned / 2**30, 2), "used_gib": round(used / 2**30, 2),
            }
        )
    )  # fmt: skip
    assert num_tokens == 64 * 128
    assert used == pytest.approx(planned, rel=0.05)
