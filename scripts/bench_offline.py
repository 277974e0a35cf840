"""Offline measurements on an engine that runs: decode, throughput, prefill, a shared prefix.

Times are taken in the caller's process, where tokens arrive as deltas. The peer is
``transformers.generate`` with the same work, dtype and threads in the same run.
"""

import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_workload import Work

from frontend import LLM, EngineArgs, LLMEngine, SamplingParams
from ipc.sampling_params import RequestOutputKind

Result = dict[str, Any]
_numbers = itertools.count()  # request names are unique in a process


@dataclass(slots=True)
class Timeline:
    """What arrived when, of requests submitted together. Times are ``time.perf_counter()``."""

    started_s: float
    first_token_s: dict[str, float] = field(default_factory=dict)  # by request
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # time, new tokens
    first_end_s: float = 0.0
    ended_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """All tokens that arrived."""
        return sum(num_new for _, num_new in self.arrivals)

    @property
    def ttft_ms(self) -> list[float]:
        """Each request's first token, from before the first submission; in rising order."""
        return sorted(1e3 * (t - self.started_s) for t in self.first_token_s.values())


def run_requests(engine: LLMEngine, work: Work) -> Timeline:
    """Submit everything, step until all of it has ended."""
    timeline = Timeline(time.perf_counter())
    for prompt, output_len in zip(work.prompts, work.output_lens, strict=True):
        add_request(engine, prompt, output_len)
    while engine.has_unfinished_requests():
        follow_step(engine, timeline)
    timeline.ended_s = time.perf_counter()
    assert timeline.num_tokens == work.num_output_tokens, f"{timeline.num_tokens} tokens came"
    return timeline


def add_request(engine: LLMEngine, prompt: list[int], output_len: int) -> str:
    """Submit one greedy request that generates exactly ``output_len`` tokens; its name."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    name = f"bench-{next(_numbers)}"
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    return name


def follow_step(engine: LLMEngine, timeline: Timeline) -> None:
    """Await one step's outputs and note them."""
    outputs = engine.step()
    now = time.perf_counter()
    num_new = 0
    for output in outputs:
        num_new += len(output.outputs[0].token_ids)
        timeline.first_token_s.setdefault(output.request_id, now)
        if output.finished and not timeline.first_end_s:
            timeline.first_end_s = now
    if num_new:
        timeline.arrivals.append((now, num_new))


def measure_decode(engine: LLMEngine, work: Work) -> Result:
    """N requests at once, after a few steps of the same; steady from all begun to the first end."""
    run_requests(engine, Work(prompts=work.prompts, output_lens=[4] * len(work.prompts)))
    timeline = run_requests(engine, work)
    seconds = timeline.ended_s - timeline.started_s
    return _steady(timeline, len(work.prompts)) | {
        "ttft_ms_last": round(timeline.ttft_ms[-1], 2),
        "seconds": round(seconds, 3),
        "tok_s": round(timeline.num_tokens / seconds, 1),
        "output_tokens": timeline.num_tokens,
    }


def _steady(timeline: Timeline, batch: int) -> Result:
    start = max(timeline.first_token_s.values())
    inside = [(t, n) for t, n in timeline.arrivals if start < t <= timeline.first_end_s]
    if not inside:  # the last one began when the first one had ended
        return {}
    times = [start] + [t for t, _ in inside]
    gaps_ms = sorted(1e3 * (b - a) for a, b in itertools.pairwise(times))
    tok_s = sum(n for _, n in inside) / (times[-1] - start)
    return {
        "steady_tok_s": round(tok_s, 1),
        "step_ms_mean": round(1e3 * batch / tok_s, 3),
        "step_ms_p50": round(percentile(gaps_ms, 50), 3),
        "step_ms_p99": round(percentile(gaps_ms, 99), 3),
    }


def percentile(values: list[float], percent: float) -> float:
    """The value at this rank of at least one; no interpolation."""
    values = sorted(values)
    return values[round(percent / 100 * (len(values) - 1))]


def measure_throughput(engine: LLMEngine, work: Work) -> Result:
    """All requests submitted at once through ``LLM.generate``."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in work.output_lens
    ]
    llm = LLM.from_engine(engine)
    started = time.perf_counter()
    outputs = llm.generate(prompt_token_ids=work.prompts, sampling_params=params, use_tqdm=False)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert num_tokens == work.num_output_tokens, f"{num_tokens} tokens came back"
    return {
        "requests": len(work.prompts),
        "input_tokens": work.num_input_tokens,
        "output_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tok_s": round(num_tokens / seconds, 1),
        "total_tok_s": round((num_tokens + work.num_input_tokens) / seconds, 1),
    }


def measure_prefill(engine: LLMEngine, work: Work, repeats: int = 3) -> Result:
    """Time to the last request's first token: the median of several, after one for warmth."""
    runs = [run_requests(engine, work).ttft_ms[-1] for _ in range(repeats + 1)][1:]
    ttft_ms = statistics.median(runs)
    return {
        "ttft_ms": round(ttft_ms, 2),
        "ttft_ms_all": [round(each, 2) for each in runs],
        "prompt_tok_s": round(1e3 * work.num_input_tokens / ttft_ms, 1),
    }


def measure_prefix(engine: LLMEngine, work: Work) -> Result:
    """Requests that share a prefix, which is in the cache or not as the caller arranged."""
    timeline = run_requests(engine, work)
    seconds = timeline.ended_s - timeline.started_s
    return {
        "ttft_ms_p50": round(percentile(timeline.ttft_ms, 50), 1),
        "ttft_ms_max": round(timeline.ttft_ms[-1], 1),
        "seconds": round(seconds, 3),
        "tok_s": round(timeline.num_tokens / seconds, 1),
    }


def open_engine(args: dict[str, Any], *, in_process: bool = False) -> LLMEngine:
    """An engine, with processes of its own unless told otherwise."""
    return LLMEngine.from_engine_args(EngineArgs(**args), enable_multiprocessing=not in_process)


def measure_hugging_face(model_path: str, dtype: str, device: str, work: Work) -> Result:
    """The peer: one padded batch through ``transformers.generate``, counted by the tokens wanted.

    Static batching runs until the longest request ends; what a short one computes after its own
    end was not asked for and does not count.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(Path(model_path).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    else:  # a shape alone: random weights, as ours are then
        config = AutoConfig.from_pretrained(model_path)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
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
