"""Where the time of a step goes: GPU kernels, gaps, and every process's CPU time.

Decode steps, in their steady state, are first timed and the processes weighed as they are; then as
many are recorded by the worker's profiler, which slows the CPU down. So the idle share is told
twice: within the trace, and as the part of an unrecorded step that the recorded kernels do not
fill. Of prompts, sent one after the other, the steps are recorded alone.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_offline
import bench_workload
from bench_gpu import DEFAULT_OUTPUT, parse_setting
from bench_model import find_model
from bench_offline import Timeline
from bench_processes import Usage, usage_by_role, used_between
from bench_record import Recorder, describe_run
from bench_trace import Breakdown, Share, break_down, read_spans
from bench_workload import FULL

from frontend import LLMEngine

Result = dict[str, Any]
SETTLE_STEPS = 12  # after the last request's first token
SPARE_STEPS = (
    1000  # that requests could live on: a core may be far ahead of a busy machine's reader
)
TOP_KERNELS = 16
WARM_PROMPTS = 4
TRACED_PROMPTS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a profile."""
    add = parser.add_argument
    add("--model", default="llama-8b", help="a model's name or directory")
    add("--batch", type=int, nargs="*", default=[32], help="decode steps of so many requests")
    add("--prompt", type=int, nargs="*", default=[], metavar="TOKENS", help="prompts so long")
    add("--input-len", type=int, default=128)
    add("--steps", type=int, default=64, help="to time without the profiler")
    add("--traced-steps", type=int, default=32, help="to record")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="file that JSON lines are appended to")
    add("--traces", type=Path, help="keep the traces in this directory")
    add("--commit", help="recorded with the results; unset: what git says")
    add("--engine-arg", action="append", default=[], metavar="NAME=VALUE")


