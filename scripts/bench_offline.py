"""Offline measurements: latency of N requests at once, throughput of many, and a peer beside them.

The peer is ``transformers.generate`` with the same work, dtype and threads in the same run.
"""

import itertools
import time
from typing import Any

from bench_workload import Work

from frontend import LLM, EngineArgs, LLMEngine, SamplingParams

Result = dict[str, Any]


def measure_latency(args: dict[str, Any], work: Work, *, in_process: bool) -> Result:
    """Step the engine by hand; the steady state runs from everyone's first token to the first end.

    Returns milliseconds per step (mean, p50, p99) and output tokens per second of the steady
    state and of the whole run.
    """
    engine = LLMEngine.from_engine_args(EngineArgs(**args), enable_multiprocessing=not in_process)
    try:
        _run_engine(engine, Work(prompts=work.prompts, output_lens=[8] * len(work.prompts)), "warm")
        return _run_engine(engine, work, "run")
    finally:
        engine.shutdown()


def _run_engine(engine: LLMEngine, work: Work, name: str) -> Result:
    started = time.perf_counter()
    for i, (prompt, output_len) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        params = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, params)
    num_seen: dict[str, int] = {}
    arrivals: list[tuple[float, int]] = []  # (time, tokens that arrived)
    all_started = first_end = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        num_new = 0
        for output in outputs:
            num_tokens = len(output.outputs[0].token_ids)
            num_new += num_tokens - num_seen.get(output.request_id, 0)
            num_seen[output.request_id] = num_tokens
            if output.finished and first_end is None:
                first_end = now
        if all_started is None and len(num_seen) == len(work.prompts):
            all_started = now
        if num_new:
            arrivals.append((now, num_new))
    ended = time.perf_counter()
    assert all_started is not None, "no request produced a token"
    assert first_end is not None, "no request finished"
    return _steady(arrivals, all_started, first_end) | {
        "requests": len(work.prompts),
        "output_tokens": sum(num_seen.values()),
        "seconds": round(ended - started, 3),
        "tok_s": round(sum(num_seen.values()) / (ended - started), 1),
    }


def _steady(arrivals: list[tuple[float, int]], start: float, end: float) -> Result:
    inside = [(t, n) for t, n in arrivals if start < t <= end]
    if not inside:
        return {}
    times = [start] + [t for t, _ in inside]
    gaps_ms = sorted(1e3 * (b - a) for a, b in itertools.pairwise(times))
    return {
        "steady_tok_s": round(sum(n for _, n in inside) / (times[-1] - start), 1),
        "step_ms_mean": round(sum(gaps_ms) / len(gaps_ms), 3),
        "step_ms_p50": round(gaps_ms[len(gaps_ms) // 2], 3),
        "step_ms_p99": round(gaps_ms[int(0.99 * (len(gaps_ms) - 1))], 3),
    }


def measure_throughput(args: dict[str, Any], work: Work, *, in_process: bool) -> Result:
    """All requests submitted at once through ``LLM.generate``, after a short warm-up."""
    llm = (
        LLM.from_engine(LLMEngine.from_engine_args(EngineArgs(**args)))
        if in_process
        else LLM(**args)
    )
    try:
        llm.generate(
            prompt_token_ids=work.prompts[:8],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
            use_tqdm=False,
        )
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in work.output_lens
        ]
        started = time.perf_counter()
        outputs = llm.generate(
            prompt_token_ids=work.prompts, sampling_params=params, use_tqdm=False
        )
        seconds = time.perf_counter() - started
    finally:
        llm.llm_engine.shutdown()
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert num_tokens == work.num_output_tokens, f"{num_tokens} tokens came back"
    return {
        "requests": len(work.prompts),
        "input_tokens": work.num_input_tokens,
        "output_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(num_tokens / seconds, 1),
    }


def measure_hugging_face(model_path: str, dtype: str, device: str, work: Work) -> Result:
    """The peer: one padded batch through ``transformers.generate``, counted by the tokens wanted.

    Static batching runs until the longest request ends; what a short one computes after its own
    end was not asked for and does not count.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    width = max(len(prompt) for prompt in work.prompts)
    ids = torch.full((len(work.prompts), width), 3, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(work.prompts):  # padded on the left: new tokens follow at once
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    num_new = max(work.output_lens)
    options: dict[str, Any] = {
        "attention_mask": mask.to(device),
        "do_sample": False,
        "pad_token_id": 3,
    }
    with torch.inference_mode():
        model.generate(ids.to(device), max_new_tokens=4, min_new_tokens=4, **options)
        started = time.perf_counter()
        model.generate(ids.to(device), max_new_tokens=num_new, min_new_tokens=num_new, **options)
        seconds = time.perf_counter() - started
    return {
        "requests": len(work.prompts),
        "output_tokens": work.num_output_tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(work.num_output_tokens / seconds, 1),
        "threads": torch.get_num_threads(),
    }
