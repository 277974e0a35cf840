"""First tokens and gaps while requests arrive, without a GPU.

Frontend, bus and core run over an executor that takes the time of an 8B model on an H200
(``bench_paced_executor``).

Every setting is measured in the same run under the same Poisson arrivals of chat-like requests.
HTTP is not in it, so a server adds about a millisecond.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import bench_workload
from bench_client import percentile

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "scripts" / "demo_models" / "tiny"
PACED = "scripts.bench_paced_executor:PacedExecutor"
# An 8B model in bfloat16 on an H200: weights read, products per token, and the keys and values of
# a stream. Within a tenth of what was measured for 1 to 256 streams, prompts of 512 to 2048 tokens.
LLAMA_8B = {"step_ms": 4.0, "token_ms": 0.0222, "row_ms": 0.016}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[10.0, 40.0], help="requests per second")
    add("--seconds", type=float, default=15.0, help="how long requests arrive")
    add("--prompt-len", type=int, help="tokens of every prompt; otherwise as in chat traffic")
    add(
        "--set", dest="settings", action="append", metavar="FIELD=VALUE[,...]",
        help="engine arguments of one setting, may be repeated; without it: as by default, "
        "and with steps planned as early as possible",
    )  # fmt: skip
    add("--output", help="file that the JSON lines are appended to")


def run(args: argparse.Namespace) -> int:
    """Measure every rate in every setting, a JSON line each."""
    sys.path.insert(0, str(ROOT))
    for rate in args.rates:
        for setting in args.settings or ["max_steps_in_flight=2", ""]:
            figures = asyncio.run(measure(rate, args.seconds, args.prompt_len, setting))
            line = json.dumps({"kind": "arrivals", "rate": rate, "setting": setting} | figures)
            print(line, flush=True)
            if args.output:
                with Path(args.output).open("a") as file:
                    file.write(line + "\n")
    return 0


async def measure(rate: float, seconds: float, prompt_len: int | None, setting: str) -> Result:
    """Start an engine, send it the requests, and sum up what their readers saw."""
    from frontend import AsyncEngineArgs, AsyncLLM

    pairs = [pair.split("=", 1) for pair in setting.split(",") if pair]
    arrivals_s = bench_workload.poisson_arrivals_s(rate, seconds)
    work = bench_workload.sharegpt_like(len(arrivals_s), (300, 8000))
    if prompt_len is not None:
        lens = [max(1, n) for n in work.output_lens]
        prompts = bench_workload.fixed(len(lens), prompt_len, 1, (300, 8000)).prompts
        work = bench_workload.Work(prompts=prompts, output_lens=lens)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(MODEL),
            executor_class=PACED,
            model_loader_extra_config=LLAMA_8B,
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            disable_log_stats=True,
            disable_log_requests=True,
            **{name: json.loads(value) for name, value in pairs},
        )
    )
    try:
        streams = await _send_all(engine, work, arrivals_s)
    finally:
        engine.shutdown()
    first = [1e3 * times_s[1] for times_s in streams]
    gaps = [1e3 * (b - a) for times_s in streams for a, b in itertools.pairwise(times_s[1:])]
    return {
        "requests": len(streams),
        "ttft_ms_p50": percentile(first, 50),
        "ttft_ms_p99": percentile(first, 99),
        "itl_ms_p50": percentile(gaps, 50),
        "itl_ms_p99": percentile(gaps, 99),
    }


async def _send_all(
    engine: Any, work: bench_workload.Work, arrivals_s: list[float]
) -> list[list[float]]:
    """When each request's tokens came, in seconds from its sending; the first is the sending."""
    from frontend import SamplingParams
    from ipc.sampling_params import RequestOutputKind

    async def read(number: int) -> list[float]:
        sent_s = time.perf_counter()
        times_s = [0.0]
        params = SamplingParams(
            temperature=0.0, max_tokens=work.output_lens[number], ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = {"prompt_token_ids": work.prompts[number]}
        async for _ in engine.generate(prompt, params, str(number)):
            times_s.append(time.perf_counter() - sent_s)
        return times_s

    await read(0)  # which starts the engine
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        readers = []
        for number, at_s in enumerate(arrivals_s):
            await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            readers.append(tasks.create_task(read(number)))
    return [reader.result() for reader in readers]