def run(args: argparse.Namespace) -> int:
    """Profile each batch on one engine."""
    model = find_model(args.model)
    recorder = Recorder(args.output, describe_run(args.commit))
    engine = bench_offline.open_engine(
        {
            "model": str(model.path),
            "load_format": model.load_format,
            "device": args.device,
            "max_model_len": model.max_model_len,
            "max_seq_len_to_capture": model.max_model_len,
            "max_num_seqs": FULL.max_num_seqs,
            "max_num_batched_tokens": FULL.offline_tokens,
            "gpu_memory_utilization": 0.92,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        | dict(map(parse_setting, args.engine_arg))
    )
    try:
        bench_offline.run_requests(engine, bench_workload.fixed(1, 32, 8, model.id_range))
        time.sleep(FULL.settle_s)
        for batch in args.batch:
            with tempfile.TemporaryDirectory(prefix="bench-trace-") as directory:
                traces = (args.traces or Path(directory)) / f"b{batch}"
                figures = profile_decode(engine, model.id_range, batch, traces, args)
            recorder.add(f"profile.b{batch}", figures, model=model.name)
        for length in args.prompt:
            with tempfile.TemporaryDirectory(prefix="bench-trace-") as directory:
                traces = (args.traces or Path(directory)) / f"prompt{length}"
                figures = profile_prompts(engine, model.id_range, length, traces)
            recorder.add(f"profile.prompt{length}", figures, model=model.name)
    finally:
        engine.shutdown()
    return 0


def profile_decode(
    engine: LLMEngine,
    id_range: tuple[int, int],
    batch: int,
    traces: Path,
    args: argparse.Namespace,
) -> Result:
    """Run ``batch`` requests into their steady state, time steps, record steps, print a table."""
    output_len = SETTLE_STEPS + args.steps + args.traced_steps + SPARE_STEPS
    work = bench_workload.fixed(batch, args.input_len, output_len, id_range)
    timeline = Timeline(time.perf_counter())
    names = [bench_offline.add_request(engine, prompt, output_len) for prompt in work.prompts]
    while len(timeline.first_token_s) < batch:
        bench_offline.follow_step(engine, timeline)
    _follow(engine, timeline, SETTLE_STEPS)
    before = usage_by_role(os.getpid(), "frontend")
    step_us, num_steps = _follow(engine, timeline, args.steps)
    used = used_between(before, usage_by_role(os.getpid(), "frontend"))
    num_traced, (trace,) = _record(engine, timeline, traces, args.traced_steps)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    breakdown = break_down(read_spans(Path(trace)), num_traced)
    cpu_us = {role: _per_step(usage, num_steps) for role, usage in used.items()}
    _print(batch, step_us, cpu_us, breakdown)
    return _figures(step_us, cpu_us, breakdown)


def profile_prompts(
    engine: LLMEngine, id_range: tuple[int, int], length: int, traces: Path
) -> Result:
    """Record prompts of one length, one at a time; print a table of their steps."""
    work = bench_workload.fixed(1, length, 1, id_range)
    for _ in range(WARM_PROMPTS):
        unrecorded = bench_offline.run_requests(engine, work)
    num_before = engine.get_stats().num_steps
    engine.start_profile(str(traces))
    for _ in range(TRACED_PROMPTS):
        bench_offline.run_requests(engine, work)
    num_steps = engine.get_stats().num_steps - num_before
    (trace,) = engine.stop_profile()
    breakdown = break_down(read_spans(Path(trace)), num_steps)
    ttft_us = 1e3 * unrecorded.ttft_ms[-1]
    print(f"\nprompt of {length}: first token after {ttft_us:.0f} us without the recorder")
    _print_breakdown(breakdown)
    return {"ttft_ms": round(ttft_us / 1e3, 3)} | _breakdown_figures(breakdown)


def _follow(engine: LLMEngine, timeline: Timeline, num_messages: int) -> tuple[float, float]:
    """Await this many messages of a steady state; microseconds a step, and how many steps."""
    start, num_before = timeline.arrivals[-1][0], timeline.num_tokens
    target = len(timeline.arrivals) + num_messages
    while len(timeline.arrivals) < target:
        assert engine.has_unfinished_requests(), "the requests ended within the measurement"
        bench_offline.follow_step(engine, timeline)
    num_steps = (timeline.num_tokens - num_before) / len(timeline.first_token_s)
    return 1e6 * (timeline.arrivals[-1][0] - start) / num_steps, num_steps


def _record(
    engine: LLMEngine, timeline: Timeline, traces: Path, num_steps: int
) -> tuple[int, list[str]]:
    """Profile about this many steps; how many they were, and the trace files.

    A core that computes faster than its messages are read is ahead of them: they end what it did
    before, so that its own count tells when enough was recorded.
    """
    engine.start_profile(str(traces))
    first = last = engine.get_stats().num_steps
    while last - first < num_steps:
        _follow(engine, timeline, num_steps - (last - first))
        last = engine.get_stats().num_steps
    return last - first, engine.stop_profile()


def _per_step(usage: Usage, num_steps: float) -> tuple[float, float]:
    """Microseconds of the main thread and of all threads."""
    return 1e6 * usage.main_s / num_steps, 1e6 * usage.cpu_s / num_steps


def _figures(
    step_us: float, cpu_us: dict[str, tuple[float, float]], breakdown: Breakdown
) -> Result:
    return {
        "step_ms": round(step_us / 1e3, 3),
        "idle_share": round(1 - breakdown.busy_us / step_us, 4),
        "cpu_us": {role: round(total) for role, (_, total) in cpu_us.items()},
    } | _breakdown_figures(breakdown)


def _breakdown_figures(breakdown: Breakdown) -> Result:
    return {
        "gpu_busy_ms": round(breakdown.busy_us / 1e3, 3),
        "idle_share_traced": round(breakdown.idle_share, 4),
        "traced_step_ms": round(breakdown.step_us / 1e3, 3),
        "traced_steps": breakdown.num_steps,
        "groups_us": {share.name: round(share.us, 1) for share in breakdown.groups},
        "kernels_per_step": round(sum(share.count for share in breakdown.groups), 1),
    }


def _print(
    batch: int, step_us: float, cpu_us: dict[str, tuple[float, float]], breakdown: Breakdown
) -> None:
    idle = 1 - breakdown.busy_us / step_us
    print(f"\nbatch {batch}: {step_us:.0f} us a step, device busy {breakdown.busy_us:.0f} us")
    print(f"idle share {idle:.1%}")
    print("CPU us per step           main thread   all threads")
    for role, (main_us, total_us) in cpu_us.items():
        print(f"  {role:<22} {main_us:12.1f} {total_us:13.1f}")
    _print_breakdown(breakdown)


def _print_breakdown(breakdown: Breakdown) -> None:
    print(f"{breakdown.num_steps} recorded steps of {breakdown.step_us:.0f} us", end="")
    print(f", {breakdown.idle_share:.1%} of them idle")
    for title, shares in (
        ("device work by group", breakdown.groups),
        ("gaps by length", breakdown.gaps),
        ("largest kernels", breakdown.kernels[:TOP_KERNELS]),
    ):
        print(f"{title:<60} per step   us per step")
        for share in shares:
            print(_line(share))


def _line(share: Share) -> str:
    return f"  {share.name[:58]:<58} {share.count:8.1f} {share.us:13.1f}"
